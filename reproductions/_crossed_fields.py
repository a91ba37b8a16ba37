"""Click-model data and models of the ROBE reproduction: crossed categorical fields, and four ways to embed them.

The accident records have 29 categorical columns of few values. Crossing two and three of them makes fields of thousands
of values, most of them rare, as the hashed fields of click logs are.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from quernel import data
from quernel.hashing import fastrange, mix64
from quernel.nn import RobeArray, RobeEmbeddingBag

DIM, FIELDS, BATCH, EPOCHS = 16, 26, 512, 5
# The eight columns of most values as they are, and their largest crosses of two and of three.
COLUMNS, CROSSES = 8, {1: 8, 2: 6, 3: 12}
# Values seen less often share one id, as preparations of click logs do.
LEAST_COUNT = 2
# The optimisers that are tried for every model; the best on the validation rows is taken.
SETTINGS = (("adam", 1e-3), ("adam", 3e-3), ("adam", 1e-2), ("adagrad", 1e-2), ("adagrad", 3e-2))


@dataclass(frozen=True)
class Fields:
    """Ids of every field, (n, F), vocabulary sizes, labels, and the rows of the three parts."""

    ids: Tensor
    sizes: list[int]
    labels: Tensor
    parts: dict[str, Tensor]

    def take(self, part: str) -> tuple[Tensor, Tensor]:
        rows = self.parts[part]
        return self.ids[rows], self.labels[rows]


@functools.cache
def fields() -> Fields:
    """Return 26 crossed fields of the accident records, chosen without a look at the labels, and a fixed split."""
    held = data.load("fars")
    columns = held.x.astype(np.int64)
    labels = held.y == np.bincount(held.y.astype(np.int64)).argmax()
    order = np.random.default_rng(0).permutation(len(columns))
    parts = dict(
        zip(("train", "validation", "test"), np.split(order, [len(order) * 7 // 10, len(order) * 8 // 10]), strict=True)
    )
    codes = [np.unique(columns[:, c], return_inverse=True)[1] for c in range(columns.shape[1])]
    counts = [int(code.max()) + 1 for code in codes]
    largest = sorted(range(len(codes)), key=lambda c: -counts[c])[:COLUMNS]
    ids, sizes = [], []
    for order_of_cross, wanted in CROSSES.items():
        crosses = itertools.combinations(largest, order_of_cross)
        for cross in sorted(crosses, key=lambda cross: -math.prod(counts[c] for c in cross))[:wanted]:
            value = functools.reduce(
                lambda value, c: value * counts[c] + codes[c], cross, np.zeros(len(columns), np.int64)
            )
            seen, times = np.unique(value[parts["train"]], return_counts=True)
            known = seen[times >= LEAST_COUNT]
            place = np.minimum(np.searchsorted(known, value), len(known) - 1)
            ids.append(np.where(known[place] == value, place + 1, 0))
            sizes.append(len(known) + 1)
    tensors = {name: torch.from_numpy(rows) for name, rows in parts.items()}
    return Fields(torch.from_numpy(np.stack(ids, 1)), sizes, torch.from_numpy(labels).float(), tensors)


class FullTables(nn.Module):
    """A row of its own for every value of every field."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(sizes), DIM)
        self.register_buffer("first", torch.tensor([0, *itertools.accumulate(sizes[:-1])]))
        for first, size in zip(self.first.tolist(), sizes, strict=True):
            nn.init.uniform_(self.table.weight[first : first + size], -(size**-0.5), size**-0.5)

    def forward(self, ids: Tensor) -> Tensor:  # (B, F) -> (B, F, dim)
        return self.table(ids + self.first)


class HashedRows(nn.Module):
    """All values hashed to the rows of one small table."""

    def __init__(self, sizes: list[int], numbers: int, seed: int) -> None:
        super().__init__()
        n = max(1, numbers // DIM)
        keys = np.arange(sum(sizes))
        self.register_buffer("row", torch.from_numpy(fastrange(mix64(seed, keys), n).astype(np.int64)))
        self.register_buffer("first", torch.tensor([0, *itertools.accumulate(sizes[:-1])]))
        self.table = nn.Embedding(n, DIM)
        nn.init.uniform_(self.table.weight, -(max(sizes) ** -0.5), max(sizes) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(self.row[ids + self.first])


class QuotientRemainder(nn.Module):
    """The product of a row for the quotient of an id and one for its remainder; no two ids are alike."""

    def __init__(self, sizes: list[int], numbers: int, seed: int) -> None:
        super().__init__()
        total, rows = sum(sizes), numbers // DIM
        # The least number k of remainders with ceil(total / k) + k <= rows; the square root needs fewest rows.
        fitting = [k for k in range(1, rows) if -(-total // k) + k <= rows]
        self.k = fitting[0] if fitting else round(total**0.5)
        self.register_buffer("first", torch.tensor([0, *itertools.accumulate(sizes[:-1])]))
        self.quotient, self.remainder = nn.Embedding(-(-total // self.k), DIM), nn.Embedding(self.k, DIM)
        bound = max(sizes) ** -0.5
        nn.init.uniform_(self.quotient.weight, -bound, bound)
        nn.init.ones_(self.remainder.weight)

    def forward(self, ids: Tensor) -> Tensor:
        keys = ids + self.first
        return self.quotient(keys // self.k) * self.remainder(keys % self.k)


class ClickModel(nn.Module):
    """A small DLRM: rows and their inner products into a perceptron of 64 and 32 units."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.register_buffer("pairs", torch.triu_indices(FIELDS, FIELDS, 1))
        inputs = FIELDS * DIM + FIELDS * (FIELDS - 1) // 2
        self.top = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embedding(ids)
        products = rows @ rows.mT
        return self.top(torch.cat([rows.flatten(1), products[:, self.pairs[0], self.pairs[1]]], dim=1))[:, 0]


def embedding_of(kind: str, ratio: int, block: int, seed: int) -> nn.Module:
    """Return the embedding of a model: "full", "rows", "qr" or "robe"."""
    sizes = fields().sizes
    numbers = sum(sizes) * DIM // ratio
    if kind == "full":
        return FullTables(sizes)
    if kind == "rows":
        return HashedRows(sizes, numbers, seed)
    if kind == "qr":
        return QuotientRemainder(sizes, numbers, seed)
    memory = RobeArray(numbers, seed=seed, bound=max(sizes) ** -0.5)
    return RobeEmbeddingBag(sizes, DIM, memory=memory, block=block, mode=None, offset=0)


@torch.no_grad()
def auc(model: nn.Module, part: str) -> float:
    ids, labels = fields().take(part)
    logits = torch.cat([model(chunk) for chunk in ids.split(8192)])
    return float(roc_auc_score(labels.numpy(), logits.numpy()))


@dataclass(frozen=True)
class Trained:
    """What one training gave: scores at its own best epoch."""

    validation: float
    test: float
    epoch: int
    numbers: int


@functools.cache
def trained(kind: str, ratio: int, block: int, seed: int, optimizer: str, rate: float) -> Trained:
    """Train one model; the epoch that is best on the validation rows is the one that counts."""
    torch.manual_seed(seed)
    model = ClickModel(embedding_of(kind, ratio, block, seed))
    makers = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
    steps = makers[optimizer](model.parameters(), lr=rate)
    ids, labels = fields().take("train")
    generator, best = torch.Generator().manual_seed(seed), Trained(0.0, 0.0, 0, 0)
    numbers = sum(p.numel() for p in model.embedding.parameters())
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(ids), generator=generator).split(BATCH):
            loss = nn.functional.binary_cross_entropy_with_logits(model(ids[rows]), labels[rows])
            steps.zero_grad()
            loss.backward()
            steps.step()
        score = auc(model, "validation")
        if score > best.validation:
            best = Trained(score, auc(model, "test"), epoch, numbers)
    return best


@functools.cache
def best_setting(kind: str, ratio: int) -> tuple[str, float]:
    """Return the optimiser and rate that are best on the validation rows; seed 99, for all block sizes that of 4."""
    return max(SETTINGS, key=lambda setting: trained(kind, ratio, 4, 99, *setting).validation)


def tuned(kind: str, ratio: int = 1, block: int = DIM, *, seed: int) -> Trained:
    """Return a trained model of a kind at its own best setting."""
    return trained(kind, ratio, block, seed, *best_setting(kind, ratio))
