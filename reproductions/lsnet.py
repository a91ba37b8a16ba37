"""Reproduce LSNet (arXiv 2503.23135) on a laptop: ``LSConv`` against depthwise convolutions in the same network.

An LSNet of three stages on Fashion-MNIST at 32 x 32; every second block mixes by ``LSConv``, or by BN(DW(x)) + x with
3x3 or 7x7 taps, or by a small aggregation whose weights are parameters, the same everywhere: no perception.  Every arm
predicts the same test images, so that differences are paired.
"""

from __future__ import annotations

import functools
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, at_least
from torch import Tensor, nn

from quernel.kernels.statistics import paired_bootstrap
from quernel.models import LSNet
from quernel.nn import LSConv
from quernel.nn.conv.large_small import ConvNorm

lsnet = Reproduction("lsnet", paper="2503.23135")

DIMS, DEPTHS, SIDE, STRIDE = (32, 64, 128), (2, 2, 2), 32, 2
IMAGES, EPOCHS = 10_000, 4
STEPS = EPOCHS * IMAGES // nets.BATCH
SEEDS = (0, 1)
# Two standard errors of a paired difference on 10,000 images: closer is a match within noise.
NOISE = 0.5
OURS, SMALL, LARGE, CONSTANT = "LSConv", "3x3 depthwise", "7x7 depthwise", "constant weights"
SCALE = (
    f"LSNet of {DIMS} channels and {DEPTHS} blocks, {IMAGES:,} images of {SIDE} x {SIDE}, stem of stride {STRIDE}, "
    f"{EPOCHS} epochs"
)

photos = functools.partial(nets.images, side=SIDE)


class Depthwise(nn.Module):
    """BN(DW(x)) + x."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, size, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Filter and add the input."""
        return self.conv(x) + x


class ConstantAggregation(nn.Module):
    """``LSConv`` whose weights do not look at the image: one filter for each set of channels c mod (C / 8)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        made = LSConv(dim)
        self.weight = nn.Parameter(torch.randn(made.lkp.sets, 1, 3, 3) / 3)
        self.bn = made.bn

    def forward(self, x: Tensor) -> Tensor:
        """Filter every place alike and add the input."""
        kernel = self.weight.repeat(x.shape[1] // len(self.weight), 1, 1, 1)
        return self.bn(nn.functional.conv2d(x, kernel, padding=1, groups=x.shape[1])) + x


def net(kind: str) -> LSNet:
    mixer: Any = {
        OURS: None,
        SMALL: lambda dim: Depthwise(dim, 3),
        LARGE: lambda dim: Depthwise(dim, 7),
        CONSTANT: ConstantAggregation,
    }[kind]
    model = LSNet(SIDE, DIMS, DEPTHS, (1, 1, 1), 10, STRIDE, in_channels=1, mixer=mixer)
    return model.to(memory_format=torch.channels_last)


@functools.cache
def trained(kind: str, rate: float, seed: int) -> nn.Module:
    x, y = nets.images("train", IMAGES, SIDE)
    return nets.fitted(lambda: net(kind), nets.image_loss(x, y), steps=STEPS, rate=rate, seed=seed)


@torch.no_grad()
def hits(model: nn.Module) -> Tensor:
    """Return which test images are classified rightly."""
    x, y = nets.images("test", None, SIDE)
    return torch.cat([model(part).argmax(1) for part in x.split(250)]) == y


@functools.cache
def measured(kind: str, seed: int) -> dict[str, Any]:
    recipe = {"version": 1, "scale": SCALE, "kind": kind, "seed": seed}

    def measure() -> dict[str, Any]:
        rate = nets.chosen_rate(trained, kind, SEEDS[0], photos)
        right = hits(trained(kind, rate, seed))
        wrong = (~right).nonzero().flatten().tolist()
        return {"rate": rate, "accuracy": 100 * float(right.double().mean()), "wrong": wrong, "images": len(right)}

    return nets.kept("lsnet", recipe, measure)


def row(kind: str, seed: int) -> dict[str, Any]:
    found = measured(kind, seed)
    return {"mixer of every second block": kind, "accuracy (%)": found["accuracy"], "rate": found["rate"]}


def compared(kind: str, seed: int) -> Outcome:
    """Compare with another mixer, image by image."""
    ours, other = (measured(k, seed) for k in (OURS, kind))
    scores = []
    for found in (ours, other):
        right = torch.full((found["images"],), 100.0)
        right[found["wrong"]] = 0.0
        scores.append(right.numpy())
    difference = paired_bootstrap(*scores)
    note = f"{OURS} - {kind}: {difference.estimate:+.2f} points, 95 % [{difference.low:+.2f}, {difference.high:+.2f}]"
    return Outcome(ours["accuracy"], other["accuracy"], rows=[row(k, seed) for k in (OURS, kind)], notes=[note])


COMMON: dict[str, Any] = {"scale": SCALE, "data": "Fashion-MNIST", "metric": "test accuracy (%)", "seeds": SEEDS}


@lsnet.claim(
    name="small",
    claim="Seeing large and focusing small is more accurate than a 3x3 depthwise convolution",
    baseline=SMALL,
    rule=at_least(0.5, of="ours - baseline", partly=-NOISE),
    **COMMON,
)
def small(seed: int) -> Outcome:
    return compared(SMALL, seed)


@lsnet.claim(
    name="large",
    claim="Seeing large and focusing small is more accurate than a 7x7 depthwise convolution",
    baseline=LARGE,
    rule=at_least(0.5, of="ours - baseline", partly=-NOISE),
    **COMMON,
)
def large(seed: int) -> Outcome:
    return compared(LARGE, seed)


@lsnet.claim(
    name="perception",
    claim="Weights that look at the neighbourhood are what the accuracy comes from",
    baseline=CONSTANT,
    rule=at_least(0.5, of="ours - baseline"),
    **COMMON,
)
def perception(seed: int) -> Outcome:
    return compared(CONSTANT, seed)


if __name__ == "__main__":
    raise SystemExit(lsnet.main())
