"""``FactorizedConv1d/2d/3d``: the dense layer's numbers, counts, initial values, conversions, memory, refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quernel._errors import QuernelError
from quernel.nn import FactorizedConv1d, FactorizedConv2d, FactorizedConv3d
from quernel.nn.functional import one_way_conv

LAYERS = {1: FactorizedConv1d, 2: FactorizedConv2d, 3: FactorizedConv3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# float32 sums in another order; relative to the whole output.
CLOSE = 1e-5
# Kurtosis about 25 for a product of three normals; over 4e6 entries of 64 independent layers the variance of the
# variance leaves a deviation of 1.5 % at these fixed seeds.
VARIANCE = 0.10


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def image(dims, channels=4, n=9, seed=1):
    return torch.randn(2, channels, *(n, n - 1, n - 2)[:dims], generator=seeded(seed))


def relative(got, wanted):
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def dense_like(layer):
    """Return torch's layer with the multiplied-out kernel."""
    dims = len(layer.kernel_size)
    geometry = {name: getattr(layer, name) for name in layer.geometry}
    conv = CONVS[dims](layer.in_channels, layer.out_channels, **geometry)
    with torch.no_grad():
        conv.weight.copy_(layer.kernel())
        conv.bias.copy_(layer.bias)
    return conv


PADDINGS = ("same", "valid", 1, 2)
MODES = ("zeros", "reflect", "replicate", "circular")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_torchs_layer_with_every_padding(dims):
    x = image(dims)
    kernel = (3, 4, 2)[:dims]
    for padding, mode, shared in itertools.product(PADDINGS, MODES, (False, True)):
        layer = LAYERS[dims](
            4, 6, kernel, padding=padding, dilation=2, rank=2, shared=shared, padding_mode=mode, init="kaiming"
        )
        assert relative(layer(x), dense_like(layer)(x)) < CLOSE, (padding, mode, shared)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_stride_and_rank(rank, normalize):
    for stride, dilation, kernel in itertools.product((1, 2, 3), (1, 2), ((1, 3), (5, 3), 3)):
        layer = FactorizedConv2d(
            4, 6, kernel, stride, 1, dilation, rank, normalize=normalize, init="kaiming", generator=seeded()
        )
        x = image(2, n=14).contiguous(memory_format=torch.channels_last)
        y = layer(x)
        assert relative(y, dense_like(layer)(x)) < CLOSE
        assert y.is_contiguous(memory_format=torch.channels_last)
        if normalize:
            for filters in layer.filters()[1]:
                torch.testing.assert_close(filters.norm(dim=2), torch.ones(6, rank))


def test_a_single_image_needs_no_batch():
    layer, x = FactorizedConv2d(4, 6, 3), image(2)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


@pytest.mark.parametrize("shared", [False, True])
def test_counts_are_the_formulas_and_what_torch_measures(shared):
    inputs, outputs, rank, kernel, stride = 5, 7, 3, (3, 5), (2, 1)
    layer = FactorizedConv2d(inputs, outputs, kernel, stride, (1, 2), rank=rank, shared=shared)
    filters = inputs if shared else outputs
    parameters = rank * (outputs * inputs + filters * sum(kernel)) + outputs
    assert sum(p.numel() for p in layer.parameters()) == parameters
    x = image(2, inputs, 12)
    _, _, height, width = x.shape
    out_height, out_width = layer(x).shape[2:]
    mixing = outputs * inputs * rank
    filtering = filters * rank * (out_height * width * kernel[0] + out_height * out_width * kernel[1])
    wanted = filtering + mixing * (out_height * out_width if shared else height * width)
    assert layer.multiply_adds(height, width) == wanted
    channel, spatial = layer.filters()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        one_way_conv(
            x, channel, spatial, layer.bias,
            stride=stride, padding=[(1, 1), (2, 2)], dilation=(1, 1), shared=shared, joined=False,
        )  # fmt: skip
    assert counter.get_total_flops() == 2 * len(x) * wanted


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_from_conv_and_back(dims):
    conv = CONVS[dims](3, 5, (3, 2, 3)[:dims], stride=2, padding=1)
    x = image(dims, 3)
    exact = LAYERS[dims].from_conv(conv, rank=(3, 6, 18)[dims - 1])
    assert relative(exact.kernel(), conv.weight) < CLOSE
    assert relative(exact(x), conv(x)) < CLOSE
    assert exact.bias is conv.bias
    back = exact.to_conv()
    assert type(back) is type(conv)
    assert back.bias is conv.bias
    assert (back.stride, back.padding) == (conv.stride, conv.padding)
    assert relative(back(x), conv(x)) < CLOSE


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_fuse_gives_two_plain_layers_that_compute_the_same(dims, shared):
    layer = LAYERS[dims](4, 6, 3, 2, 1, rank=2, shared=shared, padding_mode="reflect", init="kaiming").eval()
    plain = layer.fuse()
    assert all(type(part) is CONVS[dims] for part in plain)
    assert not plain.training
    x = image(dims)
    assert relative(plain(x), layer(x)) < CLOSE


def test_exported_programs_run_without_this_library():
    layer, x = FactorizedConv2d(4, 6, 3, padding="same", rank=2).eval(), image(2)
    program = torch.export.export(layer, (x,), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("quernel" in name for name in names)
    assert relative(program.module()(x), layer(x)) < CLOSE


def test_frozen_layers_stay_frozen():
    conv = nn.Conv2d(3, 5, 3).requires_grad_(False)
    conv.bias.requires_grad_(True)
    layer = FactorizedConv2d.from_conv(conv, 2)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_kaiming_variance():
    variances = []
    for seed in range(64):
        layer = FactorizedConv2d(64, 113, 3, rank=1 + seed % 3, init="kaiming", generator=seeded(seed))
        variances.append(float(layer.kernel().detach().double().square().mean()))
    assert sum(variances) / 64 == pytest.approx(2 / (64 * 9), rel=VARIANCE)


@pytest.mark.parametrize(("init", "low", "high"), [("dirac", 0.5, 2.0), ("kaiming", 0.2, 4.0)])
@pytest.mark.parametrize("seed", range(3))
def test_signals_neither_die_nor_explode(init, low, high, seed):
    x = torch.randn(4, 64, 24, 24, generator=seeded(seed + 100))
    with torch.no_grad():
        for depth in range(8):
            layer = FactorizedConv2d(64, 64, 3, padding=1, bias=False, init=init, generator=seeded(8 * seed + depth))
            x = F.relu(layer(x))
    assert low <= float(x.square().mean().sqrt()) <= high


def test_dirac_starts_as_a_pointwise_layer():
    layer = FactorizedConv2d(4, 6, (3, 4), padding="same", bias=False, generator=seeded())
    with torch.no_grad():
        for filters in layer.spatial:
            filters.copy_(filters.round())  # takes the noise away
    x = image(2)
    wanted = F.conv2d(x, layer.channel[:, 0, :, None, None])
    assert relative(layer(x), wanted) < CLOSE


def test_the_generator_decides_alone():
    before = torch.get_rng_state()
    one, two = (FactorizedConv2d(3, 4, 3, generator=seeded(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    FactorizedConv2d.from_conv(one.to_conv(), 2).fuse()
    FactorizedConv2d.from_config(one.config())
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_decay_is_on_the_channel_filters_alone():
    layer = FactorizedConv2d(3, 4, 3)
    decayed, others = layer.param_groups(0.1, weight_decay=0.01)
    assert decayed == {"params": [layer.channel], "lr": 0.1, "weight_decay": 0.01}
    assert others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(p) for p in (*layer.spatial, layer.bias)}
    torch.optim.AdamW(layer.param_groups(0.1, 0.01))


def test_a_second_derivative_is_there_where_asked_for():
    layer = FactorizedConv2d(3, 4, 3, memory_efficient=False)
    x = image(2, 3).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), layer.channel)
    assert bool(second.ne(0).any())


def kept_bytes(layer, x):
    """Return the bytes that autograd keeps besides the parameters and the input."""
    known = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    held = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(held.values())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_training_keeps_no_more_than_the_dense_layer(dims):
    x = image(dims, 16, 24).contiguous(memory_format=torch.channels_last) if dims == 2 else image(dims, 16, 24)
    make = LAYERS[dims]
    lean, rich = (make(16, 16, 3, padding=1, rank=2, memory_efficient=flag) for flag in (True, False))
    filters = sum(p.numel() for p in lean.parameters()) * 4
    # The joined filters of all taps may be kept, which are as small as the layer.
    assert kept_bytes(lean, x) <= 4 * filters
    assert kept_bytes(rich, x) >= x.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_through_config_and_state(dtype):
    layer = FactorizedConv2d(3, 5, (3, 2), 2, "valid", rank=2, bias=False, shared=True, normalize=True, dtype=dtype)
    twin = FactorizedConv2d.from_config(layer.config())
    twin.load_state_dict(layer.state_dict())
    x = image(2, 3).to(dtype)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert "rank=2" in repr(layer)
    assert "shared=True" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 3), {}, "in_channels must be"),
        ((3, 4, 3), {"rank": 0}, "rank must be an integer in"),
        ((3, 4, -1), {}, "kernel_size must be|negative dimension"),
        ((3, 4, 3), {"stride": 0}, "stride"),
        ((3, 4, 3), {"stride": 2, "padding": "same"}, "padding='same' is not supported for strided convolutions"),
        ((3, 4, 3), {"padding": -1}, "padding must be"),
        ((3, 4, (3, 3, 3)), {}, "kernel_size must be one number or 2"),
        ((3, 4, 3), {"padding_mode": "mirror"}, "padding_mode must be one of"),
        ((3, 4, 3), {"init": "xavier"}, "init must be one of"),
        ((3, 4, 3), {"shared": 1}, "shared must be bool"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(QuernelError, match=message):
        FactorizedConv2d(*arguments, **options)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(QuernelError, match="groups=1; got 3"):
        FactorizedConv2d.from_conv(nn.Conv2d(3, 6, 3, groups=3), 1)
    with pytest.raises(QuernelError, match="conv must be Conv2d"):
        FactorizedConv2d.from_conv(nn.Conv1d(3, 6, 3), 1)
    with pytest.raises(QuernelError, match="x must be of shape"):
        FactorizedConv2d(3, 6, 3)(torch.ones(1, 4, 8, 8))


PEAK = """
import re, sys
import torch
from quernel.nn import FactorizedConv2d
torch.set_num_threads(1)

def peak():
    # Of this process image alone: getrusage starts from what the parent had used.
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def net(kind, channels):
    make = torch.nn.Conv2d if kind == "dense" else FactorizedConv2d
    layers = []
    for _ in range(6):
        layers += [make(channels, channels, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

def step(model, size):
    x = torch.randn(8, model[0].in_channels, size, size).contiguous(memory_format=torch.channels_last)
    model(x).square().mean().backward()

kind = sys.argv[1]
step(net(kind, 64), 32)  # code and kernels are loaded, and compiled for these channels
before = peak()
step(net(kind, 64), 96)
sys.stdout.write(str(peak() - before))
"""
# Peak memory of a training step relative to the dense net's: the bar of a layer with more steps than one.
MOST_MEMORY = 1.3


@pytest.mark.slow
def test_peak_memory_of_training_is_near_the_dense_nets():
    used = {}
    for kind in ("dense", "factorised"):
        done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True)
        used[kind] = int(done.stdout)
    assert used["dense"] > 50_000  # kilobytes: a real measurement
    assert used["factorised"] <= MOST_MEMORY * used["dense"]
