"""InceptionNeXt: the split convolution against depthwise ones, alone, in training, and in a whole network.

Depthwise convolutions of torch run in channels_last, their best layout; the same one in NCHW is shown beside.  In a
whole network most of the time goes into the perceptrons, which are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._machine import DRAM_BYTES, FLOAT32_OPS
from benchmarks._runner import Case
from quernel.models import MetaNeXt, inceptionnext_atto
from quernel.nn import InceptionDWConv2d

LAST = torch.channels_last
# float32 sums of up to 121 products in another order; gradients are sums over all pixels.
CLOSE, GRADIENTS = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-3, "atol": 1e-2}
DENSE = "7x7 depthwise, channels_last"


def depthwise(channels: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)


def setup(batch: int, channels: int, side: int) -> SimpleNamespace:
    torch.manual_seed(0)
    x = torch.randn(batch, side, side, channels)
    ours, grad = InceptionDWConv2d(channels), torch.randn_like(x)
    return SimpleNamespace(
        x=x,
        first=x.permute(0, 3, 1, 2).contiguous(),
        last=x.permute(0, 3, 1, 2),
        grad=grad,
        grad_planes=grad.permute(0, 3, 1, 2).contiguous(),
        ours=ours,
        single=ours.to_depthwise(),
        dense=depthwise(channels, 7).to(memory_format=LAST),
        dense_first=depthwise(channels, 7),
        large=depthwise(channels, 11).to(memory_format=LAST),
    )


def branches(s: SimpleNamespace) -> Tensor:
    """The same by torch's convolutions, cut out and put together."""
    g = s.ours.group
    parts = s.last.split([s.ours.dim - 3 * g, g, g, g], dim=1)
    return torch.cat([parts[0], s.ours.dwconv_hw(parts[1]), s.ours.dwconv_w(parts[2]), s.ours.dwconv_h(parts[3])], 1)


def inferred(call: Callable[[SimpleNamespace], Tensor], s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return call(s)


def trained(call: Callable[[SimpleNamespace], Tensor], name: str, grad: str, s: SimpleNamespace) -> None:
    """Forward and backward by the input and all parameters."""
    held = SimpleNamespace(**vars(s))
    setattr(held, name, getattr(s, name).detach().requires_grad_())
    call(held).backward({"last": s.grad, "first": s.grad.permute(0, 3, 1, 2), "planes": s.grad_planes}[grad])


def is_one_convolution(s: SimpleNamespace) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(s.ours(s.x).permute(0, 3, 1, 2), s.single(s.last), **CLOSE)
    leaves = [s.x.detach().requires_grad_() for _ in range(2)]
    s.ours(leaves[0]).backward(s.grad)
    parameters = [p.grad.clone() for p in s.ours.parameters()]
    s.ours.zero_grad()
    branches(SimpleNamespace(ours=s.ours, last=leaves[1].permute(0, 3, 1, 2))).backward(s.grad.permute(0, 3, 1, 2))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **CLOSE)
    for got, parameter in zip(parameters, s.ours.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


def moved(activations: int, s: SimpleNamespace, threads: int) -> float:
    return activations * s.x.nbytes / DRAM_BYTES / threads * 1e3


def network(batch: int, side: int) -> SimpleNamespace:
    torch.manual_seed(0)
    ours = inceptionnext_atto(ls_init=1.0)
    config: dict[str, Any] = {k: v for k, v in ours.config().items() if k not in ("mixers", "fused")}
    dense = MetaNeXt(mixers=lambda dim: depthwise(dim, 7), **config)
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=LAST)
    nets = {name: net.to(memory_format=LAST) for name, net in (("ours", ours), ("dense", dense))}
    fused = {f"{name}_fused": net.eval().fuse() for name, net in nets.items()}
    return SimpleNamespace(x=x, **nets, **fused)


def step(name: str, s: SimpleNamespace) -> None:
    getattr(s, name).train()(s.x).square().mean().backward()


def forward(name: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, name)(s.x)


def is_the_network(s: SimpleNamespace) -> None:
    s.ours.eval()
    torch.testing.assert_close(forward("ours_fused", s), forward("ours", s), rtol=1e-3, atol=1e-3)


def network_bound(times: int, s: SimpleNamespace, threads: int) -> float:
    """Multiply-adds of the convolutions and linear layers, forward (1) or forward and backward (3)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        s.ours_fused(s.x)
    return times * counter.get_total_flops() / FLOAT32_OPS / threads * 1e3


PEERS: dict[str, tuple[Callable[[SimpleNamespace], Tensor], str, str]] = {
    DENSE: (lambda s: s.dense(s.last), "last", "first"),
    "torch convolutions and a concatenation": (branches, "last", "first"),
    "11x11 depthwise, channels_last": (lambda s: s.large(s.last), "last", "first"),
    "7x7 depthwise, NCHW": (lambda s: s.dense_first(s.first), "first", "planes"),
}
SIZES = ((8, 96, 56), (1, 96, 56), (1, 384, 14))
CASES = [
    *(
        Case(
            name=f"token mixer, {batch} x {channels} x {side} x {side}",
            setup=partial(setup, batch, channels, side),
            ours=partial(inferred, lambda s: s.ours(s.x)),
            peers={name: partial(inferred, call) for name, (call, _, _) in PEERS.items()},
            gate=is_one_convolution,
            target={DENSE: 1.4} if (batch, side) == (8, 56) else {},
            bound_ms=partial(moved, 2),
            bound="x read and y written at 34 GB/s a core",
            rounds=25,
        )
        for batch, channels, side in SIZES
    ),
    *(
        Case(
            name=f"token mixer, forward and backward, {batch} x {channels} x {side} x {side}",
            setup=partial(setup, batch, channels, side),
            ours=partial(trained, lambda s: s.ours(s.x), "x", "last"),
            peers={name: partial(trained, *peer) for name, peer in PEERS.items() if not name.startswith("11")},
            gate=is_one_convolution,
            target={DENSE: 3.5} if (batch, side) == (8, 56) else {},
            bound_ms=partial(moved, 6),
            bound="six activations read or written at 34 GB/s a core",
        )
        for batch, channels, side in SIZES[:2]
    ),
    Case(
        name="inceptionnext_atto, training step, 4 images of 224 x 224",
        setup=partial(network, 4, 224),
        ours=partial(step, "ours"),
        peers={DENSE: partial(step, "dense")},
        gate=is_the_network,
        target={DENSE: 1.3},
        bound_ms=partial(network_bound, 3),
        bound="multiply-adds at 94 Gflop/s a core, three times",
    ),
    Case(
        name="inceptionnext_atto fused, inference, 1 image of 224 x 224",
        setup=partial(network, 1, 224),
        ours=partial(forward, "ours_fused"),
        peers={DENSE: partial(forward, "dense_fused"), "not fused": partial(forward, "ours")},
        gate=is_the_network,
        bound_ms=partial(network_bound, 1),
        bound="multiply-adds at 94 Gflop/s a core",
    ),
]
