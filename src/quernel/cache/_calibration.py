"""``calibrate_tau``: below which likeness of queries the important keys have changed, measured on a model's own text.

Text is read once with full attention; from the queries of its second half follows which keys every step would choose.
For each threshold the steps are then played: where the likeness r_t falls below it the choice of that step is taken,
elsewhere the last one is used on.  The smallest threshold is returned at which, over the steps that use a choice on,
that choice and the step's own still have a mean Jaccard similarity of the target.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.cache._attention import attention
from quernel.cache._cache import Cache
from quernel.cache._layer import CacheRow, dense_step
from quernel.cache.louiskv import LouisKVConfig

# Larger than any cosine: chooses at every step.
ALWAYS = 1.01
# Thresholds that are tried, as shares of all likenesses seen.
_SHARES = np.linspace(0.0, 0.95, 20)
# Keys that count as important are at most so large a share of those to choose from.
_IMPORTANT = 4


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
        In (0, 1]: how alike a choice that is used on and one made anew are to be.
    settings : LouisKVConfig, optional
        Whose budget, sinks and buffer count: only keys between these two are chosen, and as many as the budget holds,
        at most a quarter.
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
    what is measured. O(T^2) attention once, and per layer and sequence O(steps^2) numbers.

    Examples
    --------
    >>> from quernel.models import TinyLM
    >>> model = TinyLM(dim=32, n_layers=1, n_heads=2, n_kv_heads=1).eval().to_transformers()
    >>> text = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
    >>> settings = LouisKVConfig(budget=16, sink=2, buffer=16, max_segment=16)
    >>> -1 <= calibrate_tau(model, [text], 0.1, settings=settings) <= 1
    True
    """
    target = check_float("target_jaccard", target_jaccard, low=0.0, high=1.0, open_low=True)
    wanted = check_int("steps", steps, low=2)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens in token_batches:
        if tokens.ndim != 2 or tokens.is_floating_point() or not len(tokens):
            raise QuernelError(f"token_batches must hold (B, T) integers; got {tokens.dtype}, {tuple(tokens.shape)}")
        first = tokens.shape[1] - min(wanted, tokens.shape[1] // 2)
        cache = _Recording(model.config, settings or LouisKVConfig(), first, seen)
        with attention(model), torch.no_grad():
            for part in (tokens[:, :first], tokens[:, first:]):
                model(part, past_key_values=cache)
    if not seen:
        raise QuernelError("token_batches must hold text to calibrate on; got none")
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


def kept_on(seen: list[tuple[np.ndarray, np.ndarray]], tau: float) -> float:
    """Return how alike choices that are used on are to those made anew; 1 where none is used on.

    ``seen`` holds, for a layer and sequence, the likeness of each step to the one before (n - 1,), and how alike the
    choices of any two steps are (n, n).
    """
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
    """Full attention; the queries of the second chunk leave what they would choose in ``seen``."""

    def __init__(
        self, config: Any, settings: LouisKVConfig, first: int, seen: list[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self._low, self._high = settings.sink, first - settings.buffer
        if self._high - self._low < _IMPORTANT:
            raise QuernelError(
                f"a sequence whose first {first} tokens are the prompt leaves {max(0, self._high - self._low)} keys to "
                f"choose from between sink={settings.sink} and buffer={settings.buffer}; give longer ones"
            )
        self._count = min(settings.layout().budget, (self._high - self._low) // _IMPORTANT)
        self._seen = seen
        super().__init__(config)

    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        return _RecordingRow(self)

    def record(self, query: Tensor, keys: Tensor, scale: float) -> None:
        """Take the queries (Hk, g, n, d) of steps and the keys (Hk, m, d) of the prompt."""
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        units = torch.nn.functional.normalize(wide, dim=-1)
        likeness = (units[:, :, 1:] * units[:, :, :-1]).sum(-1).mean((0, 1))
        logits = wide @ keys[:, None, self._low : self._high].to(wide).mT * scale  # (Hk, g, n, m)
        best = logits.softmax(-1).mean(1).topk(self._count, dim=-1).indices  # (Hk, n, count)
        chosen = wide.new_zeros(*best.shape[:2], self._high - self._low).scatter_(-1, best, 1.0)
        both = chosen @ chosen.mT  # (Hk, n, n)
        self._seen.append((likeness.cpu().numpy(), (both / (2 * self._count - both)).mean(0).cpu().numpy()))


class _RecordingRow(CacheRow):
    def __init__(self, owner: _Recording) -> None:
        self._owner = owner
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def extend(self, keys: Tensor, values: Tensor) -> None:
        self._keys.append(keys.clone())
        self._values.append(values.clone())

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        self._owner.record(query, self.visible()[0], scale)
        return super().chunk(query, keys, values, scale)

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.extend(key, value)
        return dense_step(query, *self.visible(), scale)

    def visible(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._keys, dim=1), torch.cat(self._values, dim=1)

    def tensors(self) -> list[Tensor]:
        return [*self._keys, *self._values]
