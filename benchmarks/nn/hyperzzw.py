"""Global mixing by generated kernels: products of maps, against attention and a convolution as large as the map.

The product of H x W maps costs 2 C H W^2 operations an image, in batched matrix products; generating the kernel is left
out in eval mode, where it is kept.  How near that comes to the peak of matrix products is measured against one large
product of as many operations, interleaved; the target is 45 % of it at 32 x 32 and batch 32.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks._runner import Case
from quernel.nn import HyperZZWGlobal, SoftmaxAttention

FLOPS = 94e9
CHANNELS = 64
# Products of 32 maps of 32 x 32 in as many operations as one of two PEAK x PEAK matrices.
PEAK, BATCHES = 1024, 16


def setup(side: int, batch: int) -> SimpleNamespace:
    torch.manual_seed(0)
    x = torch.randn(batch, side, side, CHANNELS)
    made = SimpleNamespace(x=x, side=side, batch=batch, z=x.movedim(-1, 1).contiguous())
    made.ours = HyperZZWGlobal(CHANNELS, side).eval()
    made.elementwise = HyperZZWGlobal(CHANNELS, side, "hadamard").eval()
    made.attention = SoftmaxAttention(CHANNELS, 4).eval()
    made.kernel = torch.randn(1, CHANNELS, side, side)
    return made


def mixed(name: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, name)(s.x)


@torch.no_grad()
def product(s: SimpleNamespace) -> Tensor:
    """The operation alone, in the layout that products want."""
    return (s.z * s.ours.kernel()) @ s.z


@torch.inference_mode()
def bare(s: SimpleNamespace) -> Tensor:
    return s.z @ s.z


@torch.inference_mode()
def convolved(s: SimpleNamespace) -> Tensor:
    """A depthwise convolution with kernels as large as the map, by FFT."""
    sizes = (2 * s.side, 2 * s.side)
    return torch.fft.irfft2(torch.fft.rfft2(s.z, sizes) * torch.fft.rfft2(s.kernel, sizes), sizes)[
        ..., : s.side, : s.side
    ]


@torch.no_grad()
def kept(s: SimpleNamespace) -> Tensor:
    return s.ours.kernel()


@torch.no_grad()
def generated(s: SimpleNamespace) -> Tensor:
    return s.ours.slow()


@torch.no_grad()
def repeated(s: SimpleNamespace) -> Tensor:
    for _ in range(BATCHES):
        y = product(s)
    return y


def setup_peak() -> SimpleNamespace:
    made = setup(32, 32)
    made.left, made.right = torch.randn(PEAK, PEAK), torch.randn(PEAK, PEAK)
    return made


@torch.inference_mode()
def peak(s: SimpleNamespace) -> Tensor:
    return s.left @ s.right


def is_as_much_work(s: SimpleNamespace) -> None:
    is_the_definition(s)
    if BATCHES * s.batch * CHANNELS * s.side**3 != PEAK**3:
        raise ValueError("the large product has another number of operations")


@torch.no_grad()
def is_the_definition(s: SimpleNamespace) -> None:
    z = s.z[:1]
    wanted = torch.einsum("bcit,bctj->bcij", z * generated(s), z)
    torch.testing.assert_close(product(s)[:1], wanted, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(s.ours(s.x)[:1].movedim(-1, 1), wanted, rtol=1e-3, atol=1e-2)
    if not torch.equal(kept(s), generated(s)):
        raise ValueError("the kernel that is kept is not the generated one")


def bound(s: SimpleNamespace, threads: int) -> float:
    return 2 * s.batch * CHANNELS * s.side**3 / FLOPS / threads * 1e3


BOUND = "multiply-adds at 94 GFLOP/s a core"
CASES = [
    *(
        Case(
            name=f"products of {side} x {side} maps, {CHANNELS} channels, batch {batch}",
            setup=partial(setup, side, batch),
            ours=product,
            peers={
                "bare batched product": bare,
                "elementwise": partial(mixed, "elementwise"),
                "FFT convolution as large as the map": convolved,
            },
            gate=is_the_definition,
            bound_ms=bound,
            bound=BOUND,
        )
        for side, batch in ((32, 32), (14, 32))
    ),
    Case(
        name=f"{BATCHES} times products of 32 x 32 maps, {CHANNELS} channels, batch 32",
        setup=setup_peak,
        ours=repeated,
        peers={f"peak: one product of {PEAK} x {PEAK} matrices": peak},
        gate=is_as_much_work,
        target={f"peak: one product of {PEAK} x {PEAK} matrices": 0.45},
        bound_ms=lambda s, threads: BATCHES * bound(s, threads),
        bound=BOUND,
    ),
    Case(
        name=f"the mixer against attention, 1024 tokens, {CHANNELS} channels, batch 8",
        setup=partial(setup, 32, 8),
        ours=partial(mixed, "ours"),
        peers={"softmax attention, 4 heads": partial(mixed, "attention")},
        gate=is_the_definition,
        target={"softmax attention, 4 heads": 5.0},
        bound_ms=bound,
        bound=BOUND,
    ),
    Case(
        name="the kernel of 32 x 32 in eval mode",
        setup=partial(setup, 32, 1),
        ours=kept,
        peers={"generated again": generated},
        gate=is_the_definition,
        target={"generated again": 5.0},
    ),
]
