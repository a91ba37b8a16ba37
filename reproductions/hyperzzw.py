"""Reproduce HyperZ.Z.W (arXiv 2401.17948) on a laptop: a Terminator of three blocks on Fashion-MNIST.

Images of 16 x 16, channels 3, 12, 24 (the pixels three times, as colours).  What is compared: the same net whose global
kernels are not modulated by the input, a plain convolutional net without residuals and of as many parameters, a small
residual net, and the optimisers of the paper and AdamW.  Every arm's rate is chosen from a grid of its own optimiser.
Two seeds of one arm differ by up to 0.7 points; the claims on the loss of slow nets and on the optimiser only ask which
median is higher, so that either verdict may be chance.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, at_least
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.models import Terminator
from quernel.train import Kar3

hyperzzw = Reproduction("hyperzzw", paper="2401.17948")

SIDE, IMAGES, EPOCHS, FACTORS = 16, 5000, 5, (4, 2, 2)
STEPS = EPOCHS * IMAGES // nets.BATCH
SEEDS = (0, 1)
SMOOTHING, SLOW = 0.09, 1.0
RATES = {"Kar3": (3e-4, 1e-3), "AdamW": (3e-3, 1e-2)}
SCALE = f"3 blocks of 3, 12 and 24 channels, {IMAGES:,} images of {SIDE} x {SIDE}, {EPOCHS} epochs"


def terminator(modulated: bool = True) -> Terminator:
    return Terminator(size=SIDE, factors=FACTORS, dropout=(0.0, 0.05, 0.05), modulated=modulated)


class _Residual(nn.Module):
    """x + conv-norm-GELU-conv-norm(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.layers(x))


class _Head(nn.Module):
    """Mean over places, then classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def plain(width: int, depth: int = 6) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.GELU()]
    return nn.Sequential(*layers, _Head(width))


def residual(width: int, depth: int = 3) -> nn.Sequential:
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU())
    return nn.Sequential(*stem, *(_Residual(width) for _ in range(depth)), _Head(width))


@functools.cache
def width_of(kind: str) -> int:
    """Return the width at which a convolutional net has as many parameters as the Terminator."""
    make, wanted = {"plain": plain, "residual": residual}[kind], parameters(terminator())
    return min(range(4, 200), key=lambda width: abs(parameters(make(width)) - wanted))


def make(kind: str) -> nn.Module:
    if kind in ("plain", "residual"):
        return {"plain": plain, "residual": residual}[kind](width_of(kind))
    return terminator(modulated=kind != "static")


@functools.cache
def images(split: str) -> tuple[Tensor, Tensor]:
    x, y = nets.images(split, IMAGES if split == "train" else None, SIDE)
    return x.expand(-1, 3, -1, -1), y


@functools.cache
def trained(kind: str, optimizer: str, slow: bool, rate: float, seed: int) -> tuple[nn.Module, tuple[float, ...]]:
    """Return a trained net and its losses step by step."""
    x, y = images("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(kind).train()
        generator = torch.Generator().manual_seed(seed)
        held: Any = Kar3(model.parameters(), rate) if optimizer == "Kar3" else torch.optim.AdamW(
            model.parameters(), rate, weight_decay=nets.WEIGHT_DECAY
        )  # fmt: skip
        losses = []
        for step in range(STEPS):
            for group in held.param_groups:
                group["lr"] = rate * min((step + 1) / (0.08 * STEPS), (1 + math.cos(math.pi * step / STEPS)) / 2)
            rows = torch.randint(len(x), (nets.BATCH,), generator=generator)
            held.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=SMOOTHING)
            losses.append(float(loss))
            if slow and isinstance(model, Terminator):
                loss = loss + SLOW * model.slow_loss()
            loss.backward()
            held.step()
    return model.eval(), tuple(losses)


@functools.cache
def chosen_rate(kind: str, optimizer: str, slow: bool) -> float:
    held = images("validation")
    scores = {
        rate: nets.accuracy(trained(kind, optimizer, slow, rate, SEEDS[0])[0], *held) for rate in RATES[optimizer]
    }
    return max(scores, key=lambda rate: scores[rate])


@functools.cache
def measured(kind: str, optimizer: str, slow: bool, seed: int) -> dict[str, float]:
    recipe = {"version": 1, "scale": SCALE, "kind": kind, "optimizer": optimizer, "slow": slow, "seed": seed}

    def measure() -> dict[str, float]:
        rate = chosen_rate(kind, optimizer, slow)
        model, losses = trained(kind, optimizer, slow, rate, seed)
        tenth = STEPS // 10
        falls = all(math.isfinite(v) for v in losses) and sum(losses[tenth : 2 * tenth]) < sum(losses[:tenth])
        return {
            "accuracy": nets.accuracy(model, *images("test")), "rate": rate, "falls": float(falls),
            "parameters": parameters(model),
        }  # fmt: skip

    return nets.kept("hyperzzw", recipe, measure)


OURS = ("terminator", "Kar3", True)
ARMS = {
    "Terminator": OURS,
    "Terminator, kernels not modulated": ("static", "Kar3", True),
    "plain convolutions, AdamW": ("plain", "AdamW", False),
    "plain convolutions, Kar3": ("plain", "Kar3", False),
    "residual convolutions, AdamW": ("residual", "AdamW", False),
}


def row(name: str, arm: tuple[str, str, bool], seed: int) -> dict[str, Any]:
    found = measured(*arm, seed)
    return {"net": name} | {key: found[key] for key in ("parameters", "rate", "accuracy")}


@hyperzzw.claim(
    name="modulated",
    claim="Weights modulated by the input mix better than static ones, without residuals",
    scale=SCALE,
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="the same net, its global kernels not modulated",
    rule=at_least(2.0, of="ours - baseline", partly=0.0),
    checks=("the loss falls from the start, no NaN", "better than plain convolutions of equal parameters"),
    seeds=SEEDS,
)
def modulated(seed: int) -> Outcome:
    found = {name: measured(*arm, seed) for name, arm in ARMS.items()}
    scores = {name: f["accuracy"] for name, f in found.items()}
    best = max(scores["plain convolutions, AdamW"], scores["plain convolutions, Kar3"])
    checks = {
        "the loss falls from the start, no NaN": found["Terminator"]["falls"] == 1.0,
        "better than plain convolutions of equal parameters": scores["Terminator"] > best,
    }
    rows = [row(name, arm, seed) for name, arm in ARMS.items()]
    return Outcome(scores["Terminator"], scores["Terminator, kernels not modulated"], checks, rows)


@hyperzzw.claim(
    name="slow-loss",
    claim="The loss among slow nets helps",
    scale=SCALE,
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="without it",
    rule=at_least(0.0, of="ours - baseline"),
    seeds=SEEDS,
)
def slow_loss(seed: int) -> Outcome:
    arms = {"with": OURS, "without": ("terminator", "Kar3", False)}
    scores = {name: measured(*arm, seed)["accuracy"] for name, arm in arms.items()}
    return Outcome(scores["with"], scores["without"], rows=[row(name, arm, seed) for name, arm in arms.items()])


@hyperzzw.claim(
    name="optimiser",
    claim="Updates by signs of gradient and means train it better than AdamW",
    scale=SCALE,
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="AdamW",
    rule=at_least(0.0, of="ours - baseline"),
    seeds=SEEDS,
)
def optimiser(seed: int) -> Outcome:
    arms = {"Kar3": OURS, "AdamW": ("terminator", "AdamW", True)}
    scores = {name: measured(*arm, seed)["accuracy"] for name, arm in arms.items()}
    return Outcome(scores["Kar3"], scores["AdamW"], rows=[row(name, arm, seed) for name, arm in arms.items()])


if __name__ == "__main__":
    raise SystemExit(hyperzzw.main())
