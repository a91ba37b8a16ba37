"""``RetrievalRow``: all tokens in a pool, a small working set beside it that is chosen anew when the row says so.

The tokens of a row are its first ones (sinks), units that can be chosen (in the pool), and the local part: closed
pieces, the oldest first, and one open piece that grows. A working set lies in one buffer, records of key and value::

    [ sinks | chosen units | local part, the newest token last ]

so that a step appends one record and attends to what lies there, and a piece that leaves the local part becomes part
of the chosen units where it lies, if the budget has room for it. A method says how a chunk of the prompt becomes
units (``_units``), what is kept of one (``_summaries``), how they are scored (``_scores``) and when it is time to
choose (``_moved``).

While the row is so short that dense attention is as fast, everything stays in the local part and nothing is left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernel._threads import parallel_ranges
from quernel.cache._layer import CacheRow, dense_step
from quernel.cache._pool import KVPool
from quernel.cache._pool_kernels import choose_units

# From so many units on the key heads are shared among threads.
_WORTH_THREADS = 1024


@dataclass(frozen=True)
class Layout:
    """Sizes of a row's parts, in tokens.

    Parameters
    ----------
    budget : int
        Of units that are chosen.
    sink, buffer : int
        First and newest tokens that are always attended to.
    piece : int
        Closed pieces into which the end of a prompt is cut.
    shortest, longest : int
        An open piece is closed where the method moves on, from the shortest on, and at the longest in any case.
    part : int
        So many tokens of a prompt are formed into units together.
    dense_below : int
        Up to so many tokens the row stays dense.
    audit : bool
        Whether every step measures the share of the attention that the working set covers.
    """

    budget: int
    sink: int
    buffer: int
    piece: int
    shortest: int
    longest: int
    part: int
    dense_below: int
    audit: bool = False


@dataclass
class Counts:
    """What a row has done."""

    steps: int = 0
    sparse_steps: int = 0
    selections: int = 0
    tokens_read: int = 0
    covered: float = 0.0


class RetrievalRow(CacheRow):
    """One sequence in one layer; ``keys`` and ``values`` show shapes, dtype and device."""

    def __init__(self, keys: Tensor, values: Tensor, layout: Layout, pool: KVPool) -> None:
        self.layout, self.pool, self.counts = layout, pool, Counts()
        self._heads, self._dim = keys.shape[0], keys.shape[-1]
        self._room = keys.new_empty(self._heads, 0, self._dim + values.shape[-1])
        self._sinks = self._chosen = self._local = self._open = 0
        self._pieces: deque[tuple[int, bool]] = deque()  # tokens of a closed piece; whether it is still to be formed
        self._dense, self._fresh = True, True
        # Units: where each begins and how long it is for every key head, 0 where a head has fewer.
        self._starts = np.zeros((self._heads, 0), np.int64)
        self._sizes = np.zeros((self._heads, 0), np.int64)
        self._summary: Tensor | None = None
        self._n_units, self._ragged = 0, False

    @abstractmethod
    def _moved(self, query: Tensor) -> bool:
        """Whether the query (Hk, g, d) asks for something else than the one before."""

    @abstractmethod
    def _units(self, keys: Tensor) -> tuple[Tensor | None, np.ndarray]:
        """Return an order of the tokens (Hk, n), None to leave it, and the sizes of the units (Hk, U) in that order."""

    @abstractmethod
    def _summaries(self, keys: Tensor, sizes: np.ndarray) -> Tensor:
        """Return what is kept of units (Hk, U, f) whose keys (Hk, n, d) lie one behind the other."""

    @abstractmethod
    def _scores(self, query: Tensor, summaries: Tensor, absent: Tensor | None, scale: float) -> Tensor:
        """Return the scores (Hk, U) of the units; ``absent`` marks those that are none."""

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self._sinks + self.pool.tokens + self._local

    @property
    def _end(self) -> int:
        return self._sinks + self._chosen + self._local

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Store a chunk of the prompt: its end stays local, what is before it becomes units."""
        self._close()
        self._fresh = True
        first = min(self.layout.sink - self._sinks, keys.shape[1])
        if first > 0:
            self._write(keys[:, :first], values[:, :first])
            self._sinks += first
            keys, values = keys[:, first:], values[:, first:]
        n = keys.shape[1]
        self._stay_dense(n)
        before = max(0, n - self.layout.buffer)
        if self._dense:
            if before:
                self._pieces.append((before, True))
            stay = 0
        else:
            if before:
                while self._pieces:
                    self._leave()
                self._form(keys[:, :before], values[:, :before])
            stay = before
        self._write(keys[:, stay:], values[:, stay:])
        self._local += n - stay
        self._pieces.extend((min(self.layout.piece, n - at), False) for at in range(before, n, self.layout.piece))
        if not self._dense:
            self._release()

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store a token, choose anew if the method has moved on, and attend to the working set."""
        moved = self._moved(query)
        self._stay_dense(1)
        if self._sinks < self.layout.sink:
            self._write(key, value)
            self._sinks += 1
        else:
            if self._open >= self.layout.longest or (moved and self._open >= self.layout.shortest):
                self._close()
            self._write(key, value)
            self._open += 1
            self._local += 1
        if not self._dense:
            self._release()
            if moved or self._fresh:
                self._choose(query.detach(), scale)
                self._fresh = False
                self.counts.selections += 1
            self.counts.sparse_steps += 1
        self.counts.steps += 1
        self.counts.tokens_read += self._end
        if self.layout.audit:
            self.counts.covered += self._covered(query.detach(), scale)
        seen = self._room[:, : self._end]
        return dense_step(query, seen[..., : self._dim], seen[..., self._dim :], scale)

    def visible(self) -> tuple[Tensor, Tensor]:
        """Return everything: sinks, pool, local part."""
        kept = self._room[:, : self._sinks], self._room[:, self._sinks + self._chosen : self._end]
        pooled = (block.to(self._room) for block in self.pool.blocks())
        rows = torch.cat((kept[0], *pooled, kept[1]), dim=1)
        return rows[..., : self._dim], rows[..., self._dim :]

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the units that are attended to now, (Hk, n, d) each."""
        rows = self._room[:, self._sinks : self._sinks + self._chosen]
        return rows[..., : self._dim], rows[..., self._dim :]

    def tensors(self) -> list[Tensor]:
        """Return working set, summaries, places of the units, and the pool where it lies in memory."""
        own = [self._room, torch.from_numpy(self._starts), torch.from_numpy(self._sizes)]
        return [*own, *([] if self._summary is None else [self._summary]), *self.pool.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes stored, in memory or in a file."""
        return self.resident_nbytes + self.pool.nbytes - self.pool.resident_nbytes

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory."""
        return super().nbytes

    def _stay_dense(self, more: int) -> None:
        """Leave the dense form if so many more tokens make the row too long for it."""
        if self._dense and self._end + more > self.layout.dense_below:
            self._dense, self._fresh = False, True
            self._release()
            if self._room.shape[1] > self._usual:
                self._resize(self._usual)

    def _close(self) -> None:
        if self._open:
            self._pieces.append((self._open, False))
            self._open = 0

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Put tokens at the end of the working set; the caller counts them."""
        end, n = self._end, keys.shape[1]
        self._make_room(end + n)
        self._room[:, end : end + n, : self._dim] = keys
        self._room[:, end : end + n, self._dim :] = values

    def _make_room(self, tokens: int) -> None:
        if tokens > self._room.shape[1]:
            # Beyond the usual size only while dense: then an eighth to spare, so that not every token moves all.
            self._resize(min(2 * tokens, self._usual) if tokens <= self._usual else tokens + tokens // 8)

    @property
    def _usual(self) -> int:
        """Most tokens of a working set, the new one included before any leave."""
        spec = self.layout
        return spec.sink + spec.budget + spec.buffer + max(spec.longest, spec.piece)

    def _resize(self, size: int) -> None:
        with torch.inference_mode(False):
            room = torch.empty(self._heads, size, self._room.shape[2], dtype=self._room.dtype, device=self._room.device)
        room[:, : self._end] = self._room[:, : self._end]
        self._room = room

    def _release(self) -> None:
        """Let pieces leave while the local part without them is still long enough."""
        while self._pieces and self._local - self._pieces[0][0] >= self.layout.buffer:
            self._leave()

    def _leave(self) -> None:
        """Make the oldest closed piece a unit; it stays in the working set if there is room for all of it."""
        size, formless = self._pieces.popleft()
        at = self._sinks + self._chosen
        rows = self._room[:, at : at + size]
        if formless:
            self._form(rows[..., : self._dim], rows[..., self._dim :])
        else:
            self._add(rows, np.full((self._heads, 1), size, np.int64))
        self._local -= size
        if self._chosen + size <= self.layout.budget:
            # Attended to from now on as the pool will give it back.
            rows.copy_(self.pool.pruned(rows))
            self._chosen += size
        else:
            self._move(at + size, at, self._local)

    def _move(self, start: int, to: int, n: int) -> None:
        """Move n records of the working set."""
        if n and start != to:
            self._room[:, to : to + n] = self._room[:, start : start + n].clone()

    def _form(self, keys: Tensor, values: Tensor) -> None:
        """Make units of tokens of a prompt, part by part."""
        n, piece = keys.shape[1], self.layout.piece
        self.pool.reserve(n)
        # Parts of about the same length, all but the last a whole number of pieces.
        parts = -(-n // self.layout.part)
        step = -(-n // (parts * piece)) * piece
        for at in range(0, n, step):
            some = keys[:, at : at + step]
            order, sizes = self._units(some)
            rows = torch.cat((some, values[:, at : at + step]), dim=-1)
            if order is not None:
                rows = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))
            self._add(rows, sizes)

    def _add(self, rows: Tensor, sizes: np.ndarray) -> None:
        """Store records (Hk, n, d) of units (Hk, U) that lie one behind the other."""
        first, n, old = self.pool.append(rows), rows.shape[1], self._n_units
        self._n_units += sizes.shape[1]
        if self._n_units > self._sizes.shape[1]:
            room = max(self._n_units, old + old // 4)
            self._starts, self._sizes = (_widened(a, old, room) for a in (self._starts, self._sizes))
        here = slice(old, self._n_units)
        self._sizes[:, here] = sizes
        self._starts[:, here] = first + n * np.arange(self._heads)[:, None] + sizes.cumsum(1) - sizes
        self._ragged |= not sizes.all()
        kept = self._summaries(rows[..., : self._dim].to(torch.promote_types(rows.dtype, torch.float32)), sizes)
        if self._summary is None or self._n_units > self._summary.shape[1]:
            with torch.inference_mode(False):
                summary = torch.empty(
                    self._heads, self._sizes.shape[1], kept.shape[2], dtype=kept.dtype, device=kept.device
                )
            if self._summary is not None:
                summary[:, :old] = self._summary[:, :old]
            self._summary = summary
        self._summary[:, here] = kept

    def _choose(self, query: Tensor, scale: float) -> None:
        """Fill the budget with the best units."""
        held, n = self.pool.tokens, self._n_units
        count = min(self.layout.budget, held)
        if count == held == self._chosen:
            return  # all of it is there
        if count != self._chosen:
            self._make_room(self._sinks + count + self._local)
            self._move(self._sinks + self._chosen, self._sinks + count, self._local)
            self._chosen = count
        if self._summary is None or count == held:
            scores = np.zeros((self._heads, n), np.float32)
        else:
            absent = torch.from_numpy(self._sizes[:, :n] == 0).to(query.device) if self._ragged else None
            wide = query.to(self._summary.dtype)
            scores = self._scores(wide, self._summary[:, :n], absent, scale).cpu().numpy()
        starts, counts = np.zeros((2, self._heads, min(n, count)), np.int64)

        def work(low: int, high: int) -> None:
            choose_units(scores, self._starts, self._sizes, count, starts, counts, low, high)

        parallel_ranges(work, self._heads, threads=None if n > _WORTH_THREADS else 1)
        self.pool.gather(starts, counts, self._room[:, self._sinks : self._sinks + count])

    def _covered(self, query: Tensor, scale: float) -> float:
        """Return the share of the full softmax that falls on the working set, mean over the query heads."""
        if self._chosen == self.pool.tokens:
            return 1.0
        wide = query.to(torch.promote_types(query.dtype, torch.float32)) * scale
        here = wide @ self._room[:, : self._end, : self._dim].to(wide).mT  # (Hk, g, W)
        chosen = slice(self._sinks, self._sinks + self._chosen)
        always = torch.cat((here[..., : chosen.start], here[..., chosen.stop :]), dim=-1).logsumexp(-1)
        pooled = [(wide @ block[..., : self._dim].to(wide).mT).logsumexp(-1) for block in self.pool.blocks()]
        seen = torch.logaddexp(always, here[..., chosen].logsumexp(-1))
        return float((seen - torch.logaddexp(always, torch.stack(pooled).logsumexp(0))).exp().mean())


def _widened(array: np.ndarray, held: int, room: int) -> np.ndarray:
    wider = np.zeros((array.shape[0], room), array.dtype)
    wider[:, :held] = array[:, :held]
    return wider
