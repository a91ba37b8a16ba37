"""Networks made small in five ways, trained alike: dense, narrow and dense, ROAST with one array or many, HashedNet.

Every arm trains with Adam and one cycle of the learning rate, on the same batches, at the rate that was best on
held-out training rows after a shorter run of a seed of its own. ``narrow`` gets at least as many parameters as ROAST.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.compress import Roast, compress
from quernel.models import ResNet20
from quernel.nn import roast_param_groups

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEED, BATCH = 99, 128
VOCABULARY, LENGTH = 8000, 32


@dataclass(frozen=True, eq=False)
class Setting:
    """A task: how to build the dense net of a width, its data, and how long to train and to tune."""

    build: Callable[[float], nn.Module]
    rows: Callable[[str], tuple[Tensor, Tensor]]
    epochs: int
    tuning_epochs: int
    held_out: int
    min_numel: int = 1000


def mlp(width: float) -> nn.Module:
    """Return 784-512-512-10 with ReLU, hidden layers of ``width`` times their size."""
    hidden = max(1, round(512 * width))
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


class Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class TextNet(nn.Module):
    """Two blocks over word vectors, mean of the words, one linear layer; id 0 is padding, 1 an unknown word."""

    def __init__(self, width: float) -> None:
        super().__init__()
        dim = max(2, round(64 * width / 2) * 2)
        self.words = nn.Embedding(VOCABULARY, dim, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(LENGTH, dim))
        self.blocks = nn.ModuleList(Block(dim, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 2)
        with torch.no_grad():
            # The size of the other weights: one array, one learning rate.
            self.words.weight.normal_(std=0.08)[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids > 0
        x = self.words(ids) + self.places
        for block in self.blocks:
            x = block(x, mask)
        kept = mask[..., None].float()
        return self.head((self.norm(x) * kept).sum(1) / kept.sum(1))


@functools.cache
def fashion(split: str) -> tuple[Tensor, Tensor]:
    held = data.load("fashion-mnist", split=split)
    return torch.from_numpy(held.x.reshape(len(held), -1)).float() / 255, torch.from_numpy(held.y)


@functools.cache
def cifar(split: str) -> tuple[Tensor, Tensor]:
    """Return 4,000 training or 2,000 test images, classes mixed."""
    held = data.load("cifar10-jpeg", split=split)
    order = np.random.default_rng(0).permutation(len(held.y))[: 4000 if split == "train" else 2000]
    x = torch.from_numpy(held.x[order]).permute(0, 3, 1, 2).float() / 255
    return ((x - 0.45) / 0.25).contiguous(memory_format=torch.channels_last), torch.from_numpy(held.y[order])


@functools.cache
def sentences(split: str) -> tuple[Tensor, Tensor]:
    """Return word ids (n, 32) of 20,000 training sentences, or of all of the dev split, and labels."""
    held = {name: data.load("sst2", split=name) for name in ("train", "dev")}
    counts = Counter(word for text in held["train"].text for word in text.lower().split())
    known = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 2))}
    chosen = held["train" if split == "train" else "dev"]
    order = np.random.default_rng(0).permutation(len(chosen.text))[:20_000]
    ids = torch.zeros(len(order), LENGTH, dtype=torch.long)
    for row, i in enumerate(order.tolist()):
        found = [known.get(word, 1) for word in chosen.text[i].lower().split()[:LENGTH]]
        ids[row, : len(found)] = torch.tensor(found or [1])
    return ids, torch.from_numpy(np.asarray(chosen.y)[order])


SETTINGS = {
    "fashion": Setting(mlp, fashion, epochs=3, tuning_epochs=1, held_out=10_000),
    "cifar": Setting(
        lambda width: ResNet20(width=max(1, round(16 * width))).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        cifar,
        epochs=4,
        tuning_epochs=2,
        held_out=500,
        min_numel=400,
    ),
    "text": Setting(TextNet, sentences, epochs=3, tuning_epochs=1, held_out=4000),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def untrained(task: str, arm: str, ratio: float, seed: int) -> nn.Module:
    """Return the net of an arm before training."""
    setting = SETTINGS[task]
    torch.manual_seed(seed)
    if arm == "dense":
        return setting.build(1.0)
    if arm == "narrow":
        return setting.build(_width(task, ratio))
    options = {"sharing": "local" if arm == "local" else "global", "tile": 1 if arm == "hashed" else 16}
    method = Roast(ratio=ratio, min_numel=setting.min_numel, seed=seed, **options)  # type: ignore[arg-type]
    return compress(setting.build(1.0), method, inplace=True).model


@functools.cache
def _width(task: str, ratio: float) -> float:
    """Return the least width whose dense net has at least the parameters of ROAST."""
    wanted = parameters(untrained(task, "roast", ratio, 0))
    steps = np.arange(1, 1025) / 1024
    return next(float(width) for width in steps if parameters(SETTINGS[task].build(float(width))) >= wanted)


def trained(task: str, arm: str, ratio: float, seed: int, rate: float, *, tuning: bool = False) -> nn.Module:
    """Train an arm; for tuning shorter, and without the held-out rows."""
    setting = SETTINGS[task]
    model = untrained(task, arm, ratio, seed).train()
    x, y = setting.rows("train")
    if tuning:
        x, y = x[: -setting.held_out], y[: -setting.held_out]
    epochs = setting.tuning_epochs if tuning else setting.epochs
    groups = roast_param_groups(model, rate)
    optimizer = torch.optim.Adam(groups, fused=True)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(x)


@functools.cache
def best_rate(task: str, arm: str, ratio: float) -> float:
    """Return the rate of the best short run, judged on held-out training rows; the grid grows while its end is best."""
    setting = SETTINGS[task]
    x, y = (rows[-setting.held_out :] for rows in setting.rows("train"))

    @functools.cache
    def score(rate: float) -> float:
        return accuracy(trained(task, arm, ratio, TUNING_SEED, rate, tuning=True), x, y)

    best = RATES[1]
    for rate in (RATES[0], RATES[2], RATES[3]):
        # From the middle outwards; a further step only where the last one helped.
        if (rate != RATES[3] or best == RATES[2]) and score(rate) > score(best):
            best = rate
    return best


@dataclass(frozen=True)
class Judged:
    """What one trained arm is worth."""

    accuracy: float
    parameters: int
    rate: float


@functools.cache
def judged(task: str, arm: str, ratio: float, seed: int) -> Judged:
    """Train an arm at its best rate and judge it on the test rows."""
    rate = best_rate(task, arm, ratio)
    model = trained(task, arm, ratio, seed, rate)
    return Judged(accuracy(model, *SETTINGS[task].rows("test")), parameters(model), rate)
