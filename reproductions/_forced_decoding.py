"""A text decoded token by token through a cache, each token given: the loss of its second half, the share covered."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from quernel import data
from quernel.cache import LouisKVCache, attention
from quernel.cache.louiskv import LouisKVRow
from quernel.models import TinyLM
from quernel.models._lm_copying import repeated
from quernel.models._lm_tasks import windows_of
from quernel.models._lm_training import tiny_lm

ROWS = 4


@functools.cache
def model_of(name: str, steps: int | None = None) -> Any:
    """Return a model of transformers: ``"repeated"`` or ``"stories"``."""
    return (TinyLM.stories260k() if name == "stories" else tiny_lm(text=name, steps=steps)).to_transformers()


@functools.cache
def texts(name: str, split: str, seed: int) -> Tensor:
    """Return ROWS texts of the length of the model's context, (ROWS, T): passages and their copies, or own stories."""
    if name == "stories":
        return _own_stories(2 * seed + (split == "test"))
    ours = TinyLM()
    ids = ours.encode(data.load("tinyshakespeare", split=split).text)
    windows = windows_of(ids, ours.context // 2)[:, :-1]
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:ROWS]
    return repeated(windows[chosen], ours.context)


@torch.no_grad()
def _own_stories(seed: int) -> Tensor:
    """Return what the model itself writes, drawn token by token."""
    model, ours = model_of("stories"), TinyLM.stories260k()
    draw, cache = torch.Generator().manual_seed(seed), DynamicCache(config=model.config)
    ids = ours.encode("Once upon a time")[None].expand(ROWS, -1)
    while ids.shape[1] < ours.context:
        logits = model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=draw)), dim=1)
    return ids


@torch.no_grad()
def loss_of(model: Any, ids: Tensor, cache: Any = None) -> float:
    """Return the loss of the second half in nats a token: its first half is the prompt, the rest is decoded.

    Without a cache one pass with full attention, which gives the same numbers as decoding with the plain one.
    """
    prompt, total = ids.shape[1] // 2, ids.shape[1]
    if cache is None:
        logits = model(ids[:, :-1]).logits[:, prompt - 1 :]
    else:
        with attention(model):
            parts = [model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
            parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(prompt, total - 1)]
        logits = torch.cat(parts, dim=1)
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten()))


class _IntervalRow(LouisKVRow):
    rate, _due = 1.0, 0.0

    def _moved(self, query: Tensor) -> bool:
        self._due += self.rate
        # Sums of rates are not exact.
        if self._due < 1 - 1e-9:
            return False
        self._due -= 1
        return True


class FixedIntervals(LouisKVCache):
    """LouisKV that chooses at a fixed rate, whatever the queries say."""

    def __init__(self, config: Any, rate: float, **options: Any) -> None:
        super().__init__(config, **options)
        self._rate = rate

    def _make_row(self, keys: Tensor, values: Tensor) -> LouisKVRow:
        row = _IntervalRow(keys, values, self.settings, self._make_pool(keys, values))
        # The first step chooses, as it does where the queries decide.
        row.rate, row._due = self._rate, 1 - self._rate
        return row


def beside_fixed(model: Any, ids: Tensor, tau: float, options: dict[str, int]) -> dict[str, float]:
    """Return the rate of choices at a threshold, the loss there, and the loss of fixed intervals at that rate."""
    cache = LouisKVCache(model.config, tau=tau, **options)
    adaptive = loss_of(model, ids, cache)
    rate = cache.report().details["retrieval_rate"]
    fixed = loss_of(model, ids, FixedIntervals(model.config, rate, tau=tau, **options))
    return {"tau": tau, "rate": rate, "adaptive": adaptive, "fixed intervals": fixed}


def no_better(row: dict[str, float]) -> bool:
    """Whether fixed intervals lose as much at least; where every step chooses both are one, and nothing is shown."""
    return row["rate"] < 1 and row["fixed intervals"] >= row["adaptive"]


def recall_of(cache: Any) -> float:
    """Return the covered share of the full attention, mean over the layers."""
    shares = [value for name, value in cache.report().details.items() if name.startswith("recall")]
    return sum(shares) / len(shares)
