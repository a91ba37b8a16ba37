"""Language models of the PairConnect reproduction: texts as ids, ours, a Transformer, and how both are trained."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.models import PairConnectLM

LENGTH, BATCH = 128, 16
DIM, WINDOW = 64, 32
WARM_UP, LAST = 20, 0.05
UNKNOWN = "<unk>"


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as ids: what is trained on, what rates are chosen on, and what is judged on."""

    vocab: int
    train: Tensor
    tuning: Tensor
    judging: Tensor


@functools.cache
def characters() -> Corpus:
    """Return tinyshakespeare by characters: 90 % train, and two parts of 5 %."""
    texts = [data.load("tinyshakespeare", split=split).text for split in ("train", "validation", "test")]
    number = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    return Corpus(len(number), *(torch.tensor([number[c] for c in text]) for text in texts))


@functools.cache
def words(vocab: int = 4096) -> Corpus:
    """Return the Brown corpus by lower-case words, the frequent ones; of every 20,000 words 18,000 are trained on."""
    tokens = [word.lower() for word in data.load("brown").words]
    parts: list[list[str]] = [[], [], []]
    for start in range(0, len(tokens), 20_000):
        piece = tokens[start : start + 20_000]
        for part, (first, last) in zip(parts, ((0, 18_000), (18_000, 19_000), (19_000, 20_000)), strict=True):
            part += piece[first:last]
    known = [word for word, _ in Counter(parts[0]).most_common(vocab - 1)]
    number = {word: i + 1 for i, word in enumerate(known)}
    return Corpus(vocab, *(torch.tensor([number.get(word, 0) for word in part]) for part in parts))


class Transformer(nn.Module):
    """A causal Transformer with norms before its sublayers, learned positions and a tied head."""

    def __init__(self, vocab: int, layers: int, dim: int = DIM, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, dim), nn.Parameter(torch.randn(LENGTH, dim) * 0.02)
        nn.init.normal_(self.embed.weight, std=0.02)
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, **options) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.norm(x) @ self.embed.weight.T


def ours(vocab: int, layers: int, *, ratio: int = 1, rows: int | None = None, distances: int = WINDOW) -> PairConnectLM:
    """Return our model; without ``rows`` pairs are numbered exactly; ``ratio`` > 1 makes tables views of one array."""
    direct = rows is None
    rows = vocab**2 * distances if rows is None else rows
    size = None if ratio == 1 else layers * rows * DIM // ratio
    storage: Any = "dense" if ratio == 1 else "robe"
    return PairConnectLM(
        vocab,
        DIM,
        layers,
        WINDOW,
        rows,
        rel_buckets=distances,
        direct=direct,
        storage=storage,
        size=size,
        sparse=ratio == 1,
    )


def optimizers(model: nn.Module, rate: float, table_rate: float) -> list[torch.optim.Optimizer]:
    """Return Adam for dense parameters and, where there are tables, its row-wise form for them."""
    if not isinstance(model, PairConnectLM):
        return [torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))]
    dense, tables = model.param_groups(rate, table_rate)
    del tables["weight_decay"]
    sparse = model.config()["sparse"]
    kind: Any = torch.optim.SparseAdam if sparse else torch.optim.Adam
    return [torch.optim.Adam([dense], betas=(0.9, 0.99)), kind([tables], betas=(0.9, 0.99))]


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def trained(
    make: Callable[[], nn.Module], text: Corpus, *, steps: int, rate: float, table_rate: float = 0.0, seed: int
) -> nn.Module:
    """Train on random crops with a short warm-up and a cosine rate; the generator of torch is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        held = optimizers(model, rate, table_rate)
        whole = [[group["lr"] for group in optimizer.param_groups] for optimizer in held]
        for step in range(steps):
            share = min((step + 1) / WARM_UP, LAST + (1 - LAST) * 0.5 * (1 + np.cos(np.pi * step / steps)))
            for optimizer, rates in zip(held, whole, strict=True):
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr * share
                optimizer.zero_grad()
            starts = torch.randint(len(text.train) - LENGTH - 1, (BATCH, 1))
            crops = text.train[starts + torch.arange(LENGTH + 1)]
            F.cross_entropy(logits_of(model, crops[:, :-1]).flatten(0, 1), crops[:, 1:].flatten()).backward()
            for optimizer in held:
                optimizer.step()
    return model.eval()


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> float:
    """Return the mean loss in nats over consecutive crops, the same for every model."""
    whole = (len(ids) - 1) // LENGTH * LENGTH
    inputs, wanted = ids[:whole].reshape(-1, LENGTH), ids[1 : whole + 1].reshape(-1, LENGTH)
    total = 0.0
    for x, y in zip(inputs.split(BATCH), wanted.split(BATCH), strict=True):
        total += float(F.cross_entropy(logits_of(model, x).flatten(0, 1), y.flatten(), reduction="sum"))
    return total / whole


def best_setting(
    make: Callable[[], nn.Module], text: Corpus, grid: Mapping[str, tuple[float, ...]], steps: int
) -> dict[str, float]:
    """Return the rates with the lowest loss on the tuning part after a shorter training, seed 99."""
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    losses = [loss_of(trained(make, text, steps=steps, seed=99, **setting), text.tuning) for setting in settings]
    return settings[int(np.argmin(losses))]
