"""``CacheLayer``: one layer of a cache of transformers, a ``CacheRow`` for every sequence of the batch.

Rows hold real tokens only, so that padding takes part in nothing and every row decides for itself.  A layer keeps the
contract of transformers (true lengths, reordering for beams, reset); a method writes a row: how it stores a chunk,
how it answers one new query, what a later chunk sees, and what it weighs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quernel._errors import QuernelError
from quernel.cache._attention import NEVER_ASKED, marked

# Queries of a later chunk are answered so many at a time: their mask has a byte for each key.
_QUERIES = 256


class CacheRow(ABC):
    """Keys and values of one sequence in one layer, without padding; Hk key heads, d numbers each.

    All tensors that come in are copied or used at once, never kept.
    """

    @abstractmethod
    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Store a chunk of the prompt, (Hk, n, d) each, whose queries are answered already."""

    @abstractmethod
    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store one token, (Hk, 1, d) each, and answer its query (Hk, g, d), the query heads of a key head together."""

    @abstractmethod
    def visible(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a later chunk of the prompt sees, (Hk, n, d) each."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return all that is stored; what ``nbytes`` counts."""

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    @property
    def resident_nbytes(self) -> int:
        """Those of them in memory."""
        return self.nbytes

    def clone(self) -> Self:
        """Return a row that shares nothing with this one."""
        return copy.deepcopy(self)

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Answer a later chunk: its queries (Hk, g, n, d) see what is visible and the chunk up to themselves."""
        old_keys, old_values = self.visible()
        before, n = old_keys.shape[1], keys.shape[1]
        all_keys = torch.cat((old_keys.to(keys.dtype), keys), dim=1)
        all_values = torch.cat((old_values.to(values.dtype), values), dim=1)
        parts = []
        for start in range(0, n, _QUERIES):
            stop = min(start + _QUERIES, n)
            seen = torch.ones(stop - start, before + stop, dtype=torch.bool, device=keys.device).tril(before + start)
            asked = query[:, :, start:stop].flatten(1, 2)  # (Hk, g * n, d)
            answer = F.scaled_dot_product_attention(
                asked[None],
                all_keys[None, :, : before + stop],
                all_values[None, :, : before + stop],
                attn_mask=seen.repeat(query.shape[1], 1),
                scale=scale,
            )[0]
            parts.append(answer.unflatten(1, (query.shape[1], stop - start)))
        return torch.cat(parts, dim=2)


def dense_step(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T) v of one token; query (Hk, g, d), keys and values (Hk, n, d).

    The query heads of a key head are rows of one product: three times faster on a CPU than ``enable_gqa``.
    """
    return F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scale)[0]


class CacheLayer(CacheLayerMixin):
    """Rows behind the interface of a cache layer of transformers.

    Parameters
    ----------
    make_row : callable
        ``make_row(keys, values)``: an empty row for keys and values like these, (Hk, n, d) each.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, make_row: Callable[[Tensor, Tensor], CacheRow]) -> None:
        super().__init__()
        self._make_row = make_row
        self._clear()

    def _clear(self) -> None:
        self.rows: list[CacheRow] = []
        self._length = 0
        self._asked = False
        self.dense_bytes_a_token = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make a row for every sequence."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = [self._make_row(*pair) for pair in zip(key_states, value_states, strict=True)]
        numbers = key_states[0, :, 0].numel() + value_states[0, :, 0].numel()
        self.dense_bytes_a_token = numbers * key_states.element_size()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys and values, (B, Hk, n, d), and return them marked for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._asked:
            raise QuernelError(NEVER_ASKED)
        if len(key_states) != len(self.rows):
            raise QuernelError(f"this cache holds {len(self.rows)} sequences; got {len(key_states)}. Make a new one")
        self._asked = True
        return marked(key_states, self), value_states

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Answer the queries (B, H, n, d) of the tokens that ``update`` took, and store these; (B, H, n, d)."""
        self._asked = False
        n, first = key.shape[2], self._length == 0
        if mask is not None and mask.dtype != torch.bool:
            raise QuernelError(f"the attention mask must be bool, as transformers makes it for SDPA; got {mask.dtype}")
        # What the last token sees of its own chunk is what is no padding.
        real = None if mask is None else mask[:, 0, -1, -n:].expand(len(key), n)
        self._length += n
        if first:
            out = sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0].transpose(1, 2)
            for row, keys, values, there in zip(self.rows, key, value, _each(real, len(key)), strict=True):
                kept = (keys, values) if there is None else (keys[:, there], values[:, there])
                if kept[0].shape[1]:
                    row.extend(*(t.detach() for t in kept))
            return out
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, Hk, g, n, d)
        answers = [
            self._answer(row, grouped[b], key[b].detach(), value[b].detach(), there, scale)
            for b, (row, there) in enumerate(zip(self.rows, _each(real, len(key)), strict=True))
        ]
        return torch.stack(answers).flatten(1, 2)

    @staticmethod
    def _answer(
        row: CacheRow, query: Tensor, keys: Tensor, values: Tensor, real: Tensor | None, scale: float
    ) -> Tensor:
        """Return (Hk, g, n, d); zeros for padding."""
        if real is not None and not bool(real.all()):
            out = torch.zeros_like(query[..., : values.shape[-1]])
            if bool(real.any()):
                some = CacheLayer._answer(row, query[:, :, real], keys[:, real], values[:, real], None, scale)
                out[:, :, real] = some
            return out
        if keys.shape[1] == 1:
            return row.step(query[:, :, 0], keys, values, scale)[:, :, None]
        out = row.chunk(query, keys, values, scale)
        row.extend(keys, values)
        return out

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return len(self.rows)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the true length with the new tokens, and no offset: masks are made before attention.

        The first versions of transformers 5 give the places of the new tokens, (n,), instead of their number.
        """
        new = len(query_length) if isinstance(query_length, Tensor) and query_length.ndim else int(query_length)
        return self._length + new, 0

    def get_seq_length(self) -> int:
        """Return how many tokens have passed, padding included."""
        return self._length

    def get_max_length(self) -> int:
        """Return -1: nothing bounds the length."""
        return -1

    # As it is called before transformers 5.13.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the chosen beams in their place."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these places, each as often as it is named."""
        used: set[int] = set()
        rows = []
        for place in indices.tolist():
            # The first to take a row may have it; the others need their own.
            rows.append(self.rows[place].clone() if place in used else self.rows[place])
            used.add(place)
        self.rows = rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every row so many times."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was stored cannot be taken back."""
        raise QuernelError(
            "Quernel's caches cannot take tokens back, so assisted and prompt-lookup decoding do not work with them; "
            "use a cache of transformers there"
        )

    def offload(self) -> None:
        """Do nothing: a row stays where it was made."""

    def prefetch(self) -> None:
        """Do nothing: a row stays where it was made."""


def _each(real: Tensor | None, batch: int) -> list[Tensor | None]:
    return [None] * batch if real is None else list(real)
