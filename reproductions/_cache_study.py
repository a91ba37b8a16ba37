"""Rules for cached keys and values on equal terms: teacher-forced losses of a model whose attention follows one.

A rule stands in for the attention of all layers and answers every position of a text at once: each query sees itself
and the ``WINDOW`` tokens before as they are, and what the rule has made of the older ones.  That is what a cache does
that treats a token, once a step is answered, as it leaves the window, and what ``MustafarCache(block=1)`` is checked
against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

WINDOW = 32
# Tokens that StreamingLLM keeps for ever.
SINKS = 4

# (query (B, Hk, g, T, d), keys, values (B, Hk, T, d), scale) -> answers (B, Hk, g, T, d)
Rule = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Change = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def attending(model: Any, rule: Rule) -> Iterator[None]:
    """Within this block the model attends by a rule."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> tuple[Tensor, None]:
        scale = rest.get("scaling") or query.shape[-1] ** -0.5
        grouped = query.unflatten(1, (key.shape[1], -1))
        return rule(grouped, key, value, scale).flatten(1, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("cache-study", attend)
    AttentionMaskInterface.register("cache-study", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("cache-study")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def losses(model: Any, ids: Tensor, rule: Rule) -> Tensor:
    """Return the loss in nats of each next token, (B, T - 1), contexts one by one."""
    with attending(model, rule):
        logits = torch.cat([model(row[None, :-1]).logits for row in ids])
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def _ages(n: int) -> Tensor:
    place = torch.arange(n)
    return place[:, None] - place


def _softmax_over(logits: Tensor, seen: Tensor) -> Tensor:
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def dense(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend to all tokens before."""
    logits = scale * query @ keys[:, :, None].mT
    return _softmax_over(logits, _ages(keys.shape[2]) >= 0) @ values[:, :, None]


def changed(of_keys: Change | None = None, of_values: Change | None = None, window: int = WINDOW) -> Rule:
    """Return the rule whose older tokens are those of ``change(tokens, queries of their head)``, all (B, Hk, n, d)."""

    def rule(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        asked = query.flatten(2, 3)
        old_keys = of_keys(keys, asked) if of_keys else keys
        old_values = of_values(values, asked) if of_values else values
        ages = _ages(keys.shape[2])
        recent = ages <= window
        logits = torch.where(recent, query @ keys[:, :, None].mT, query @ old_keys[:, :, None].mT)
        weights = _softmax_over(scale * logits, ages >= 0)
        new = weights * recent
        return new @ values[:, :, None] + (weights - new) @ old_values[:, :, None]

    return rule


def windowed(budget: int, sinks: int = SINKS) -> Rule:
    """Return StreamingLLM's rule: the first tokens and the newest, ``budget`` of both together."""

    def rule(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        ages = _ages(keys.shape[2])
        seen = (ages >= 0) & ((ages < budget - sinks) | (torch.arange(keys.shape[2]) < sinks))
        return _softmax_over(scale * query @ keys[:, :, None].mT, seen) @ values[:, :, None]

    return rule


def selected(budget: int, window: int = WINDOW, pool: int = 7) -> Rule:
    """Return a rule like SnapKV's: the last queries choose, for each key head, which older tokens stay.

    SnapKV chooses once, after the prompt; here, to hold the bytes of a growing text, again every ``window`` tokens.
    Those stay that the queries of the last ``window`` attend to most (weights added over queries and heads of the
    group, then smoothed by a maximum over ``pool`` neighbours, as SnapKV does), so many that with the next ``window``
    tokens the budget is met.  What has gone stays gone.
    """

    def rule(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        batch, heads, n, _ = keys.shape
        held = torch.zeros(batch, heads, n, dtype=torch.bool)
        ages, out = _ages(n), []
        for start in range(0, n, window):
            stop = min(start + window, n)
            seen = held[:, :, None, None, :stop] | (torch.arange(stop) >= start)
            seen = seen & (ages[start:stop, :stop] >= 0)
            logits = scale * query[:, :, :, start:stop] @ keys[:, :, None, :stop].mT
            weights = _softmax_over(logits, seen)
            out.append(weights @ values[:, :, None, :stop])
            held[:, :, start:stop] = True
            room = budget - window
            if stop > room:
                marks = weights[..., :stop].sum((2, 3))
                marks = F.max_pool1d(marks, pool, stride=1, padding=pool // 2)
                marks = marks.masked_fill(~held[:, :, :stop], -1.0)
                marks[:, :, start:stop] = torch.inf
                stay = marks.topk(room, dim=-1).indices
                held = torch.zeros_like(held).scatter_(-1, stay, True)
        return torch.cat(out, dim=3)

    return rule


def int4(x: Tensor, along: int, group: int = 32) -> Tensor:
    """Round to 4-bit codes with a scale and a zero point for every ``group`` numbers along an axis."""
    parts = []
    for part in x.split(group, dim=along):
        low, high = part.amin(along, keepdim=True), part.amax(along, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-12)
        parts.append(((part - low) / scale).round() * scale + low)
    return torch.cat(parts, dim=along)
