"""``calibrate_tau``: below which likeness of queries the choice has changed, measured on a model's own text.

Text is read once with full attention. Queries and keys of its second half are then put to rows of the cache itself that
choose at every step, so that what is compared are the sets of tokens which the cache would attend to, whole units and
all.  For each threshold the steps are played: where the likeness r_t falls below it the choice of that step is taken,
elsewhere the last one is used on.  The smallest threshold is returned at which, over the steps that use a choice on,
that choice and the step's own still have a mean Jaccard similarity of the target.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.cache._attention import attention
from quernel.cache._cache import Cache
from quernel.cache._layer import CacheRow, dense_step
from quernel.cache._pool import KVPool
from quernel.cache.louiskv import LouisKVConfig, LouisKVRow

# Larger than any cosine: chooses at every step.
ALWAYS = 1.01
# Thresholds that are tried, as shares of all likenesses seen.
_SHARES = np.linspace(0.0, 0.95, 20)
# At most so large a share of the prompt's units is chosen: where a budget holds nearly all, every choice is the same.
_QUARTER = 4
# For each layer and sequence: the likeness of each step to the one before (n - 1,), and the Jaccard similarity of what
# any two steps choose (n, n), mean over the key heads.
Seen = list[tuple[np.ndarray, np.ndarray]]


def calibrate_tau(
    model: Any,
    token_batches: Iterable[Tensor],
    target_jaccard: float = 0.8,
    *,
    settings: LouisKVConfig | None = None,
    steps: int = 256,
) -> float:
    """Return the threshold of ``LouisKVCache`` for a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder with full attention in every layer.
    token_batches : iterable of Tensor of int64, shape (B, T)
        Text like that which will be decoded, without padding.
    target_jaccard : float, default=0.8
        In (0, 1]: how alike the tokens of a choice that is used on and of one made anew are to be; sinks and newest
        tokens do not count, they are always there.
    settings : LouisKVConfig, optional
        How units are formed and how many are chosen: as many as the budget holds, at most a quarter of the prompt's
        tokens between sinks and buffer.
    steps : int, default=256
        Last tokens of each sequence, at most half, that are played as steps.

    Returns
    -------
    float
        1.01, which chooses at every step, where no threshold reaches the target; a warning then says so.

    Raises
    ------
    QuernelError
        If there is no text, it is too short, or the target is out of its range.

    Notes
    -----
    One threshold for all layers and heads. Rotary positions turn the queries a little with every step, which is part of
    what is measured. Segments of what follows the prompt are as short as where every step turns. O(T^2) attention once,
    and per layer and sequence ``steps`` steps of the cache and O(steps^2) numbers.

    Examples
    --------
    >>> from quernel.models import TinyLM
    >>> _ = torch.manual_seed(0)
    >>> model = TinyLM(dim=32, n_layers=1, n_heads=2, n_kv_heads=1).eval().to_transformers()
    >>> text = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
    >>> settings = LouisKVConfig(budget=16, sink=2, buffer=16, max_segment=16)
    >>> -1 <= calibrate_tau(model, [text], 0.1, settings=settings) <= 1
    True
    """
    target = check_float("target_jaccard", target_jaccard, low=0.0, high=1.0, open_low=True)
    wanted = check_int("steps", steps, low=2)
    seen = record(model, token_batches, settings or LouisKVConfig(), wanted)
    best = ALWAYS
    for tau in np.quantile(np.concatenate([likeness for likeness, _ in seen]), _SHARES[::-1]):
        if kept_on(seen, float(tau)) < target:
            break
        best = float(tau)
    if best == ALWAYS:
        warnings.warn(
            f"no threshold keeps choices at a Jaccard similarity of {target}: at every step units will be chosen anew; "
            "try a smaller target_jaccard",
            stacklevel=2,
        )
    return best


def record(model: Any, token_batches: Iterable[Tensor], settings: LouisKVConfig, steps: int) -> Seen:
    """Return how alike the last steps' queries and choices are, at most ``steps`` and half of each text."""
    seen: Seen = []
    for tokens in token_batches:
        if tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens):
            raise QuernelError(f"token_batches must hold (B, T) integers; got {tokens.dtype}, {tuple(tokens.shape)}")
        first = tokens.shape[1] - min(steps, tokens.shape[1] // 2)
        cache = _Recording(model.config, settings, first, seen)
        with attention(model), torch.no_grad():
            for part in (tokens[:, :first], tokens[:, first:]):
                model(part, past_key_values=cache)
    if not seen:
        raise QuernelError("token_batches must hold text to calibrate on; got none")
    return seen


def kept_on(seen: Seen, tau: float) -> float:
    """Return how alike choices that are used on are to those made anew; 1 where none is used on."""
    total, taken = 0.0, 0
    for likeness, alike in seen:
        chosen = 0
        for t, r in enumerate(likeness, start=1):
            if r < tau:
                chosen = t
            else:
                total, taken = total + float(alike[chosen, t]), taken + 1
    return total / taken if taken else 1.0


class _Recording(Cache):
    """Full attention; of the second chunk stays in ``seen`` what a cache would choose at each of its steps."""

    def __init__(self, config: Any, settings: LouisKVConfig, first: int, seen: Seen) -> None:
        among = first - settings.buffer - settings.sink
        if among < _QUARTER:
            raise QuernelError(
                f"a sequence whose first {first} tokens are the prompt leaves {max(0, among)} keys to choose from "
                f"between sink={settings.sink} and buffer={settings.buffer}; give longer ones"
            )
        budget = min(settings.layout().budget, among // _QUARTER)
        size = min(settings.cluster_size, budget)
        self._settings = replace(settings, budget=budget, cluster_size=size, tau=ALWAYS, dense_below=0, audit=False)
        self._seen = seen
        super().__init__(config)

    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        return _RecordingRow(self._settings, self._seen)


class _RecordingRow(CacheRow):
    def __init__(self, settings: LouisKVConfig, seen: Seen) -> None:
        self._settings, self._seen = settings, seen
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def extend(self, keys: Tensor, values: Tensor) -> None:
        self._keys.append(keys.clone())
        self._values.append(values.clone())

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        before = self.visible()[0]
        asked = query.to(torch.promote_types(query.dtype, torch.float32))
        units = torch.nn.functional.normalize(asked, dim=-1)
        likeness = (units[:, :, 1:] * units[:, :, :-1]).sum(-1).mean((0, 1))
        alike = jaccard(chosen_by(self._settings, asked, before.to(asked), keys.to(asked), scale))
        self._seen.append((likeness.cpu().numpy(), alike.cpu().numpy()))
        return super().chunk(query, keys, values, scale)

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.extend(key, value)
        return dense_step(query, *self.visible(), scale)

    def visible(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._keys, dim=1), torch.cat(self._values, dim=1)

    def tensors(self) -> list[Tensor]:
        return [*self._keys, *self._values]


def chosen_by(settings: LouisKVConfig, queries: Tensor, before: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the tokens that a row chooses at each step, their places (n, Hk, budget).

    The prompt's keys are ``before`` (Hk, m, d), those of the steps ``keys`` (Hk, n, d), queries (Hk, g, n, d).
    """
    heads, m, dim = before.shape
    # Instead of values the row stores the places of the tokens.
    places = torch.arange(m + keys.shape[1], dtype=before.dtype, device=before.device)[None, :, None]
    places = places.expand(heads, -1, -1)
    row = LouisKVRow(before, places, settings, KVPool(heads, dim + 1, before.dtype))
    row.extend(before, places[:, :m])
    found = []
    for t in range(keys.shape[1]):
        row.step(queries[:, :, t], keys[:, t : t + 1], places[:, m + t : m + t + 1], scale)
        found.append(row.chosen()[1][..., 0].long())
    return torch.stack(found)


def jaccard(places: Tensor) -> Tensor:
    """Return the Jaccard similarity of any two steps' tokens, mean over the heads: (n, H, k) -> (n, n)."""
    total = torch.zeros(len(places), len(places), device=places.device)
    for head in places.unbind(1):
        held = torch.zeros(len(head), int(places.max()) + 1, device=places.device).scatter_(1, head, 1.0)
        both = held @ held.mT
        total += both / (2 * head.shape[1] - both)
    return total / places.shape[1]
