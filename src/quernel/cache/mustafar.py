"""``MustafarCache``: of every cached key and value only the largest channels, read without being unpacked.

Mustafar (arXiv 2505.22913).  A prompt is read with full attention.  After every forward pass with T tokens exactly
``block * floor(max(0, T - window) / block)`` of them are packed, the oldest, whatever the chunks they came in; a step
still sees the block that it completes in full.  One softmax runs over packed and dense tokens.  A packed row takes
``n * itemsize + 8 * ceil(d / 64)`` bytes for the ``d * itemsize`` of a dense one, n being the kept channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int
from quernel.cache._bitmap_attention import attend
from quernel.cache._cache import Cache, bytes_a_token, key_heads, refuse_both
from quernel.cache._layer import CacheRow, dense_step
from quernel.cache.bitmap_rows import KINDS, MAX_DIM, BitmapRows
from quernel.cache.pruning import kept_channels

# What the plain cache of a whole model must outgrow before packed rows are read faster: the last level of cache of the
# machines that this was measured on.  Below it a dense row costs less than a packed one to expand.
LAST_LEVEL_BYTES = 32 * 2**20
# Rows that ``BitmapRows`` may hold beyond its own: up to a multiple of 64 in its first and its last page, and as many
# that are dropped at its front.
_SPARE_ROWS = 192
NEVER = 2**62


def _example() -> dict[str, Any]:
    # Blocks of 16 behind 16 tokens: long contexts are nearly all packed, up to 31 tokens nothing is.
    return {"make": lambda config: MustafarCache(config, window=16, block=16), "exact_to": 31}


@dataclass(frozen=True)
class Schedule:
    """How rows are packed and dropped; numbers as in ``MustafarCache``."""

    k_sparsity: float
    v_sparsity: float
    window: int
    block: int
    value_dtype: torch.dtype | None
    protect_first: int
    min_packed: int
    budget: int | None

    def packed(self, tokens: int) -> int:
        """Return how many of so many tokens are packed (or were, before they were dropped)."""
        if tokens < self.min_packed:
            return 0
        return max(0, tokens - self.protect_first - self.window) // self.block * self.block


class MustafarRow(CacheRow):
    """Packed tokens, and dense ones: those protected first, then the newest."""

    def __init__(self, keys: Tensor, values: Tensor, schedule: Schedule) -> None:
        if keys.dtype not in KINDS:
            raise QuernelError(f"MustafarCache holds float32, bfloat16 and float16; the model computes in {keys.dtype}")
        if keys.device.type != "cpu":
            raise QuernelError(f"MustafarCache computes on the CPU; the model is on {keys.device}. Move it there")
        self.schedule = schedule
        dtype = schedule.value_dtype or keys.dtype
        self.keys, self.values = (
            BitmapRows(x.shape[0], x.shape[2], kept_channels(x.shape[2], sparsity), dtype)
            for x, sparsity in ((keys, schedule.k_sparsity), (values, schedule.v_sparsity))
        )
        self._room = keys[:, :0].clone(), values[:, :0].clone()
        self._dense = 0
        self._tokens = 0
        # Tokens that were packed, or dropped before that.
        self._gone = 0

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Store a chunk, packing whole blocks of the oldest tokens."""
        self._tokens += keys.shape[1]
        if self._dense:
            keys, values = (torch.cat(pair, dim=1) for pair in zip(self._held(), (keys, values), strict=True))
        self._settle(keys, values)

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend with the new token among the dense ones, then pack the block that it completes, if it does."""
        self._tokens += 1
        self._make_room(self._dense + 1)
        for room, new in zip(self._room, (key, value), strict=True):
            room[:, self._dense : self._dense + 1] = new
        self._dense += 1
        held = self._held()
        if len(self.keys):
            out = attend(query, self.keys, self.values, [held], scale)
        else:
            out = dense_step(query, *held, scale)
        if self.schedule.packed(self._tokens) > self._gone or self._excess(self._dense) > 0:
            self._settle(*held)
        return out

    def _settle(self, keys: Tensor, values: Tensor) -> None:
        """Pack and drop what is due of these tokens, and hold the rest dense; they may lie in our own room."""
        first = self.schedule.protect_first
        due = max(0, self.schedule.packed(self._tokens) - self._gone)
        if due:
            self.keys.append(keys[:, first : first + due])
            self.values.append(values[:, first : first + due])
        gone = due
        excess = self._excess(keys.shape[1] - due)
        if excess > 0:
            packed = min(excess, len(self.keys))
            self.keys.drop_first(packed)
            self.values.drop_first(packed)
            gone += excess - packed
        self._gone += gone
        kept = [torch.cat((x[:, :first], x[:, first + gone :]), dim=1) for x in (keys, values)]
        self._dense = 0
        self._make_room(kept[0].shape[1])
        self._dense = kept[0].shape[1]
        for room, new in zip(self._room, kept, strict=True):
            room[:, : self._dense] = new

    def _excess(self, dense: int) -> int:
        """Return how many tokens are beyond the budget when so many are dense."""
        return 0 if self.schedule.budget is None else dense + len(self.keys) - self.schedule.budget

    def _make_room(self, tokens: int) -> None:
        """Have room for so many dense tokens; those that are there stay."""
        have = self._room[0].shape[1]
        if tokens <= have:
            return
        usual = self.schedule.protect_first + self.schedule.window + self.schedule.block
        size = min(2 * have, usual) if tokens <= usual else tokens + 256 if have else tokens
        if self.schedule.budget is not None:
            size = min(size, self.schedule.budget + 1)
        # Kernels take 16 dense rows at a time.
        size = -(-max(tokens, size) // 16) * 16
        old = self._held()
        self._room = tuple(x.new_empty(x.shape[0], size, x.shape[2]) for x in old)  # type: ignore[assignment]
        for room, held in zip(self._room, old, strict=True):
            room[:, : self._dense] = held

    def _held(self) -> tuple[Tensor, Tensor]:
        keys, values = (x[:, : self._dense] for x in self._room)
        return keys, values

    def visible(self) -> tuple[Tensor, Tensor]:
        """Return packed tokens, unpacked, and dense ones."""
        keys, values = self._held()
        if not len(self.keys):
            return keys, values
        return (
            torch.cat((self.keys.unpack().to(keys.dtype), keys), dim=1),
            torch.cat((self.values.unpack().to(values.dtype), values), dim=1),
        )

    def tensors(self) -> list[Tensor]:
        """Return dense keys and values, bitmaps and packed values."""
        return [*self._room, *self.keys.tensors(), *self.values.tensors()]


@register("mustafar", pillar="cache", contract="cache", paper="2505.22913", status="stable", example=_example)
class MustafarCache(Cache):
    """Keep the largest channels of every cached key and value, and the newest tokens whole.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    k_sparsity, v_sparsity : float, default=0.7, 0.7
        Share of the channels of a key, after its rotation, and of a value that is dropped, in [0, 1): of d channels
        ``d - floor(sparsity * d)`` stay.
    window : int, default=32
        Newest tokens that are never packed.
    block : int, default=256
        Tokens that are packed at a time; 1 packs every token as it leaves the window.
    value_dtype : torch.dtype, optional
        Of the packed values; default that of the model.  ``torch.bfloat16`` halves those of a float32 model.
    protect_first : int, default=0
        First tokens that stay dense, as well as the newest: often all heads look at them.
    objective : {"memory", "speed"}
        ``"speed"`` packs nothing before the plain cache of the whole model would outgrow the processor's last level of
        cache (32 MB are assumed): below, dense rows are read faster.
    min_packed : int, optional
        Tokens below which nothing is packed, instead of what the objective says.
    budget : int, optional
        Tokens kept a sequence; the oldest that are not protected are dropped beyond it.
    budget_bytes : int, optional
        Instead of ``budget``: bytes of one sequence, all layers together, in the dtype of the keys that come.

    Raises
    ------
    QuernelError
        If a sparsity is outside [0, 1) or leaves no channel, a number is out of range, both budgets are given, a layer
        attends to a sliding window, or the model computes in another dtype or on another device than the CPU.

    Notes
    -----
    The sure gain on a CPU is memory; see the page of the method for when it is time too.  Differs from the authors'
    code: that keeps ``d - floor(sparsity * d) + 1`` channels and more where magnitudes are equal; ours exactly as many
    as said.

    References
    ----------
    D. Joo et al., "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
    arXiv 2505.22913, NeurIPS 2025.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> cache = MustafarCache(LlamaConfig(num_hidden_layers=2, head_dim=128), k_sparsity=0.5)
    >>> cache.report().details["kept_k"]
    64.0
    """

    def __init__(
        self,
        config: Any,
        k_sparsity: float = 0.7,
        v_sparsity: float = 0.7,
        window: int = 32,
        block: int = 256,
        value_dtype: torch.dtype | None = None,
        protect_first: int = 0,
        objective: Literal["memory", "speed"] = "memory",
        min_packed: int | None = None,
        budget: int | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        check_int("window", window, low=1)
        check_int("block", block, low=1)
        check_int("protect_first", protect_first, low=0)
        check_choice("objective", objective, ("memory", "speed"))
        if value_dtype is not None and value_dtype not in KINDS:
            raise QuernelError(f"value_dtype must be float32, bfloat16 or float16; got {value_dtype}")
        if min_packed is not None:
            check_int("min_packed", min_packed, low=0)
        super().__init__(config)
        dim = check_int("head_dim", key_heads(self.config)[1], low=1, high=MAX_DIM)
        self.kept = {
            "kept_k": kept_channels(dim, k_sparsity, "k_sparsity"),
            "kept_v": kept_channels(dim, v_sparsity, "v_sparsity"),
        }
        refuse_both(budget, budget_bytes)
        if budget is not None:
            check_int("budget", budget, low=protect_first + 1)
        self._late, self._bytes = objective == "speed" and min_packed is None, budget_bytes
        self._asked = Schedule(
            k_sparsity, v_sparsity, window, block, value_dtype, protect_first, min_packed or 0, budget
        )
        self._plan(None)

    def _plan(self, dtype: torch.dtype | None) -> None:
        """Set crossover and schedule for a model that computes in ``dtype``, by default that of its config."""
        self.crossover = -(-LAST_LEVEL_BYTES // bytes_a_token(self.config, dtype))
        plan = replace(self._asked, min_packed=self.crossover) if self._late else self._asked
        self.schedule = plan if self._bytes is None else self._budgeted(plan, self._bytes, dtype)

    def _budgeted(self, plan: Schedule, size: int, dtype: torch.dtype | None) -> Schedule:
        """Return the schedule with a budget in tokens; bytes pay for all room that there may be."""
        one = bytes_a_token(self.config, dtype)
        check_int("budget_bytes", size, low=16 * one * (1 + plan.protect_first // 16))
        dense = _up(plan.protect_first + plan.window + plan.block, 16)
        row = bytes_a_token(self.config, plan.value_dtype or dtype, (plan.k_sparsity, plan.v_sparsity))
        packed = (size - one * dense) // row - _SPARE_ROWS
        if packed > 0:
            return replace(plan, budget=plan.protect_first + plan.window + packed)
        # No room for a block and what it is packed into: all tokens stay dense.  The new one comes before one goes.
        return replace(plan, budget=size // one // 16 * 16 - 1, min_packed=NEVER)

    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        self._plan(keys.dtype)
        return MustafarRow(keys, values, self.schedule)

    def _details(self, rows: list[CacheRow]) -> Mapping[str, float]:
        """Bytes of packed rows, tokens packed of one sequence, channels kept of a row, tokens of the crossover."""
        held = [row for row in rows if isinstance(row, MustafarRow)]
        return {
            "bytes_packed": float(sum(part.nbytes for row in held for part in (row.keys, row.values))),
            "tokens_packed": float(max((len(row.keys) for row in held), default=0)),
            **{name: float(n) for name, n in self.kept.items()},
            "crossover": float(self.crossover),
        }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
