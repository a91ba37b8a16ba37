"""Reproduce factorised convolutions (arXiv 2304.04964) on a laptop: a wave surrogate and a small classifier.

PLACEHOLDER
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from _narrow_nets import accuracy, convnet, fashion
from torch import nn
from torch.nn import functional as F

from quernel import models
from quernel.apps.wave_surrogate import (
    WaveData,
    WaveSurrogate,
    one_step_error,
    rollout_errors,
    train_surrogate,
    wave_data,
)
from quernel.compress import FactorizeConv, compress
from quernel.models._cached import seeded, trained
from quernel.nn import FactorizedConv2d

TRAJECTORIES, TRAIN, VALIDATION, FEW = 300, 240, 30, 30
STEPS = 10
# Rates from 1e-3 to 4e-2 were tried for each kind on the validation trajectories, at half the budget.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"channels": 32, "rank": 0, "lr": 5e-3},
    "factorised": {"channels": 32, "rank": 1, "lr": 4e-2},
    "narrow": {"channels": 11, "rank": 0, "lr": 2e-2},
}
KERNEL, LAYERS, WINDOWS = 3, 6, 8640
# The classifier: images, epochs, and its rates from 1e-3 to 3e-2 on 5,000 images that no run trains on.
IMAGES, EPOCHS, BATCH = 20_000, 2, 128
RATES = {"dense": 1e-2, "factorised": 3e-2}
FEWER_CLASSIFIER, FEWER_SURROGATE = 5.0, 6.0

factorized = Reproduction("factorized-conv", paper="2304.04964")


@functools.cache
def parts() -> tuple[WaveData, WaveData, WaveData]:
    return wave_data(TRAJECTORIES).split(TRAIN, VALIDATION)


def surrogate(kind: str, trajectories: int, seed: int) -> WaveSurrogate:
    """Return a trained surrogate, from the model cache where it is there."""
    options = KINDS[kind]
    recipe = {**options, "kernel": KERNEL, "layers": LAYERS, "windows": WINDOWS, "train": trajectories, "seed": seed}

    def train() -> tuple[nn.Module, Mapping[str, float]]:
        model = seeded(seed, lambda: WaveSurrogate(options["channels"], LAYERS, KERNEL))
        if options["rank"]:
            method = FactorizeConv(options["rank"], mode="init", init="kaiming", skip_first=False, seed=seed)
            model = compress(model, method).model
        data = parts()[0].part(0, trajectories)
        return train_surrogate(model, data, windows=WINDOWS, lr=options["lr"], seed=seed), {}

    return trained("wave-surrogate", recipe, train)  # type: ignore[return-value]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@factorized.claim(
    name="waves",
    claim="Networks of one-way filters predict waves as well as dense ones with a fraction of the parameters",
    scale=f"6 layers of 32 channels, 3x3, R = 1; 64x64 nodes, 240 trajectories, {WINDOWS} windows of 4 + 1 frames",
    data="own finite-difference solutions with piecewise constant speed, 30 unseen trajectories",
    metric="relative L2 error of the next frame",
    baseline="dense",
    rule=at_most(1.15, of="ours / baseline", partly=1.5),
    checks=("6 times fewer parameters", "below the narrow dense net", "10 steps within 1.25 of dense"),
    seeds=(0, 1, 2),
)
def waves(seed: int) -> Outcome:
    models = {kind: surrogate(kind, TRAIN, seed) for kind in KINDS}
    errors = {kind: rollout_errors(model, parts()[2], steps=STEPS) for kind, model in models.items()}
    sizes = {kind: parameters(model) for kind, model in models.items()}
    one, last = ({kind: curve[i] for kind, curve in errors.items()} for i in (0, -1))
    return Outcome(
        ours=one["factorised"],
        baseline=one["dense"],
        checks={
            "6 times fewer parameters": sizes["dense"] >= FEWER_SURROGATE * sizes["factorised"],
            "below the narrow dense net": one["factorised"] < one["narrow"],
            "10 steps within 1.25 of dense": last["factorised"] <= 1.25 * last["dense"],
        },
        rows=[
            {"net": kind, "parameters": sizes[kind], "one step": one[kind], f"{STEPS} steps": last[kind]}
            for kind in KINDS
        ],
        notes=[f"10 steps: {last['factorised']:.3g}, dense {last['dense']:.3g}, narrow {last['narrow']:.3g}"],
    )


@factorized.claim(
    name="overfitting",
    claim="They overfit less on little data",
    scale=f"the same nets on {FEW} of the trajectories, as many steps",
    data="own finite-difference solutions, 30 unseen trajectories",
    metric="relative L2 error of the next frame, unseen less trained-on trajectories",
    baseline="dense",
    rule=at_most(1.0, of="ours / baseline"),
    seeds=(0, 1, 2),
)
def overfitting(seed: int) -> Outcome:
    rows = []
    for kind in ("dense", "factorised"):
        model = surrogate(kind, FEW, seed)
        seen, unseen = (one_step_error(model, data) for data in (parts()[0].part(0, FEW), parts()[2]))
        rows.append({"net": kind, "trained on": seen, "unseen": unseen, "gap": unseen - seen, "ratio": unseen / seen})
    return Outcome(rows[1]["gap"], rows[0]["gap"], rows=rows)


def classifier(kind: str, seed: int) -> nn.Module:
    """Train a classifier of Fashion-MNIST; all convolutions but the first may be factorised."""
    model = seeded(seed, convnet)
    if kind == "factorised":
        model = compress(model, FactorizeConv(1, mode="init", init="kaiming", seed=seed)).model
    x, y = (part[:IMAGES] for part in fashion("train"))
    x = x.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[kind])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[kind], total_steps=EPOCHS * (IMAGES // BATCH))
    generator = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = torch.from_numpy(generator.permutation(IMAGES)[: IMAGES // BATCH * BATCH])
        for rows in torch.split(order, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def convolution_parameters(model: nn.Module) -> int:
    return sum(parameters(m) for m in model.modules() if isinstance(m, nn.Conv2d | FactorizedConv2d))


@factorized.claim(
    name="classifier",
    claim="A small image classifier keeps its accuracy with one-way filters",
    scale=f"VGG-like net of 16 to 64 channels with batch norms, 3x3, R = 1, {IMAGES} images, {EPOCHS} epochs",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="dense",
    rule=at_least(-1.0, of="ours - baseline", partly=-2.0),
    checks=("5 times fewer convolution parameters",),
    seeds=(0, 1, 2),
)
def small_classifier(seed: int) -> Outcome:
    rows = []
    for kind in ("dense", "factorised"):
        model = classifier(kind, seed)
        rows.append(
            {
                "net": kind,
                "convolution parameters": convolution_parameters(model),
                "accuracy": accuracy(model, *fashion("test")),
            }
        )
    fewer = rows[0]["convolution parameters"] / rows[1]["convolution parameters"]
    return Outcome(
        rows[1]["accuracy"],
        rows[0]["accuracy"],
        {"5 times fewer convolution parameters": fewer >= FEWER_CLASSIFIER},
        rows,
    )


@factorized.claim(
    name="after-training",
    claim="A trained network keeps its accuracy when one-way filters are fitted to it, without data or training",
    scale="ResNet-20 checkpoint, every convolution but the first, rank by tolerance 0.25",
    data="CIFAR-10: 2,000 exact training images, JPEG test images beside them",
    metric="accuracy (%)",
    baseline="dense",
    rule=at_least(-1.0, of="ours - baseline", partly=-2.0),
    checks=("a fifth fewer convolution parameters",),
)
def after_training(seed: int) -> Outcome:
    model = models.load("resnet20-cifar10")
    task = models.task(model, "cifar10-lossless")
    rows = [{"method": "dense", "convolution parameters": convolution_parameters(model), "accuracy": task.judge(model)}]
    notes = [f"dense: {name} {evaluate(model):.4g}" for name, evaluate in task.extras.items()]
    for method in (FactorizeConv(), FactorizeConv(tolerance=0.15), FactorizeConv(6), FactorizeConv(4)):
        small = compress(model, method).model
        count = convolution_parameters(small)
        rows.append({"method": method.label, "convolution parameters": count, "accuracy": task.judge(small)})
        notes += [f"{method.label}: {name} {evaluate(small):.4g}" for name, evaluate in task.extras.items()]
    fewer = rows[1]["convolution parameters"] <= 0.8 * rows[0]["convolution parameters"]
    checks = {"a fifth fewer convolution parameters": fewer}
    return Outcome(100 * rows[1]["accuracy"], 100 * rows[0]["accuracy"], checks, rows, notes)


if __name__ == "__main__":
    raise SystemExit(factorized.main())
