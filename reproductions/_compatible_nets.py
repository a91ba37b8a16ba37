"""Versions of an image encoder for measuring compatibility: data, the small net, upgrades from scratch or one by one.

Four versions know the first 4, 6, 8 and 10 classes of Fashion-MNIST.  Every arm begins from the same weights and sees
the same batches in the same order; training, gallery, paired and validation images are disjoint.  Arms of peers are in
``_compatible_peers``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _fashion_mnist import MEAN, STD, fashion
from torch import Tensor, nn

from quernel import _random
from quernel.nn import SimplexHead
from quernel.search import compatibility_matrix
from quernel.train import CompatibleTrainer, HOCLoss, ReplayBuffer
from quernel.train._rehearsal import Rehearsal, as_dataset

CLASSES = (4, 6, 8, 10)
PROTOTYPES, WIDTH = 64, 128
BATCH = 64
RATES = (1e-3, 3e-3)
# Places among the 60,000 training images.
TRAIN, GALLERY, PAIRED, VALIDATION = (
    slice(0, 30_000),
    slice(30_000, 35_000),
    slice(35_000, 36_000),
    slice(55_000, 60_000),
)
Pair = tuple[Tensor, Tensor]
Matrix = list[list[float]]


@dataclass(frozen=True)
class Upgrades:
    """How versions follow each other: each from scratch on all its classes, or fine-tuned on the new ones."""

    sequential: bool
    epochs: int
    memory: int = 0  # images kept a class
    # Of the first version where it is trained for longer, and the classes it is trained on.
    first_epochs: int | None = None
    classes: tuple[int, ...] = CLASSES


SCRATCH = Upgrades(sequential=False, epochs=2)
SEQUENCE = Upgrades(sequential=True, epochs=2, memory=20)


@functools.cache
def images(part: str) -> Pair:
    """Return normalised images and labels of "train", "gallery", "paired", "validation" or "test"."""
    places = {"train": TRAIN, "gallery": GALLERY, "paired": PAIRED, "validation": VALIDATION}
    x, y = fashion("test" if part == "test" else "train")
    rows = places.get(part, slice(None))
    return (x[rows] - MEAN) / STD, y[rows]


def of_classes(low: int, high: int) -> Pair:
    """Return the training images of classes low .. high - 1."""
    x, y = images("train")
    chosen = (y >= low) & (y < high)
    return x[chosen], y[chosen]


def convnet(width: int = 16) -> nn.Sequential:
    """Return two 3x3 convolutions of stride 2 and a linear layer of 8 ``width`` outputs."""
    layers: list[nn.Module] = []
    before = 1
    for channels in (width, 2 * width):
        layers += [nn.Conv2d(before, channels, 3, 2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(98 * width, 8 * width), nn.ReLU())


class TrainableHead(nn.Module):
    """What ``SimplexHead`` is, with a classifier that is trained: x -> (logits, features)."""

    def __init__(self, n_prototypes: int, in_features: int) -> None:
        super().__init__()
        self.features = nn.Linear(in_features, n_prototypes - 1, bias=False)
        self.classifier = nn.Linear(n_prototypes - 1, n_prototypes, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.features(x)
        return self.classifier(z), z


def started(seed: int, version: int, head: Callable[[], nn.Module], width: int = 16) -> nn.Sequential:
    """Return an untrained model; the backbone of a seed and a version is the same in every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + version)
        backbone = convnet(width)
        return nn.Sequential(backbone, head())


def simplex_head(known: int, places: Sequence[int] | None = None, width: int = 16) -> SimplexHead:
    """Return a head for the first ``known`` classes; class c has prototype ``places[c]``, by default c."""
    return SimplexHead(PROTOTYPES, 8 * width, list(range(known)) if places is None else places)


# (model in training, frozen old model or None) -> (images, labels) -> loss
Loss = Callable[[nn.Module, nn.Module | None], Callable[[Tensor, Tensor], Tensor]]


def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Return the optimiser of every arm at a rate."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Pair,
    *,
    memory: ReplayBuffer | None,
    epochs: int,
    seed: int,
    rate: float,
) -> None:
    """Train a model of any head on the batches that ``CompatibleTrainer`` would take, in its order."""
    rehearsal = Rehearsal(
        as_dataset(data), memory, epochs=epochs, batch_size=BATCH, memory_share=0.5,
        generator=_random.torch_generator(seed),
    )  # fmt: skip
    optimizer = adam(rate)(model.parameters())
    model.train()
    for step, (x, y, new) in enumerate(rehearsal, start=1):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
        if memory is not None and step > len(rehearsal) - rehearsal.batches:
            memory.add(x[:new], y[:new])
    model.eval()


def task(upgrades: Upgrades, version: int) -> tuple[Pair, int]:
    """Return the images that a version is trained on, and its epochs."""
    known = upgrades.classes
    low = known[version - 1] if upgrades.sequential and version else 0
    first = upgrades.first_epochs if version == 0 and upgrades.first_epochs else upgrades.epochs
    return of_classes(low, known[version]), first


def simplex_versions(seed: int, upgrades: Upgrades, hoc: HOCLoss | None, rate: float) -> list[nn.Sequential]:
    """Return the versions with the fixed simplex; with ``hoc`` each is trained towards the one before."""
    made: list[nn.Sequential] = []
    memory = ReplayBuffer(upgrades.memory, seed=seed) if upgrades.memory else None
    for version, known in enumerate(upgrades.classes):
        if made and upgrades.sequential:
            backbone, head = copy.deepcopy(made[-1][0]), made[-1][1].extended(list(range(known)))
        else:
            backbone, head = started(seed, version, lambda known=known: simplex_head(known))
        data, epochs = task(upgrades, version)
        trainer = CompatibleTrainer(
            backbone, head, old=made[-1] if made and hoc else None, loss=hoc, memory=memory, epochs=epochs,
            batch_size=BATCH, seed=1000 * seed + version, optimizer=adam(rate),
        )  # fmt: skip
        made.append(trainer.fit(data).model)
    return made


def trainable_versions(seed: int, upgrades: Upgrades, loss: Loss, rate: float) -> list[nn.Sequential]:
    """Return the versions with a trained classifier and any loss."""
    made: list[nn.Sequential] = []
    memory = ReplayBuffer(upgrades.memory, seed=seed) if upgrades.memory else None
    for version in range(len(upgrades.classes)):
        if made and upgrades.sequential:
            model = copy.deepcopy(made[-1])
        else:
            model = started(seed, version, lambda: TrainableHead(PROTOTYPES, WIDTH))
        data, epochs = task(upgrades, version)
        old = copy.deepcopy(made[-1]).eval().requires_grad_(False) if made else None
        fit(model, loss(model, old), data, memory=memory, epochs=epochs, seed=1000 * seed + version, rate=rate)
        made.append(model)
    return made


def wide_model(seed: int, known: int, epochs: int, rate: float, places: Sequence[int] | None = None) -> nn.Sequential:
    """Return a net of twice the width that was trained alone on the first classes, under a class map."""
    backbone, head = started(seed, 100, lambda: simplex_head(known, places, 32), 32)
    trainer = CompatibleTrainer(
        backbone, head, epochs=epochs, batch_size=BATCH, seed=1000 * seed + 100,
        optimizer=adam(rate),
    )  # fmt: skip
    return trainer.fit(of_classes(0, known)).model


def matrix(models: Sequence[Any], part: str = "test", known: int | None = None) -> Matrix:
    """Return the lower triangle of the compatibility matrix, with class means of the gallery images.

    ``known`` keeps the first classes only, in queries and gallery.
    """
    queries, gallery = images(part), images("gallery")
    if known is not None:
        queries, gallery = ((x[y < known], y[y < known]) for x, y in (queries, gallery))
    c = compatibility_matrix(models, queries, gallery)
    return [c[i, : i + 1].tolist() for i in range(len(c))]


def square(lower: Matrix) -> Any:
    """Return a matrix of which only the lower triangle is known."""
    full = torch.full((len(lower), len(lower)), torch.nan, dtype=torch.float64)
    for i, row in enumerate(lower):
        full[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    return full.numpy()


def re_embedded(lower: Matrix) -> Matrix:
    """Return what the same models reach if every upgrade embeds the gallery again."""
    return [[lower[i][i]] * (i + 1) for i in range(len(lower))]
