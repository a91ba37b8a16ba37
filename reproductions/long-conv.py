"""Reproduce long convolutions (arXiv 2302.06646) on a laptop: kernels learned tap by tap, shrunk and not.

The claim is that shrinking every tap by lambda keeps free kernels from fitting noise.  It is tested where noise can be
fitted: few images, pixel by pixel, trained until they are known by heart.  All arms are one network with lambda 0, the
default, or twice that; no kernel dropout, so that nothing else differs.  The table holds every arm.  Language is read
with ``H3Conv`` beside softmax attention of the same width.

Images are 14 x 14, 196 steps, and 1,000 in number, for time alone: nine trainings take a quarter of an hour.  With 784
steps and 2,000 images a step takes four to five times as long and as many epochs have twice the steps: over two hours.
The smaller test is a weaker one.  80 epochs do not suffice for 98 % of the training images either (90 % without
shrinking, 87 and 84 % with it), so that noise was fitted only in part; that check fails for every arm.
"""

from __future__ import annotations

import functools
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from torch import nn

from quernel.nn import H3Conv, LongConv, Mixer, SoftmaxAttention

long_conv = Reproduction("long-conv", paper="2302.06646")

SIDE, IMAGES, EPOCHS, DIM, DEPTH = 14, 1_000, 80, 32, 2
STEPS = EPOCHS * IMAGES // nets.BATCH
TEXT_DIM, HEADS, LENGTH, TEXT_BATCH, TEXT_STEPS = 64, 4, 512, 8, 300
TEXT_RATES = (3e-3, 6e-3)
SEEDS = (0, 1)
# What lambda is, in units of the default.
ARMS = {"lambda 0": 0.0, "lambda auto": 1.0, "lambda 2 auto": 2.0}
SCALE = f"{SIDE * SIDE} pixels, {DEPTH} blocks of width {DIM}, {IMAGES:,} images, {EPOCHS} epochs"
TEXT_SCALE = f"{LENGTH} characters, {DEPTH} blocks of width {TEXT_DIM}, {TEXT_STEPS} steps of {TEXT_BATCH}"

pixels = functools.partial(nets.pixels, side=SIDE)


def regularised(dim: int, share: float) -> LongConv:
    length = SIDE * SIDE
    default = LongConv(dim, length).filters.lam
    return LongConv(dim, length, lam=share * default, kernel_dropout=0.0, bidirectional=True)


@functools.cache
def trained(arm: str, rate: float, seed: int) -> nn.Module:
    def make() -> nn.Module:
        return nets.SequenceNet(lambda d, _: regularised(d, ARMS[arm]), DIM, DEPTH)

    loss = nets.image_loss(*pixels("train", IMAGES))
    return nets.fitted(make, loss, steps=STEPS, rate=rate, seed=seed)


@torch.no_grad()
def roughness(model: nn.Module) -> tuple[float, float]:
    """Return mean |k[j + 1] - k[j]| / mean |k|, and the share of the energy above half of the highest frequency."""
    kernels = torch.cat([m.kernel().flatten(0, -2) for m in model.modules() if isinstance(m, LongConv)])
    energy = torch.fft.rfft(kernels).abs().square().sum(0)
    change = float(kernels.diff(dim=-1).abs().mean() / kernels.abs().mean().clamp_min(1e-12))
    return change, float(energy[len(energy) // 2 :].sum() / energy.sum().clamp_min(1e-12))


@functools.cache
def measured(arm: str, seed: int) -> dict[str, float]:
    """Return accuracies and roughness of a net whose rate was chosen with the first seed."""
    recipe = {"version": 3, "scale": SCALE, "arm": arm, "seed": seed}

    def measure() -> dict[str, float]:
        rate = nets.chosen_rate(trained, arm, SEEDS[0], pixels)
        model = trained(arm, rate, seed)
        change, high = roughness(model)
        parts = {"train": pixels("train", IMAGES), "validation": pixels("validation"), "test": pixels("test")}
        found = {name: nets.accuracy(model, *part) for name, part in parts.items()}
        return {"rate": rate, "change": change, "high": high, **found}

    return nets.kept("long-conv", recipe, measure)


@functools.cache
def best_lambda() -> str:
    """Return the regularised arm with the better accuracy on validation images, over both seeds."""
    arms = [arm for arm, share in ARMS.items() if share > 0]
    return max(arms, key=lambda arm: sum(measured(arm, seed)["validation"] for seed in SEEDS))


@long_conv.claim(
    name="regularisation",
    claim="Shrinking the taps of free kernels makes them generalise better and smoother",
    scale=SCALE,
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="lambda 0",
    rule=at_least(0.5, of="ours - baseline"),
    checks=(
        "every arm knows 98 % of its training images",
        "the gap between training and test accuracy is smaller",
        "no more than 0.3 points worse",
        "neighbouring taps differ less, by 20 %",
        "less energy above half of the highest frequency, by 20 %",
    ),
    seeds=SEEDS,
)
def regularisation(seed: int) -> Outcome:
    found = {arm: measured(arm, seed) for arm in ARMS}
    best = best_lambda()
    ours, plain = found[best], found["lambda 0"]
    checks = {
        "every arm knows 98 % of its training images": all(f["train"] >= 98.0 for f in found.values()),
        "the gap between training and test accuracy is smaller": (
            ours["train"] - ours["test"] < plain["train"] - plain["test"]
        ),
        "no more than 0.3 points worse": ours["test"] >= plain["test"] - 0.3,
        "neighbouring taps differ less, by 20 %": all(
            f["change"] <= 0.8 * plain["change"] for arm, f in found.items() if ARMS[arm] > 0
        ),
        "less energy above half of the highest frequency, by 20 %": all(
            f["high"] <= 0.8 * plain["high"] for arm, f in found.items() if ARMS[arm] > 0
        ),
    }
    rows: list[dict[str, Any]] = [
        {
            "kernels": arm,
            "test (%)": f["test"],
            "training (%)": f["train"],
            "change of taps": f["change"],
            "high energy": f["high"],
            "rate": f["rate"],
        }
        for arm, f in found.items()
    ]
    return Outcome(ours["test"], plain["test"], checks, rows, [f"regularised: {best}"])


def reading_mixer(kind: str, dim: int) -> Mixer:
    if kind == "softmax":
        return SoftmaxAttention(dim, HEADS, causal=True)
    return H3Conv(dim, LENGTH, init="double_exp")


@functools.cache
def reader(kind: str, rate: float, seed: int) -> nn.Module:
    vocab, texts = nets.characters()

    def make() -> nn.Module:
        return nets.SequenceNet(lambda d, _: reading_mixer(kind, d), TEXT_DIM, DEPTH, vocab=vocab, length=LENGTH)

    loss = nets.text_loss(texts["train"], LENGTH, TEXT_BATCH)
    return nets.fitted(make, loss, steps=TEXT_STEPS, rate=rate, seed=seed)


@functools.cache
def read(kind: str, seed: int) -> dict[str, float]:
    """Return the test loss of a reader whose rate was chosen with the first seed."""
    recipe = {"version": 1, "scale": TEXT_SCALE, "kind": kind, "seed": seed}

    def measure() -> dict[str, float]:
        texts = nets.characters()[1]
        losses = {
            rate: nets.text_loss_of(reader(kind, rate, SEEDS[0]), texts["validation"], LENGTH) for rate in TEXT_RATES
        }
        rate = min(losses, key=losses.__getitem__)
        return {"rate": rate, "loss": nets.text_loss_of(reader(kind, rate, seed), texts["test"], LENGTH)}

    return nets.kept("long-conv-text", recipe, measure)


@long_conv.claim(
    name="text",
    claim="Gated long convolutions model language about as well as attention of the same size",
    scale=TEXT_SCALE,
    data="tinyshakespeare",
    metric="test loss (nats a character)",
    baseline="softmax attention",
    rule=at_most(0.05, of="ours - baseline"),
    seeds=SEEDS,
)
def text(seed: int) -> Outcome:
    found = {kind: read(kind, seed) for kind in ("H3Conv", "softmax")}
    rows = [{"mixer": kind, "loss": f["loss"], "rate": f["rate"]} for kind, f in found.items()]
    return Outcome(found["H3Conv"]["loss"], found["softmax"]["loss"], {}, rows)


if __name__ == "__main__":
    raise SystemExit(long_conv.main())
