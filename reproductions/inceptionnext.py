"""Reproduce InceptionNeXt (arXiv 2303.16900) on a laptop: accuracy and training time of the split convolution.

MetaNeXt on Fashion-MNIST; only the token mixer differs: the split convolution, a 7x7 depthwise one, a 3x3 one on the
channels of one branch alone (what is left without bands), and the split one without either band.
"""

from __future__ import annotations

import functools
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, Void, at_least, at_most
from torch import nn
from torch.nn import functional as F

from quernel._timing import paired_ratios, threads
from quernel.models import MetaNeXt
from quernel.nn import InceptionDWConv2d

inceptionnext = Reproduction("inceptionnext", paper="2303.16900")

DIMS, DEPTHS, STRIDE = (32, 64, 128), (2, 2, 2), 2
IMAGES, EPOCHS = 10_000, 4
STEPS = EPOCHS * IMAGES // nets.BATCH
SEEDS = (0, 1)
OURS, DENSE, SQUARE = "split convolution", "7x7 depthwise", "3x3 on an eighth of the channels"
BRANCHES = {SQUARE: ("hw",), "without the wide band": ("hw", "h"), "without the high band": ("hw", "w")}
SCALE = f"MetaNeXt of {DIMS} channels and {DEPTHS} blocks, {IMAGES:,} images of 28 x 28, stem of stride {STRIDE}"


def net(kind: str) -> MetaNeXt:
    """Return an untrained network; convolutions run in their fastest layout, channels last."""

    def mixer(dim: int) -> nn.Module:
        if kind == DENSE:
            return nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        return InceptionDWConv2d(dim, branches=BRANCHES.get(kind))

    model = MetaNeXt(DEPTHS, DIMS, mixer, stem_stride=STRIDE, in_channels=1, num_classes=10)
    return model.to(memory_format=torch.channels_last)


@functools.cache
def trained(kind: str, rate: float, seed: int) -> nn.Module:
    x, y = nets.images("train", IMAGES)
    return nets.fitted(lambda: net(kind), nets.image_loss(x, y), steps=STEPS, rate=rate, seed=seed)


@functools.cache
def measured(kind: str, seed: int) -> dict[str, float]:
    recipe = {"version": 1, "scale": SCALE, "epochs": EPOCHS, "kind": kind, "seed": seed}

    def measure() -> dict[str, float]:
        rate = nets.chosen_rate(trained, kind, SEEDS[0])
        return {"rate": rate, "accuracy": nets.accuracy(trained(kind, rate, seed), *nets.images("test"))}

    return nets.kept("inceptionnext", recipe, measure)


def row(kind: str, seed: int) -> dict[str, Any]:
    found = measured(kind, seed)
    return {"token mixer": kind, "accuracy (%)": found["accuracy"], "rate": found["rate"]}


@inceptionnext.claim(
    name="accuracy",
    claim="A depthwise convolution split into a square and two bands is as accurate as a 7x7 one",
    scale=f"{SCALE}, {EPOCHS} epochs",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline=DENSE,
    rule=at_least(-1.0, of="ours - baseline"),
    checks=("at most 0.3 points below the 3x3 without bands",),
    seeds=SEEDS,
)
def accuracy(seed: int) -> Outcome:
    ours, dense, square = (measured(kind, seed)["accuracy"] for kind in (OURS, DENSE, SQUARE))
    checks = {"at most 0.3 points below the 3x3 without bands": ours >= square - 0.3}
    return Outcome(ours, dense, checks, [row(kind, seed) for kind in (OURS, DENSE, SQUARE)])


@inceptionnext.claim(
    name="bands",
    claim="The bands are what the accuracy comes from",
    scale=f"{SCALE}, {EPOCHS} epochs",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="3x3 on the same share of channels, no bands",
    rule=at_least(0.0, of="ours - baseline"),
    seeds=SEEDS,
)
def bands(seed: int) -> Outcome:
    rows = [row(kind, seed) for kind in (OURS, *BRANCHES)]
    return Outcome(measured(OURS, seed)["accuracy"], measured(SQUARE, seed)["accuracy"], rows=rows)


def step_of(kind: str) -> Any:
    """Return a callable that trains a network by one step."""
    x, y = nets.images("train", IMAGES)
    x, y = x[: nets.BATCH].contiguous(memory_format=torch.channels_last), y[: nets.BATCH]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@inceptionnext.claim(
    name="step-time",
    claim="It trains faster than with a 7x7 depthwise convolution",
    scale=f"{SCALE}, one step of {nets.BATCH} images on one thread, both in channels_last",
    data="Fashion-MNIST",
    metric="milliseconds a training step",
    baseline=DENSE,
    rule=at_most(0.7, of="ours / baseline"),
)
def step_time(seed: int) -> Outcome:
    with threads(1):
        found = paired_ratios(step_of(OURS), {DENSE: step_of(DENSE)}, rounds=15)[DENSE]
    if not found.valid:
        raise Void(found.void)
    return Outcome(found.ours_ms, found.peer_ms)


if __name__ == "__main__":
    raise SystemExit(inceptionnext.main())
