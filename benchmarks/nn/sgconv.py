"""SGConv: building its kernels, the layer against its plain expression, attention, and a million tokens.

Kernels are built by interpolating few parameters: the floor is writing them once.  In eval mode their spectrum is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._runner import Case
from quernel.nn import MultiScaleKernel, SGConv, SoftmaxAttention
from quernel.nn.functional import fft_conv

BYTES = 34e9
REFERENCE, CONVOLUTION, ATTENTION = "kernel, rfft of everything, 2L", "the convolution", "scaled_dot_product_attention"


def expression(layer: SGConv, x: Tensor) -> Tensor:
    """The layer as it is usually written: segments, transforms of everything, a projection."""
    length, kernel = x.shape[1], layer.filters
    scale = 0.5 ** torch.arange(len(kernel.weights))
    parts = [
        a * F.interpolate(w, scale_factor=float(1 << max(0, i - 1)), mode="linear")
        for i, (a, w) in enumerate(zip(scale, kernel.weights, strict=True))
    ]
    k = (torch.cat(parts, -1) / kernel.norm)[..., :length]
    u = x.transpose(1, 2)
    n = 2 * length
    y = (
        torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k[0], n=n), n=n)[..., :length]
        + layer.skip[0][:, None] * u
    )
    out: Tensor = layer.out(F.gelu(y.transpose(1, 2)))
    return out


def layer_setup(batch: int, channels: int, length: int) -> SimpleNamespace:
    torch.manual_seed(0)
    layer, x = SGConv(channels, length).eval(), torch.randn(batch, length, channels)
    return SimpleNamespace(layer=layer, x=x, leaf=x.clone().requires_grad_(), g=torch.randn_like(x))


def trained(call: Callable[[nn.Module, Tensor], Tensor], s: SimpleNamespace) -> None:
    s.layer.zero_grad()
    s.leaf.grad = None
    call(s.layer, s.leaf).backward(s.g)


def called(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


@torch.inference_mode()
def inferred(call: Callable[[nn.Module, Tensor], Tensor], s: SimpleNamespace) -> Tensor:
    return call(s.layer, s.x)


def equals_expression(s: SimpleNamespace) -> None:
    torch.testing.assert_close(inferred(called, s), inferred(expression, s), rtol=1e-3, atol=1e-4)


def gradients_too(s: SimpleNamespace) -> None:
    equals_expression(s)
    trained(called, s)
    found = [s.leaf.grad, *(p.grad.clone() for p in s.layer.parameters())]
    trained(expression, s)
    for got, wanted in zip(found, [s.leaf.grad, *(p.grad for p in s.layer.parameters())], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


def kernel_setup() -> SimpleNamespace:
    torch.manual_seed(0)
    kernel, u = MultiScaleKernel(256, 65536), torch.randn(1, 256, 65536)
    with torch.no_grad():
        return SimpleNamespace(kernel=kernel, u=u, k=kernel()[0])


def unit_kernels(s: SimpleNamespace) -> None:
    torch.testing.assert_close(s.k.norm(dim=-1), torch.ones(256), rtol=1e-4, atol=0)


@torch.inference_mode()
def built(s: SimpleNamespace) -> Tensor:
    k: Tensor = s.kernel()
    return k


@torch.inference_mode()
def convolved(s: SimpleNamespace) -> Tensor:
    return fft_conv(s.u, s.k)


def attention_setup() -> SimpleNamespace:
    s = layer_setup(1, 512, 4096)
    s.q, s.k, s.v = torch.randn(3, 1, 8, 4096, 64)
    s.attention = SoftmaxAttention(512, 8).eval()
    return s


@torch.inference_mode()
def softmax(s: SimpleNamespace) -> Tensor:
    return F.scaled_dot_product_attention(s.q, s.k, s.v)


@torch.inference_mode()
def convolution_of_layer(s: SimpleNamespace) -> Tensor:
    y: Tensor = s.layer._convolved(s.x.transpose(1, 2))
    return y


@torch.inference_mode()
def attended(s: SimpleNamespace) -> Tensor:
    y: Tensor = s.attention(s.x)
    return y


def io_bound(s: SimpleNamespace, threads: int) -> float:
    return 2 * s.x.numel() * 4 / BYTES / threads * 1e3


BOUND = "input and output once, 34 GB/s a core"
CASES = [
    Case(
        name="building kernels, 256 channels x 65536 taps",
        setup=kernel_setup,
        ours=built,
        peers={CONVOLUTION: convolved},
        gate=unit_kernels,
        target={CONVOLUTION: 5.0},
        bound_ms=lambda s, threads: s.k.numel() * 4 / BYTES / threads * 1e3,
        bound="kernels written once, 34 GB/s a core",
    ),
    Case(
        name="forward and backward, 4 x 64 channels x 16384 tokens",
        setup=partial(layer_setup, 4, 64, 16384),
        ours=partial(trained, called),
        peers={REFERENCE: partial(trained, expression)},
        gate=gradients_too,
        target={REFERENCE: 1.5},
        bound_ms=lambda s, threads: 2 * io_bound(s, threads),
        bound=f"{BOUND}, forth and back",
    ),
    Case(
        name="inference, 4 x 64 channels x 16384 tokens",
        setup=partial(layer_setup, 4, 64, 16384),
        ours=partial(inferred, called),
        peers={REFERENCE: partial(inferred, expression)},
        gate=equals_expression,
        bound_ms=io_bound,
        bound=BOUND,
    ),
    Case(
        name="convolution of 512 channels against attention of 8 heads x 64, 4096 tokens",
        setup=attention_setup,
        ours=convolution_of_layer,
        peers={ATTENTION: softmax},
        gate=equals_expression,
        target={ATTENTION: 8.0},
        bound_ms=io_bound,
        bound=BOUND,
    ),
    Case(
        name="SGConv against SoftmaxAttention with their projections, 4096 tokens of 512 channels",
        setup=attention_setup,
        ours=partial(inferred, called),
        peers={"SoftmaxAttention": attended},
        gate=equals_expression,
        bound_ms=io_bound,
        bound=BOUND,
    ),
    Case(
        name="a million tokens, 16 channels",
        setup=partial(layer_setup, 1, 16, 1 << 20),
        ours=partial(inferred, called),
        peers={REFERENCE: partial(inferred, expression)},
        gate=equals_expression,
        bound_ms=io_bound,
        bound=BOUND,
    ),
]
