"""Factorised convolutions against dense ones: forward, and forward with backward, at the sizes of physics surrogates.

Ours is the layer as users have it, channels last, float32, with all it does on each call.  Dense peers run in both
memory formats, compiled where a compiler is there, and in bfloat16; the plain form of the same factors is torch's own
two convolutions.  Every thread count has a process of its own with the system's default memory settings: what an
intermediate image costs in page faults belongs to the result.  R = 2 and 4 have no target: the gain fades with R.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._runner import Case, Unavailable
from quernel.nn import FactorizedConv2d

# What this class of core reaches in float32 products with AVX-512.
FLOPS = 220e9
# float32 sums in another order, relative to the whole tensor.
RELATIVE_ERROR = 1e-5
LAST = torch.channels_last


def layers(batch: int, channels: int, size: int, kernel: int, rank: int, train: bool = False) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    ours = FactorizedConv2d(
        channels, channels, kernel, padding=kernel // 2, rank=rank, init="kaiming", generator=generator
    )
    dense = ours.to_conv()
    x = torch.randn(batch, channels, size, size, generator=generator)
    if not train:
        ours, dense = ours.eval().requires_grad_(False), dense.eval().requires_grad_(False)
    last = copy.deepcopy(dense).to(memory_format=LAST)
    return SimpleNamespace(
        ours=ours,
        dense=copy.deepcopy(dense),
        last=last,
        half=copy.deepcopy(last).bfloat16(),
        plain=copy.deepcopy(ours).fuse().to(memory_format=LAST),
        x=x.requires_grad_(train),
        x_last=x.detach().contiguous(memory_format=LAST).requires_grad_(train),
        x_half=x.detach().bfloat16().contiguous(memory_format=LAST),
        grad=torch.randn(batch, channels, size, size, generator=generator).contiguous(memory_format=LAST),
        flops=2 * batch * size**2 * channels * rank * (channels + kernel**2),
    )


def run(layer: str, x: str, state: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(state, layer)(getattr(state, x))


def compiled(state: SimpleNamespace) -> Tensor:
    if not hasattr(state, "compiled"):
        try:
            state.compiled = torch.compile(state.last, dynamic=False)
            run("compiled", "x_last", state)
        except Exception as error:  # no C++ compiler, or one that inductor cannot use
            raise Unavailable(f"torch.compile: {type(error).__name__}") from error
    return run("compiled", "x_last", state)


def step(layer: str, x: str, state: SimpleNamespace) -> tuple[Tensor, ...]:
    module: nn.Module = getattr(state, layer)
    source = getattr(state, x)
    return torch.autograd.grad(module(source), [source, *module.parameters()], state.grad)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def near_the_dense_layer(state: SimpleNamespace) -> bool:
    return relative(run("ours", "x_last", state), run("dense", "x", state)) < RELATIVE_ERROR


def near_the_gradients_through_the_dense_kernel(state: SimpleNamespace) -> bool:
    ours = state.ours
    leaves = [state.x, *ours.parameters()]
    y = torch.nn.functional.conv2d(state.x, ours.kernel(), ours.bias, padding=ours.padding)
    wanted = torch.autograd.grad(y, leaves, state.grad)
    # Gradients of weights are sums over a hundred thousand pixels.
    return all(relative(a, b) < 10 * RELATIVE_ERROR for a, b in zip(step("ours", "x_last", state), wanted, strict=True))


def bound(passes: int, state: SimpleNamespace, threads: int) -> float:
    return passes * state.flops / (FLOPS * threads) * 1e3


PEERS: dict[str, Callable[[Any], Any]] = {
    "dense channels last": partial(run, "last", "x_last"),
    "dense": partial(run, "dense", "x"),
    "dense compiled": compiled,
    "dense bf16": partial(run, "half", "x_half"),
    "two plain layers": partial(run, "plain", "x_last"),
}
TRAINING: dict[str, Callable[[Any], Any]] = {
    "dense channels last": partial(step, "last", "x_last"),
    "dense": partial(step, "dense", "x"),
    "two plain layers": partial(step, "plain", "x_last"),
}
# batch, channels, size, kernel, rank -> least ratio to the best dense form
FORWARD = {
    (4, 64, 64, 3, 1): 2.0,
    (8, 64, 64, 3, 1): 2.0,
    (4, 128, 32, 3, 1): 2.0,
    (8, 128, 32, 3, 1): 2.0,
    (4, 64, 64, 5, 1): 4.0,
    (4, 64, 64, 3, 2): None,
    (4, 64, 64, 3, 4): None,
}
BOTH = {(4, 64, 64, 3, 1): 1.5, (4, 128, 32, 3, 1): 1.5, (4, 64, 64, 5, 1): 1.5, (4, 64, 64, 3, 2): None}


def named(what: str, batch: int, channels: int, size: int, kernel: int, rank: int) -> str:
    return f"{what} {channels} channels, {size}x{size}, k={kernel}, R={rank}, batch {batch}"


def targets(least: float | None) -> dict[str, float]:
    return {} if least is None else {"dense channels last": least, "dense": least}


CASES = [
    *(
        Case(
            name=named("forward", *shape),
            setup=partial(layers, *shape),
            ours=partial(run, "ours", "x_last"),
            peers=PEERS,
            gate=near_the_dense_layer,
            target=targets(least) | ({} if least is None else {"dense compiled": least}),
            bound_ms=partial(bound, 1),
            bound="multiply-adds of both steps at 220 Gflop/s a core",
            fresh=True,
        )
        for shape, least in FORWARD.items()
    ),
    *(
        Case(
            name=named("forward and backward", *shape),
            setup=partial(layers, *shape, train=True),
            ours=partial(step, "ours", "x_last"),
            peers=TRAINING,
            gate=near_the_gradients_through_the_dense_kernel,
            target=targets(least),
            # The product of the first step runs four times: forward, again, and for two gradients.
            bound_ms=partial(bound, 4),
            bound="multiply-adds of both steps, four times, at 220 Gflop/s a core",
            fresh=True,
        )
        for shape, least in BOTH.items()
    ),
]
