"""LSNet: filters that differ from place to place, against unfolding and plain convolutions; the whole LSNet-T.

The weights of every place are read once, 9/8 of an activation: the speed of a 3x3 depthwise convolution, which reads
nine numbers a channel in all, is out of reach where memory is what costs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._machine import DRAM_BYTES, FLOAT32_OPS, L3_BYTES
from benchmarks._runner import Case, Unavailable
from quernel.models import lsnet_t
from quernel.nn import replace_modules
from quernel.nn.conv.large_small import ConvNorm
from quernel.nn.functional import ska

LAST = torch.channels_last
# float32 sums of nine products in another order; gradients are sums of up to nine and eight.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
UNFOLD = "unfold and sum"
# Activations that stay in the shared cache.
CACHE_SIZE = 2**23


def setup(batch: int, channels: int, side: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator)
    w = torch.randn(batch, channels // 8, 9, side, side, generator=generator)
    return SimpleNamespace(
        x=x,
        w=w,
        x_last=x.contiguous(memory_format=LAST),
        w_last=w.flatten(1, 2).contiguous(memory_format=LAST).unflatten(1, (channels // 8, 9)),
        grad=torch.randn(x.shape, generator=generator),
        grad_last=torch.randn(x.shape, generator=generator).contiguous(memory_format=LAST),
        depthwise=nn.Conv2d(channels, channels, 3, padding=1, groups=channels).to(memory_format=LAST),
    )


def columns(x: Tensor, sets: int) -> Tensor:
    batch, channels, *sizes = x.shape
    return F.unfold(x, 3, padding=1).view(batch, channels // sets, sets, 9, *sizes)


def unfolded(x: Tensor, w: Tensor) -> Tensor:
    return (columns(x, w.shape[1]) * w[:, None]).sum(3).view(x.shape)


def contracted(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("brgthw,bgthw->brghw", columns(x, w.shape[1]), w).reshape(x.shape)


def inferred(call: Callable[[Tensor, Tensor], Tensor], last: bool, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return call(s.x_last, s.w_last) if last else call(s.x, s.w)


def trained(call: Callable[[Tensor, Tensor], Tensor], last: bool, s: SimpleNamespace) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in ((s.x_last, s.w_last) if last else (s.x, s.w))]
    return list(torch.autograd.grad(call(*leaves), leaves, s.grad_last if last else s.grad))


def is_unfolding(s: SimpleNamespace) -> None:
    wanted = inferred(unfolded, False, s)
    for last in (False, True):
        torch.testing.assert_close(inferred(ska, last, s), wanted, **CLOSE)
        for got, want in zip(trained(ska, last, s), trained(unfolded, last, s), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


def moved(activations: float, s: SimpleNamespace, threads: int) -> float:
    speed = L3_BYTES if s.x.nbytes <= CACHE_SIZE else DRAM_BYTES
    return activations * s.x.nbytes / speed / threads * 1e3


class Depthwise(nn.Module):
    """BN(7x7 depthwise) + x, in the place of ``LSConv``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 7, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x

    def folded(self) -> nn.Conv2d:
        """Return the one convolution, the residual in its centre tap."""
        conv = self.conv.folded()
        with torch.no_grad():
            conv.weight[:, :, 3, 3] += 1.0
        return conv


def network() -> SimpleNamespace:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {"whole": lsnet_t().eval()}
    made["ours"] = made["whole"].reparameterize()  # type: ignore[operator]
    made["dense_whole"] = lsnet_t(mixer=Depthwise).eval()
    made["dense"] = made["dense_whole"].reparameterize()  # type: ignore[operator]
    replace_modules(made["dense"], Depthwise, lambda old: old.folded())
    nets = {name: net.to(memory_format=LAST) for name, net in made.items()}
    return SimpleNamespace(x=torch.randn(1, 3, 224, 224).contiguous(memory_format=LAST), timm={}, **nets)


def forward(name: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, name)(s.x)


def timm_net(name: str, s: SimpleNamespace) -> Tensor:
    """Run a network of timm, untrained."""
    if name not in s.timm:
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # timm needs a torchvision that fits this torch
            raise Unavailable(f"timm cannot be imported: {error}") from error
        s.timm[name] = timm.create_model(name).eval().to(memory_format=LAST)
    with torch.inference_mode():
        return s.timm[name](s.x)


def is_the_network(s: SimpleNamespace) -> None:
    for name, whole in (("ours", "whole"), ("dense", "dense_whole")):
        torch.testing.assert_close(forward(name, s), forward(whole, s), rtol=1e-3, atol=1e-3)


def network_bound(s: SimpleNamespace, threads: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        s.ours(s.x)
    return counter.get_total_flops() / FLOAT32_OPS / threads * 1e3


OPERATIONS: dict[str, Any] = {
    UNFOLD: unfolded,
    "unfold and einsum": contracted,
    "shifted products": partial(ska, backend="torch"),
}
# (batch, channels, side) and what is wanted over unfolding.
SIZES = (((8, 64, 28), 4.0), ((8, 128, 14), None), ((8, 96, 56), 6.0))
DENSE = "7x7 depthwise mixers"


def convolved(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.depthwise(s.x_last)


CASES = [
    *(
        Case(
            name=f"{'channels_last, ' if last else ''}{batch} x {channels} x {side} x {side}",
            setup=partial(setup, batch, channels, side),
            ours=partial(inferred, ska, last),
            peers={
                **{name: partial(inferred, call, False) for name, call in OPERATIONS.items()},
                "3x3 depthwise, the same everywhere": convolved,
            },
            gate=is_unfolding,
            target={} if least is None else {UNFOLD: least},
            bound_ms=partial(moved, 2 + 9 / 8),
            bound="x, y and weights at 97 (cache) or 34 (memory) GB/s a core",
        )
        for (batch, channels, side), least in SIZES
        for last in (False, True)
    ),
    *(
        Case(
            name=f"forward and backward, {'channels_last, ' if last else ''}{batch} x {channels} x {side} x {side}",
            setup=partial(setup, batch, channels, side),
            ours=partial(trained, ska, last),
            peers={name: partial(trained, call, False) for name, call in OPERATIONS.items() if "einsum" not in name},
            gate=is_unfolding,
            target={UNFOLD: 3.0},
            bound_ms=partial(moved, 6 + 3 * 9 / 8),
            bound="activations and weights three times at 97 (cache) or 34 (memory) GB/s a core",
        )
        for (batch, channels, side), _ in SIZES
        for last in (False, True)
    ),
    Case(
        name="LSNet-T reparameterised, 1 image of 224 x 224",
        setup=network,
        ours=partial(forward, "ours"),
        peers={
            DENSE: partial(forward, "dense"),
            "not reparameterised": partial(forward, "whole"),
            "timm efficientvit_m5": partial(timm_net, "efficientvit_m5"),
            "timm mobilenetv3_large_100": partial(timm_net, "mobilenetv3_large_100"),
        },
        gate=is_the_network,
        target={DENSE: 1 / 1.15},
        bound_ms=network_bound,
        bound="multiply-adds at 94 Gflop/s a core",
    ),
]
