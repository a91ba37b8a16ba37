"""Small convolutional nets for Fashion-MNIST with nested classifiers (MRL, MRL-E) or one fixed one (FF), cached.

Two 3x3 convolutions with pooling and a linear map to the representation z; classifiers stand on z itself. Every arm
gets the same 30,000 images, four epochs and the same grid of learning rates, chosen with the first seed on 5,000 images
that no arm is trained on.
"""

from __future__ import annotations

import functools

import torch
from _fashion_mnist import MEAN, STD, fashion
from _mixer_nets import RATES, fitted, kept
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import load
from quernel._load import save_model
from quernel.models._cached import folder_of
from quernel.nn import MatryoshkaHead
from quernel.train import MatryoshkaLoss

DIM, DIMS = 64, (2, 4, 8, 16, 32, 64)
TRAIN, VALIDATION = 30_000, 5_000
BATCH, EPOCHS = 64, 4
STEPS = EPOCHS * TRAIN // BATCH
SEEDS = (0, 1, 2)


class NestedNet(nn.Module):
    """(B, 1, 28, 28) -> logits; ``features`` gives z, (B, dim)."""

    def __init__(self, dims: tuple[int, ...] = DIMS, efficient: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, dims[-1])),
        )
        self.head = MatryoshkaHead(dims[-1], 10, dims, efficient)

    def forward(self, x: Tensor) -> Tensor | dict[int, Tensor]:
        return self.head(self.trunk(x))


def _net(arm: str) -> NestedNet:
    """Return an untrained net: "mrl", "mrl-e", or "ff-8" with a representation of 8 numbers."""
    return NestedNet((int(arm[3:]),)) if arm.startswith("ff-") else NestedNet(efficient=arm == "mrl-e")


@functools.cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Return normalised images and labels: "train" (the first 30,000), "validation" (the last 5,000) or "test"."""
    x, y = fashion("test" if split == "test" else "train")
    part = {"train": slice(TRAIN), "validation": slice(-VALIDATION, None), "test": slice(None)}[split]
    return (x[part] - MEAN) / STD, y[part]


def _trained(arm: str, rate: float, seed: int, steps: int) -> NestedNet:
    recipe = {"arm": arm, "rate": rate, "seed": seed, "steps": steps, "version": 1}
    folder = folder_of("reproduction-matryoshka-net", recipe)
    if not folder.is_dir():
        x, y = images("train")
        nested = MatryoshkaLoss(F.cross_entropy)

        def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(x), (BATCH,), generator=generator)
            return nested(model(x[rows]), y[rows])

        save_model(fitted(lambda: _net(arm), loss, steps=steps, rate=rate, seed=seed), folder, extra=recipe)
    net: NestedNet = load(folder, model=lambda: _net(arm))
    return net


@functools.cache
def rate_of(arm: str, steps: int = STEPS) -> float:
    """Return the rate whose net of the first seed is best on the validation images, by the mean over its lengths."""

    def tried(rate: float) -> float:
        return sum(accuracies(_trained(arm, rate, SEEDS[0], steps), "validation").values())

    recipe = {"arm": arm, "rates": RATES, "steps": steps, "version": 1}
    return kept("matryoshka-rate", recipe, lambda: {"rate": max(RATES, key=tried)})["rate"]


@functools.cache
def net(arm: str, seed: int, steps: int = STEPS) -> NestedNet:
    """Return the trained net of an arm and a seed."""
    return _trained(arm, rate_of(arm, steps), seed, steps)


@torch.no_grad()
def features(model: NestedNet, split: str) -> Tensor:
    """Return the representations of all images of a split, (n, dim)."""
    return torch.cat([model.trunk(part) for part in images(split)[0].split(500)])


@torch.no_grad()
def accuracies(model: NestedNet, split: str) -> dict[int, float]:
    """Return the percentage of right answers of each classifier."""
    z, y = features(model, split), images(split)[1]
    return {m: 100 * float((model.head(z, dim=m).argmax(1) == y).float().mean()) for m in model.head.dims}


def nearest_accuracy(known: Tensor, asked: Tensor) -> float:
    """Return the percentage of test images whose nearest training image by cosine, (n, m) each, has their class."""
    known, asked = F.normalize(known, dim=1), F.normalize(asked, dim=1)
    (_, y), (_, wanted) = images("train"), images("test")
    found = torch.cat([(part @ known.T).argmax(1) for part in asked.split(500)])
    return 100 * float((y[found] == wanted).float().mean())
