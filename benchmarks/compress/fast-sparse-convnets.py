"""Fast sparse ConvNets: the sparse kernel against every dense one, its layers, and a whole depthwise-separable network.

"Fastest dense" is the fastest of ``torch.mm`` and ``conv2d`` on plain and channels-last tensors at the thread count of
the row. "oneDNN" is the dense convolution on a prepacked weight and channels-last tensors, which a user reaches through
``torch.compile``; on one thread it is about twice as fast as what torch takes by default, and shown beside. "int8" is
the integer product alone. Targets stand for one thread and for two, where torch takes oneDNN's kernels by itself.

Rows of fewer than 70 % zeros say where dense products begin to win; those of the smallest layer, what a call costs.
"""

from __future__ import annotations

import copy
import ctypes
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._machine import L3_BYTES, VECTOR_OPS
from benchmarks._runner import Case, Unavailable
from quernel.compress import SparsePointwise, compress
from quernel.nn import DepthwiseConv2d, SparseConv1x1, SparseLinear, _native_ranges, _spmm
from quernel.nn._channel_major import aligned_copy, empty_planes
from quernel.nn._folding import folded
from quernel.nn.functional import magnitude_mask

# Sums of hundreds of products in float32, in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PICK_RUNS = 20


def sparse_weight(outputs: int, inputs: int, sparsity: float) -> Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5
    return weight * magnitude_mask(weight, sparsity)


def csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout beta
        return weight.to_sparse_csr()


def sparse_layer(conv: nn.Conv2d, aligned: bool) -> SparseConv1x1:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a dense product may be faster is what some rows show
        return SparseConv1x1.from_conv(conv, aligned=aligned)


def kernel(outputs: int, inputs: int, side: int, sparsity: float, aligned: bool) -> SimpleNamespace:
    weight = sparse_weight(outputs, inputs, sparsity)
    pixels = side * side
    conv = nn.Conv2d(inputs, outputs, 1, bias=False).requires_grad_(False)
    conv.weight.copy_(weight[:, :, None, None])
    layer = sparse_layer(conv, False)
    x = torch.randn(1, inputs, side, side, generator=torch.Generator().manual_seed(1))
    placed = aligned_copy(x) if aligned else x
    y = empty_planes(x, outputs, side, side, aligned)
    last = x.contiguous(memory_format=torch.channels_last)
    half, half_weight = last.bfloat16(), weight.bfloat16()
    rows = x.view(inputs, pixels)
    state = SimpleNamespace(
        x=x, placed=placed, y=y, last=last, half=half, rows=rows, half_rows=rows.bfloat16(),
        bytes_rows=(rows.T * 40).clamp(-127, 127).to(torch.int8),
        weight=weight, csr=csr(weight), half_weight=half_weight, half_conv=half_weight[:, :, None, None],
        bytes_weight=(weight.T * 300).clamp(-127, 127).to(torch.int8),
        conv=conv, layer=layer, aligned_layer=sparse_layer(conv, True),
        prepacked=prepacked(conv, last), nonzeros=layer.weight.nonzeros, picked={},
    )  # fmt: skip
    state.run = prepared(state)
    return state


def prepacked(conv: nn.Conv2d, x: Tensor) -> Callable[[], Tensor] | None:
    """Return oneDNN's convolution on a weight in its own layout, as compiled models call it."""
    geometry = ([0, 0], [1, 1], [1, 1], 1)
    try:
        weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *geometry, list(x.shape))
        run = partial(torch.ops.mkldnn._convolution_pointwise, x, weight, None, *geometry, "none", [], "")
        run()
    except (AttributeError, RuntimeError):
        return None
    return run


def prepared(state: SimpleNamespace) -> Callable[[], None]:
    """Return the compiled kernel alone: from memory to memory, no Python, no allocation inside."""
    x, y, (values, indices, pointers, outputs, inputs, block) = state.placed, state.y, state.layer.weight.operands()
    pixels = x.shape[2] * x.shape[3]
    strips = -(-pixels // _spmm.STRIP)
    bias = torch.zeros(outputs)
    copied = x is state.x
    room = 4 * inputs * _spmm.STRIP + 64
    scratch = torch.empty(2 * room, dtype=torch.int8)
    infinity = 0x7F800000
    fields = (
        *(x.data_ptr(), 0, 4 * x.stride(1), int(copied), values.data_ptr(), indices.data_ptr(), pointers.data_ptr()),
        *(bias.data_ptr(), infinity - 2**31, infinity, y.data_ptr(), 0, 4 * y.stride(1)),
        *(inputs, outputs, block, pixels, strips),
    )
    ahead = -(-inputs // outputs) if 4 * pixels * (inputs + outputs) > 2**20 else 0
    rest = (ahead, scratch.data_ptr(), room, _spmm.rows(block), _spmm.rows(1))
    # One thread calls the C function itself: what else a call from Python does costs as much as the smallest case.
    table = torch.tensor([*fields, 1, *rest])
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(_spmm.strips())
    state.kept = (bias, scratch, table)
    place = table.data_ptr()

    def run() -> None:
        threads = torch.get_num_threads()
        if threads == 1:
            function(place, 0, strips, 0)
            return
        split = 1 if strips % threads == 0 or strips >= 4 * threads else threads
        _native_ranges.run_ranges(_spmm.strips(), (*fields, split, *rest), strips * split, threads)

    return run


def fastest(name: str, state: SimpleNamespace, *candidates: Callable[[], Any]) -> Any:
    """Run the candidate that was the fastest when this was first called at this thread count."""
    key = name, torch.get_num_threads()
    if key not in state.picked:

        def seconds(run: Callable[[], Any]) -> float:
            times = []
            for _ in range(PICK_RUNS):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            return min(times)

        with torch.inference_mode():
            state.picked[key] = min(candidates, key=seconds)
    with torch.inference_mode():
        return state.picked[key]()


def fastest_dense(s: SimpleNamespace) -> Tensor:
    return fastest(
        "dense",
        s,
        lambda: torch.mm(s.weight, s.rows),
        lambda: F.conv2d(s.x, s.conv.weight),
        lambda: F.conv2d(s.last, s.conv.weight),
    )


def half_dense(s: SimpleNamespace) -> Tensor:
    return fastest("bf16", s, lambda: torch.mm(s.half_weight, s.half_rows), lambda: F.conv2d(s.half, s.half_conv))


def onednn(s: SimpleNamespace) -> Tensor:
    if s.prepacked is None:
        raise Unavailable("this build of torch lacks oneDNN's prepacked convolution")
    return s.prepacked()


def near_the_dense_product(s: SimpleNamespace) -> None:
    s.run()
    torch.testing.assert_close(s.y.flatten(2)[0], s.weight @ s.rows, **TOLERANCE)


def kernel_bound(s: SimpleNamespace, threads: int) -> float:
    seconds = 2 * s.nonzeros * s.rows.shape[1] / VECTOR_OPS + (s.x.nbytes + 4 * s.y.numel()) / L3_BYTES
    return seconds / threads * 1e3


KERNEL_PEERS = {
    "fastest dense": fastest_dense,
    "CSR": lambda s: s.csr @ s.rows,
    "bf16": half_dense,
    "oneDNN": onednn,
    "int8": lambda s: torch._int_mm(s.bytes_rows, s.bytes_weight),
}
ALIGNED = {0.7: 2.5, 0.8: 4.0, 0.9: 7.5, 0.95: 12.0}
PLAIN = {0.7: 1.8, 0.8: 2.8, 0.9: 4.5, 0.95: 6.5}
SHAPES = ((512, 8), (128, 14), (256, 28), (128, 56))


def targets(sparsity: float, aligned: bool) -> dict[str, float]:
    if sparsity not in ALIGNED:
        return {}
    dense = (ALIGNED if aligned else PLAIN)[sparsity]
    csr = 3.0 if aligned else 2.0 if sparsity < 0.95 else 1.7
    half = {"bf16": 2.0 if aligned else 1.3} if sparsity == 0.9 else {}
    return {"fastest dense": dense, "CSR": csr} | half


def kernel_case(channels: int, side: int, sparsity: float, aligned: bool, threads: int) -> Case:
    layout = "aligned" if aligned else "plain"
    return Case(
        name=f"kernel {channels}->{channels}, {side * side} pixels, {sparsity:.0%} zeros, {layout}"
        + (", two threads" if threads == 2 else ""),
        setup=partial(kernel, channels, channels, side, sparsity, aligned),
        ours=lambda s: s.run(),
        peers=KERNEL_PEERS,
        gate=near_the_dense_product,
        target=targets(sparsity, aligned),
        bound_ms=kernel_bound,
        bound="multiply-adds at 230 GFLOP/s and bytes at 97 GB/s a core",
        rounds=20,
        threads=(threads,),
    )


def linear(tokens: int, size: int, sparsity: float) -> SimpleNamespace:
    dense = nn.Linear(size, size).requires_grad_(False)
    dense.weight.copy_(sparse_weight(size, size, sparsity))
    x = torch.randn(tokens, size)
    return SimpleNamespace(
        x=x,
        dense=dense,
        half=copy.deepcopy(dense).bfloat16(),
        half_x=x.bfloat16(),
        ours=SparseLinear.from_linear(dense),
    )


def depthwise(channels: int, side: int, size: int, stride: int) -> SimpleNamespace:
    conv = nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels).requires_grad_(False)
    x = torch.randn(1, channels, side, side)
    last = x.contiguous(memory_format=torch.channels_last)
    conv_last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    ours = DepthwiseConv2d.from_conv(conv, aligned=True)
    return SimpleNamespace(x=x, placed=aligned_copy(x), conv=conv, last=last, conv_last=conv_last, ours=ours, picked={})


def call(layer: str, x: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, layer)(getattr(s, x))


def same(ours: Callable[[Any], Tensor], dense: Callable[[Any], Tensor], s: SimpleNamespace) -> None:
    torch.testing.assert_close(ours(s), dense(s), **TOLERANCE)


def mobile_net(batch: int) -> SimpleNamespace:
    """Return seven depthwise-separable blocks, 32 to 256 channels, on 32 x 32 pixels, 90 % of the 1x1 weights zero."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    widths = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 256, 1), (256, 256, 1))
    for inputs, outputs, stride in widths:
        layers += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs)]
        layers += [nn.ReLU6(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).eval()
    for layer in net:
        if isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1):
            layer.weight.data *= magnitude_mask(layer.weight, 0.9)
    net.requires_grad_(False)
    x = torch.randn(batch, 3, 32, 32)
    dense = folded(net)
    return SimpleNamespace(
        x=x,
        last=x.contiguous(memory_format=torch.channels_last),
        ours=compress(net, SparsePointwise(), example_inputs=x).model,
        dense=dense,
        dense_last=folded(net).to(memory_format=torch.channels_last),
        half=folded(net).to(memory_format=torch.channels_last).bfloat16(),
        half_x=x.bfloat16().contiguous(memory_format=torch.channels_last),
        picked={},
    )


def fastest_network(s: SimpleNamespace) -> Tensor:
    return fastest("dense", s, lambda: s.dense(s.x), lambda: s.dense_last(s.last))


def fastest_depthwise(s: SimpleNamespace) -> Tensor:
    return fastest("dense", s, lambda: s.conv(s.x), lambda: s.conv_last(s.last))


def compiled(s: SimpleNamespace) -> Tensor:
    """Run the dense network through torch's compiler with frozen weights, which prepacks them for oneDNN."""
    from torch._inductor import config

    if not hasattr(s, "compiled"):
        with config.patch(freezing=True), torch.no_grad():
            s.compiled = torch.compile(copy.deepcopy(s.dense_last), dynamic=False)
            try:
                s.compiled(s.last)
            except Exception as error:  # whatever keeps the compiler from working here, the peer is not to be had
                s.compiled = None
                raise Unavailable(f"torch.compile fails here: {type(error).__name__}") from error
    if s.compiled is None:
        raise Unavailable("torch.compile fails here")
    with torch.no_grad():
        return s.compiled(s.last)


KERNELS = [(channels, side, sparsity) for channels, side in SHAPES for sparsity in ALIGNED]
BREAK_EVEN = [(channels, side, sparsity) for channels, side in SHAPES[1:3] for sparsity in (0.0, 0.2, 0.4, 0.5, 0.6)]
CASES = [
    *(kernel_case(*shape, aligned=True, threads=1) for shape in (*KERNELS, *BREAK_EVEN)),
    *(kernel_case(*shape, aligned=False, threads=1) for shape in KERNELS),
    *(kernel_case(256, 28, sparsity, aligned, threads=2) for aligned in (True, False) for sparsity in ALIGNED),
    *(kernel_case(256, 28, sparsity, aligned=True, threads=2) for sparsity in (0.2, 0.4, 0.6)),
    Case(
        name="the call of a layer: SparseConv1x1 16->16, 64 pixels, 90% zeros",
        setup=partial(kernel, 16, 16, 8, 0.9, True),
        ours=partial(call, "aligned_layer", "placed"),
        peers={"kernel alone": lambda s: s.run(), "conv2d": partial(call, "conv", "x")},
        gate=partial(same, partial(call, "aligned_layer", "placed"), partial(call, "conv", "x")),
        threads=(1,),
    ),
    *(
        Case(
            name=f"SparseConv1x1 {channels}->{channels}, {side * side} pixels, 90% zeros, the whole layer",
            setup=partial(kernel, channels, channels, side, 0.9, True),
            ours=partial(call, "aligned_layer", "placed"),
            peers={"fastest dense": fastest_dense},
            gate=partial(same, partial(call, "aligned_layer", "placed"), partial(call, "conv", "x")),
        )
        for channels, side in ((128, 14), (512, 8), (256, 28))
    ),
    *(
        Case(
            name=f"SparseLinear 512x512, {tokens} tokens, 90% zeros",
            setup=partial(linear, tokens, 512, 0.9),
            ours=partial(call, "ours", "x"),
            peers={"fp32": partial(call, "dense", "x"), "bf16": partial(call, "half", "half_x")},
            gate=partial(same, partial(call, "ours", "x"), partial(call, "dense", "x")),
        )
        for tokens in (64, 1024)
    ),
    *(
        Case(
            name=f"DepthwiseConv2d {channels} channels, {side}x{side}, {size}x{size}, stride {stride}",
            setup=partial(depthwise, channels, side, size, stride),
            ours=partial(call, "ours", "placed"),
            peers={"fastest dense": fastest_depthwise},
            gate=partial(same, partial(call, "ours", "placed"), partial(call, "conv", "x")),
        )
        for channels, side, size, stride in ((128, 28, 3, 1), (256, 14, 5, 1), (64, 56, 3, 2))
    ),
    *(
        Case(
            name=f"depthwise-separable network, 90% zeros, batch {batch}",
            setup=partial(mobile_net, batch),
            ours=partial(call, "ours", "x"),
            peers={
                "fastest dense": fastest_network,
                "compiled": compiled,
                "bf16": partial(call, "half", "half_x"),
            },
            gate=partial(same, partial(call, "ours", "x"), partial(call, "dense", "x")),
            target={"fastest dense": 1.8},
            rounds=20,
        )
        for batch in (1, 8)
    ),
]
