"""Long convolutions: ``fft_conv`` against one transform of everything, torch's convolution, and attention.

The naive expression pads, transforms, multiplies and goes back for all rows (a sample's channel each) at once: each
step streams all spectra through memory.  The floor counts 2.5 n log2 n operations for a real transform of n numbers,
forth and back for every row and once for every kernel, at the rate of fused multiply-adds; transforms reach a part.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._runner import Case
from quernel.nn import LongConv, SoftmaxAttention
from quernel.nn.functional import fft_conv, kernel_spectrum

FLOPS = 94e9
HEADS, SIZE = 8, 64
NAIVE, DIRECT, CACHED = "rfft of everything, 2L", "conv1d, full length", "kept kernel spectrum"


def setup(batch: int, channels: int, length: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    u, k = torch.randn(batch, channels, length, generator=generator), torch.randn(channels, length, generator=generator)
    g = torch.randn(batch, channels, length, generator=generator)
    leaves = u.clone().requires_grad_(), k.clone().requires_grad_()
    return SimpleNamespace(
        u=u, k=k, g=g, leaves=leaves, spectrum=kernel_spectrum(k, length), weight=k.flip(-1)[:, None]
    )


def expression(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]


@torch.inference_mode()
def ours(s: SimpleNamespace) -> Tensor:
    return fft_conv(s.u, s.k)


@torch.inference_mode()
def cached(s: SimpleNamespace) -> Tensor:
    return fft_conv(s.u, s.spectrum)


@torch.inference_mode()
def naive(s: SimpleNamespace) -> Tensor:
    return expression(s.u, s.k)


@torch.inference_mode()
def direct(s: SimpleNamespace) -> Tensor:
    length = s.u.shape[-1]
    return F.conv1d(F.pad(s.u, (length - 1, 0)), s.weight, groups=len(s.k))


def trained(convolve: object, s: SimpleNamespace) -> None:
    for leaf in s.leaves:
        leaf.grad = None
    convolve(*s.leaves).backward(s.g)  # type: ignore[operator]


def equals_float64(s: SimpleNamespace) -> None:
    wanted = expression(s.u.double(), s.k.double())
    limit = 2e-6 * float(s.k.abs().sum(-1).max() * s.u.abs().max())
    for got in (ours(s), cached(s)):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=limit)
    trained(fft_conv, s)
    found = [leaf.grad for leaf in s.leaves]
    trained(expression, s)
    for got, leaf in zip(found, s.leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-3, atol=1e-4 * float(leaf.grad.abs().max()))


def operations(batch: int, channels: int, length: int) -> float:
    n = 2 * length
    return (2 * batch + 1) * channels * 2.5 * n * math.log2(n)


def bound(s: SimpleNamespace, threads: int) -> float:
    return operations(*s.u.shape) / FLOPS / threads * 1e3


def odd_setup() -> SimpleNamespace:
    return SimpleNamespace(odd=setup(4, 64, 4093), even=setup(4, 64, 4096))


def odd_gate(s: SimpleNamespace) -> None:
    equals_float64(s.odd)
    equals_float64(s.even)


def attention_setup() -> SimpleNamespace:
    s, generator = setup(1, HEADS * SIZE, 4096), torch.Generator().manual_seed(1)
    s.q, s.key, s.v = (torch.randn(1, HEADS, 4096, SIZE, generator=generator) for _ in range(3))
    s.x = torch.randn(1, 4096, HEADS * SIZE, generator=generator)
    torch.manual_seed(0)
    s.mixer, s.attention = LongConv(HEADS * SIZE, 4096).eval(), SoftmaxAttention(HEADS * SIZE, HEADS).eval()
    return s


@torch.inference_mode()
def softmax(s: SimpleNamespace) -> Tensor:
    return F.scaled_dot_product_attention(s.q, s.key, s.v)


@torch.inference_mode()
def mixed(name: str, s: SimpleNamespace) -> Tensor:
    y: Tensor = getattr(s, name)(s.x)
    return y


BOUND = "2.5 n log2 n operations a transform, n = 2L, at 94 GFLOP/s a core"
CASES = [
    *(
        Case(
            name=f"fft_conv, {batch} x {channels} x {length}",
            setup=partial(setup, batch, channels, length),
            ours=ours,
            peers={NAIVE: naive, CACHED: cached},
            gate=equals_float64,
            target={NAIVE: 2.0 if length >= 16384 else 1.0},
            bound_ms=bound,
            bound=BOUND,
        )
        for batch, channels, length in ((4, 64, 256), (4, 64, 1021), (4, 64, 4096), (4, 64, 16384), (1, 64, 65536))
    ),
    *(
        Case(
            name=f"fft_conv against conv1d, 4 x 64 x {length}",
            setup=partial(setup, 4, 64, length),
            ours=ours,
            peers={DIRECT: direct, CACHED: cached},
            gate=equals_float64,
            target={DIRECT: 4.0 if length == 1024 else 20.0},
            bound_ms=bound,
            bound=BOUND,
        )
        for length in (1024, 4096)
    ),
    Case(
        name="forward and backward, 4 x 64 x 16384",
        setup=partial(setup, 4, 64, 16384),
        ours=partial(trained, fft_conv),
        peers={NAIVE: partial(trained, expression)},
        gate=equals_float64,
        target={NAIVE: 1.0},
        # There, and back, and the gradients: three products and seven transforms where forward has three.
        bound_ms=lambda s, threads: 3 * bound(s, threads),
        bound=BOUND,
    ),
    Case(
        name="odd length 4093 against 4096, 4 x 64",
        setup=odd_setup,
        ours=lambda s: ours(s.odd),
        peers={"length 4096": lambda s: ours(s.even)},
        gate=odd_gate,
        target={"length 4096": 1 / 1.3},
        bound_ms=lambda s, threads: bound(s.odd, threads),
        bound=BOUND,
    ),
    Case(
        name="convolution of 512 channels against attention of 8 heads x 64, 4096 tokens",
        setup=attention_setup,
        ours=cached,
        peers={"scaled_dot_product_attention": softmax},
        gate=equals_float64,
        target={"scaled_dot_product_attention": 10.0},
        bound_ms=bound,
        bound=BOUND,
    ),
    Case(
        name="LongConv against SoftmaxAttention with their projections, 4096 tokens of 512 channels",
        setup=attention_setup,
        ours=partial(mixed, "mixer"),
        peers={"SoftmaxAttention": partial(mixed, "attention")},
        gate=equals_float64,
        bound_ms=lambda s, threads: bound(s, threads) + 4 * 4096 * 512 * 512 / FLOPS / threads * 1e3,
        bound=f"{BOUND}, and the projection",
    ),
]
