"""RoastLinear and RoastConv2d: the dense layer's numbers, one array for many layers, nothing kept, everything saved."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import quernel
from quernel import testing
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.hashing import TileMap
from quernel.nn import HashedLinear, RoastConv2d, RoastEmbedding, RoastLinear, SharedArray
from quernel.nn.hashed._memory import project
from quernel.nn.weights import unique_bytes

CLOSE = 1e-5
SHAPES = [((1, 1), 1), ((17, 33), 1), ((33, 17), 16), ((784, 10), 32), ((65, 70), 64), ((100, 40), (3, 20))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def array(size: int = 5000, **options: Any) -> SharedArray:
    return SharedArray(size, seed=3, generator=seeded(), **options)


def pair(tile: Any) -> tuple[int, int]:
    return tile if isinstance(tile, tuple) else (tile, tile)


@pytest.mark.parametrize(("sizes", "tile"), SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_linear_is_the_dense_layer(sizes: Any, tile: Any, bias: bool, mode: Any) -> None:
    layer = RoastLinear(*sizes, bias, memory=array(), tile=pair(tile), mode=mode)
    for shape in ((1, sizes[0]), (5, sizes[0]), (2, 7, sizes[0])):
        x = torch.randn(shape)
        wanted = F.linear(x, layer.materialize(), layer.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=CLOSE, atol=CLOSE * float(wanted.detach().abs().max()))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted, rtol=CLOSE, atol=CLOSE * float(wanted.abs().max()))


def test_bfloat16() -> None:
    layer = RoastLinear(64, 48, memory=array(), tile=(8, 16))
    x = torch.randn(9, 64)
    half = copy.deepcopy(layer).bfloat16()
    mapped, values = half.weight.mapped, half.memory.values.detach()
    moved = values[torch.from_numpy(mapped.index())] * torch.from_numpy(mapped.signs_of())  # type: ignore[call-arg]
    assert torch.equal(half.materialize(), moved * half.weight.scale)
    for module, inputs in ((half, x.bfloat16()), (layer, x.bfloat16()), (half, x)):
        got = module(inputs)
        assert got.dtype is inputs.dtype
        torch.testing.assert_close(got.float(), layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"groups": 2, "dilation": 2},
        {"padding": "same"},
        {"padding": (1, 2), "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect", "kernel_size": (2, 3)},
        {"bias": False},
    ],
    ids=str,
)
def test_convolution_is_the_dense_layer(options: dict[str, Any], mode: Any) -> None:
    settings = {"kernel_size": 3, **options}
    conv = RoastConv2d(4, 6, memory=array(200), tile=(4, 8), mode=mode, **settings)
    dense = nn.Conv2d(4, 6, **settings)
    dense.weight = nn.Parameter(conv.materialize().detach().clone())
    dense.bias = conv.bias
    x, twin = (torch.randn(2, 4, 9, 8, generator=seeded(1)).requires_grad_() for _ in range(2))
    y, wanted = conv(x), dense(twin)
    torch.testing.assert_close(y, wanted, rtol=CLOSE, atol=CLOSE)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    folded = conv.weight.fold(dense.weight.grad.reshape(6, -1)) * conv.weight.scale  # type: ignore[union-attr]
    torch.testing.assert_close(conv.memory.values.grad, folded, rtol=1e-4, atol=1e-3)


def test_gradients_of_linear_are_those_of_the_dense_layer() -> None:
    for mode in ("memory", "speed"):
        layer = RoastLinear(9, 7, memory=array(60), tile=(4, 8), mode=mode).double()
        x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)

        def run(x: Any, values: Any, bias: Any, layer: Any = layer) -> Any:
            state = {"weight.memory.values": values, "bias": bias}
            return torch.func.functional_call(layer, state, (x,))

        assert torch.autograd.gradcheck(run, (x, layer.memory.values, layer.bias))


def test_where_tiles_do_not_overlap_the_array_comes_back() -> None:
    # Room for every tile: starts that are multiples of the tile, each once.
    starts = np.arange(20).reshape(5, 4) * 32
    mapped = TileMap.explicit(starts, 640, (20, 32), (4, 8))
    layer = RoastLinear(32, 20, memory=array(640), tile_map=mapped, scale=0.5)
    before, dense = layer.memory.values.detach().clone(), layer.materialize().detach()
    with torch.no_grad():
        layer.memory.values.zero_()
    project(layer.memory, {layer.weight: dense})
    torch.testing.assert_close(layer.memory.values.detach(), before)


def test_two_layers_share_one_parameter() -> None:
    memory = array()
    net = nn.Sequential(RoastLinear(20, 30, memory=memory), RoastLinear(30, 20, memory=memory))
    assert sum(p.numel() for p in net.parameters()) == 5000 + 50
    assert unique_bytes(net) == 4 * 5050
    x = torch.randn(4, 20)
    net(x).sum().backward()
    together = memory.values.grad.clone()  # type: ignore[union-attr]
    parts = []
    for layer, inputs in ((net[0], x), (net[1], net[0](x).detach())):
        memory.values.grad = None
        following = net[1] if layer is net[0] else nn.Identity()
        with torch.no_grad():
            frozen = following.materialize() if layer is net[0] else torch.eye(20)
        F.linear(layer(inputs), frozen).sum().backward()
        parts.append(memory.values.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(together, parts[0] + parts[1], rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_states_keep_the_sharing(tmp_path: Any) -> None:
    memory = array()
    net = nn.Sequential(RoastLinear(20, 30, memory=memory, mode="speed"), nn.ReLU(), RoastLinear(30, 20, memory=memory))
    with torch.no_grad():
        net(torch.randn(1, 20))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].memory is twin[2].memory is not memory
        assert twin[0].weight._kept is None
        assert len(list(twin.parameters())) == 3
    assert len(pickle.dumps(net)) < 4 * 5050 + 20_000
    state = net.state_dict()
    assert state["0.weight.memory.values"].data_ptr() == state["2.weight.memory.values"].data_ptr()
    folder = save_model(net, tmp_path)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 4 * 5050 + 2000
    assert sum(f.stat().st_size for f in folder.iterdir()) < 4 * 5050 + 10_000
    loaded = quernel.load(folder, model=lambda: nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity()))
    assert loaded[0].memory.values is loaded[2].memory.values
    assert len(list(loaded.parameters())) == 3
    x = torch.randn(3, 20)
    assert torch.equal(loaded(x), net(x))
    loaded.load_state_dict(net.state_dict())
    moved = loaded.double().float()
    assert moved[0].memory.values is moved[2].memory.values
    # Another reader of the loaded array gets a map of its own.
    extra = RoastLinear(20, 30, memory=loaded[2].memory)
    assert extra.weight.mapped.seed not in (loaded[0].weight.mapped.seed, loaded[2].weight.mapped.seed)


def test_optimisers_see_one_parameter_and_its_state() -> None:
    memory = array()
    net = nn.Sequential(RoastLinear(20, 30, memory=memory), RoastLinear(30, 20, memory=memory))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    assert sum(t.nbytes for held in optimizer.state.values() for t in held.values() if t.ndim) == 8 * 5050


@pytest.mark.slow
def test_distributed_data_parallel_sees_one_parameter(tmp_path: Any) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        memory = array()
        net = nn.Sequential(RoastLinear(20, 30, memory=memory), RoastLinear(30, 20, memory=memory))
        wrapped, x = nn.parallel.DistributedDataParallel(copy.deepcopy(net)), torch.randn(4, 20)
        assert len(list(wrapped.parameters())) == 3
        for model in (net, wrapped):
            model(x).sum().backward()
        torch.testing.assert_close(wrapped.module[0].memory.values.grad, memory.values.grad)
    finally:
        dist.destroy_process_group()


def test_equal_layers_on_one_array_differ() -> None:
    memory = array()
    one, two = (RoastLinear(64, 64, False, memory=memory).materialize().detach().flatten() for _ in range(2))
    assert not torch.equal(one, two)
    # 4,096 products of independent numbers, but only 4 tiles: correlation has a standard deviation near 1/64.
    assert abs(float(torch.corrcoef(torch.stack((one, two)))[0, 1])) < 5 / 64
    again = RoastLinear(64, 64, False, memory=array()).materialize().detach().flatten()
    assert torch.equal(again, one)


@pytest.mark.parametrize("make", [RoastLinear, HashedLinear])
def test_initial_spread_is_the_dense_layers(make: Any) -> None:
    # An array of 20,000 uniform numbers knows its spread to 0.3 %, a weight of more numbers likewise.
    memory = array(20_000, bound=0.3)
    for sizes in ((300, 200), (784, 512), (200, 300)):
        weight = make(*sizes, memory=memory).materialize().detach()
        assert float(weight.std()) == pytest.approx((3 * sizes[0]) ** -0.5, rel=0.03)
    conv = RoastConv2d(64, 64, 3, memory=memory).materialize().detach()
    assert float(conv.std()) == pytest.approx((3 * 64 * 9) ** -0.5, rel=0.03)
    table = RoastEmbedding(2000, 32, memory=memory).materialize().detach()
    assert float(table.std()) == pytest.approx(1.0, rel=0.03)


def test_activations_of_a_deep_net_start_at_the_dense_scale() -> None:
    torch.manual_seed(0)
    memory, x = array(20_000), torch.randn(256, 256)
    dense, ours = x, x
    for _ in range(6):
        dense = nn.Linear(256, 256)(dense).relu()
        ours = RoastLinear(256, 256, memory=memory)(ours).relu()
        # The gain of one random layer varies by some percent; six of them by a quarter.
        assert 0.75 < float((ours.std() / dense.std()).detach()) < 1.33


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_nothing_of_the_weights_size_is_allocated_in_memory_mode(mode: Any) -> None:
    layer = RoastLinear(600, 700, memory=array(), mode=mode)
    x = torch.randn(50, 600, requires_grad=True)
    layer(x).sum().backward()  # compiles
    saved: list[int] = []

    def pack(tensor: Any) -> Any:
        saved.append(tensor.numel())
        return tensor

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
            y = layer(x)
        y.sum().backward()
    largest = max((abs(event.self_cpu_memory_usage) for event in seen.events()), default=0)
    if mode == "memory":
        assert max(saved) < 600 * 700
        assert largest < 4 * 600 * 700
    else:
        assert max(saved) == 600 * 700


def test_speed_mode_follows_the_array() -> None:
    layer = RoastLinear(40, 30, memory=array(), mode="speed").eval()
    x = torch.randn(2, 40)
    with torch.no_grad():
        first = layer(x)
        assert layer.materialize() is layer.materialize()
        layer.memory.values.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias))
        layer.memory.values.data = layer.memory.values.data * 0
        torch.testing.assert_close(layer(x), layer.bias.expand(2, 30))
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_conformance_of_both_modes(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> RoastLinear:
        return RoastLinear(33, 17, memory=array(300), tile=(4, 8), mode=mode, generator=seeded())

    example = {"make": make, "input": lambda g: (torch.randn(6, 33, generator=g),)}
    monkeypatch.setattr(RoastLinear, "_quernel_example", staticmethod(lambda: example))
    checks = testing.checks_for("module")
    for name in ("outputs", "low_precision", "batch_independence", "gradients", "copy", "config_round_trip"):
        checks[name](RoastLinear)


@pytest.mark.slow
def test_compiled_training_step() -> None:
    memory = array()
    net = nn.Sequential(RoastConv2d(3, 8, 3, memory=memory), nn.Flatten(), RoastLinear(8 * 36, 5, memory=memory))
    x = torch.randn(4, 3, 8, 8)
    net(x).square().sum().backward()
    wanted = memory.values.grad.clone()  # type: ignore[union-attr]
    memory.values.grad = None
    torch.compile(net, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(memory.values.grad, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": torch.zeros(9)}, "memory must be a SharedArray; got Tensor"),
        (
            {"memory": SharedArray(1000)},
            r"memory must hold at least 1024 numbers, those of one tile \(32, 32\).*holds 1000",
        ),
        ({"tile": (0, 4)}, "tile must be an integer in"),
        ({"tile": (4, 4, 4)}, "tile must be two integers"),
        ({"tile": 16}, "tile must be two integers, rows and columns; got 16"),
        ({"in_features": "7"}, "in_features must be an integer in"),
        ({"mode": "fast"}, "mode must be one of 'memory', 'speed'"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"signs": 1}, "signs must be bool"),
        ({"bias": 1}, "bias must be bool"),
        ({"in_features": 0}, "in_features must be an integer in"),
        ({"out_features": 0}, "out_features must be an integer in"),
        ({"tile_map": TileMap(5000, (5, 8), (2, 2))}, r"shape must be \(5, 8\) as a matrix; got \(5, 7\)"),
        ({"tile_map": TileMap(99, (5, 7), (2, 2))}, "mapped must be over an array of 5000 numbers; it is over 99"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"in_features": 7, "out_features": 5, "memory": array(), **options}
    with pytest.raises(QuernelError, match=message):
        RoastLinear(**arguments)


def test_bad_inputs_are_named() -> None:
    with pytest.raises(QuernelError, match=r"x must be floating with 7 features"):
        RoastLinear(7, 5, memory=array())(torch.zeros(2, 8))
    with pytest.raises(QuernelError, match=r"x must have shape \(N, 4, H, W\)"):
        RoastConv2d(4, 6, 3, memory=array())(torch.zeros(2, 5, 8, 8))
    for options, message in (
        ({"groups": 4}, "groups must divide 4 and 6 channels; got 4"),
        ({"groups": 0}, "groups must be an integer in"),
        ({"in_channels": 0}, "in_channels must be an integer in"),
        ({"in_channels": 4.0}, "in_channels must be an integer in"),
        ({"out_channels": 0}, "out_channels must be an integer in"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be an integer in \[1, inf\); got 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be one or two integers; got \(3, 3, 3\)"),
        ({"kernel_size": 2.5}, "kernel_size must be an integer in"),
        ({"tile": 16}, "tile must be two integers, rows and columns; got 16"),
    ):
        arguments: Any = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "memory": array()}
        with pytest.raises(QuernelError, match=message):
            RoastConv2d(**arguments | options)
    config = RoastLinear(7, 5, memory=array()).config()
    config["weight"]["config"]["hash"] = 2
    with pytest.raises(QuernelError, match="hash must be at most 1"):
        RoastLinear.from_config(config)
