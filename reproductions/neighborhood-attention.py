"""Reproduce neighborhood attention (arXiv 2403.04690) where it is used: images on a small grid, and text.

Images are Fashion-MNIST: a window of 7 x 7 on a grid of 14 x 14 tokens, then on one of 7 x 7, which it covers.  The
peers are full attention and blocked attention, the same window with a stride of 7.  On the second grid all three are
full attention, so that the arms differ in the first of two blocks only.  Text is tinyshakespeare, each
character seeing 64 of 512, itself among them.  Only the attention differs between arms.  Every arm has its own rate,
chosen with the first seed on what was kept for validation; the parts for tests are read once, for the results.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from torch import nn

from quernel.nn import Mixer, NeighborhoodAttention1d, NeighborhoodAttention2d, SoftmaxAttention

neighborhood = Reproduction("neighborhood-attention", paper="2403.04690")

SEEDS = (0, 1)
DIMS, DEPTHS, HEADS, WINDOW = (48, 96), (1, 1), (2, 4), 7
SIDE, IMAGES, EPOCHS = 28, 6_000, 3
STEPS = EPOCHS * IMAGES // nets.BATCH
TEXT_DIM, TEXT_DEPTH, TEXT_HEADS, LENGTH, SPAN = 64, 2, 4, 512, 64
TEXT_STEPS, TEXT_BATCH = 400, 8
# Steps that are timed for the table.
TIMED = 7
KINDS = ("neighborhood", "full", "window")


def image_mixer(kind: str, dim: int, stage: int) -> Mixer:
    heads = HEADS[stage]
    if kind == "full":
        return SoftmaxAttention(dim, heads)
    return NeighborhoodAttention2d(dim, heads, WINDOW, stride=WINDOW if kind == "window" else 1)


def image_net(kind: str) -> nn.Module:
    side = SIDE // 2
    return nets.VisionNet(lambda d, s: image_mixer(kind, d, s), DIMS, DEPTHS, stride=2, side=side, positions=True)


@functools.cache
def image_model(kind: str, rate: float, seed: int) -> nn.Module:
    loss = nets.image_loss(*nets.images("train", IMAGES, SIDE))
    return nets.fitted(lambda: image_net(kind), loss, steps=STEPS, rate=rate, seed=seed)


@functools.cache
def image_rate(kind: str) -> float:
    held = nets.images("validation", None, SIDE)
    return max(nets.RATES, key=lambda rate: nets.accuracy(image_model(kind, rate, SEEDS[0]), *held))


@functools.cache
def image_result(kind: str, seed: int) -> dict[str, float]:
    recipe = {"version": 2, "kind": kind, "seed": seed, "dims": DIMS, "depths": DEPTHS, "steps": STEPS, "side": SIDE}
    recipe |= {"heads": HEADS, "window": WINDOW, "images": IMAGES, "rates": nets.RATES}

    def measure() -> dict[str, float]:
        rate = image_rate(kind)
        found = nets.accuracy(image_model(kind, rate, seed), *nets.images("test", None, SIDE))
        return {"accuracy": found, "rate": rate}

    return nets.kept("neighborhood-images", recipe, measure)


@functools.cache
def step_ms(kind: str) -> float:
    """Return the median time of a training step; on a busy machine only a hint."""
    loss = nets.image_loss(*nets.images("train", IMAGES, SIDE))
    model, generator, held = image_net(kind), torch.Generator().manual_seed(0), []
    for _ in range(TIMED):
        start = time.perf_counter()
        loss(model, generator).backward()
        held.append(1e3 * (time.perf_counter() - start))
    return statistics.median(held)


@neighborhood.claim(
    name="images",
    claim="Attention to the nearest 7 x 7 tokens is as accurate as full attention and no less than blocks of 7 x 7",
    scale=f"two stages of {DIMS} channels, grids of 14 x 14 and 7 x 7 (there every arm is full attention), "
    f"{IMAGES:,} images, {EPOCHS} epochs",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="full attention",
    rule=at_least(-1.0, of="ours - baseline"),
    checks=("at least as accurate as window attention",),
    seeds=SEEDS,
)
def images(seed: int) -> Outcome:
    found = {kind: image_result(kind, seed) for kind in KINDS}
    ours, full, window = (found[kind]["accuracy"] for kind in KINDS)
    rows: list[dict[str, Any]] = [
        {"attention": kind, "accuracy (%)": r["accuracy"], "rate": r["rate"], "ms a step": round(step_ms(kind), 1)}
        for kind, r in found.items()
    ]
    return Outcome(ours, full, {"at least as accurate as window attention": ours >= window}, rows)


def text_net(kind: str) -> nn.Module:
    def mixer(dim: int, _: int) -> Mixer:
        if kind == "full":
            return SoftmaxAttention(dim, TEXT_HEADS, causal=True)
        return NeighborhoodAttention1d(dim, TEXT_HEADS, SPAN, is_causal=True)

    return nets.SequenceNet(mixer, TEXT_DIM, TEXT_DEPTH, vocab=nets.characters()[0], length=LENGTH)


@functools.cache
def text_model(kind: str, rate: float, seed: int) -> nn.Module:
    loss = nets.text_loss(nets.characters()[1]["train"], LENGTH, TEXT_BATCH)
    return nets.fitted(lambda: text_net(kind), loss, steps=TEXT_STEPS, rate=rate, seed=seed)


def judged(model: nn.Module, split: str) -> float:
    return nets.text_loss_of(model, nets.characters()[1][split], LENGTH)


@functools.cache
def text_rate(kind: str) -> float:
    return min(nets.RATES, key=lambda rate: judged(text_model(kind, rate, SEEDS[0]), "validation"))


@functools.cache
def text_result(kind: str, seed: int) -> dict[str, float]:
    recipe = {"version": 2, "kind": kind, "seed": seed, "steps": TEXT_STEPS, "dim": TEXT_DIM, "depth": TEXT_DEPTH}
    recipe |= {"heads": TEXT_HEADS, "batch": TEXT_BATCH, "length": LENGTH, "span": SPAN, "rates": nets.RATES}

    def measure() -> dict[str, float]:
        rate = text_rate(kind)
        return {"loss": judged(text_model(kind, rate, seed), "test"), "rate": rate}

    return nets.kept("neighborhood-text", recipe, measure)


@neighborhood.claim(
    name="text",
    claim="A causal window of 64 characters models text as well as attention to all that came before",
    scale=f"{TEXT_DEPTH} blocks of {TEXT_DIM} channels, {LENGTH} characters, {TEXT_STEPS} steps of {TEXT_BATCH}",
    data="tinyshakespeare",
    metric="test loss (nats a character)",
    baseline="full causal attention",
    rule=at_most(0.03, of="ours - baseline"),
    seeds=SEEDS,
)
def text(seed: int) -> Outcome:
    ours, full = (text_result(kind, seed) for kind in KINDS[:2])
    rows = [{"attention": k, "loss": r["loss"], "rate": r["rate"]} for k, r in zip(KINDS, (ours, full), strict=False)]
    return Outcome(ours["loss"], full["loss"], rows=rows)


if __name__ == "__main__":
    raise SystemExit(neighborhood.main())
