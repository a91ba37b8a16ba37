"""Vectors or sets kept beside an approximate index, and the true scores of the few candidates of every query.

Vectors: n dim float32, normalised for the cosine; a candidate costs one product of dim terms. Sets: sorted and without
repeats, so that an intersection is one merge. A pair is scored alone, so it scores the same beside any others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import FormatError
from quernel._growing import GrowingArray
from quernel._threads import parallel_ranges
from quernel.hashing import Sets
from quernel.search._index import Scores
from quernel.search.flat import normalized

# Sums may be taken in the order that suits the vectors; NaN stays NaN.
_FASTMATH = {"contract", "reassoc"}
# Candidates of a query are few and long: every query is worth a thread.
_GRAIN = 4


class KeptVectors:
    """Vectors by slot and their true scores."""

    def __init__(self, dim: int, metric: str) -> None:
        self.dim, self.metric = dim, metric
        self._vectors = GrowingArray(np.zeros((0, dim), np.float32))

    def append(self, rows: NDArray[np.float32]) -> None:
        """Keep rows for the next slots."""
        self._vectors.append(self._prepared(rows))

    @property
    def rows(self) -> NDArray[np.float32]:
        """The vectors by slot, a view."""
        held: NDArray[np.float32] = self._vectors.rows
        return held

    def keep(self, alive: NDArray[np.bool_]) -> None:
        """Drop the others; slots are numbered again."""
        self._vectors = GrowingArray(self._vectors.rows[alive])

    def scores(self, queries: NDArray[np.float32], slots: NDArray[np.int64]) -> Scores:
        """Return the true scores of slots (n, m); NaN where a slot is -1."""
        rows, out = self._prepared(queries), np.full(slots.shape, np.nan, np.float32)
        kernel = _distances if self.metric == "l2" else _products
        parallel_ranges(lambda a, b: kernel(rows, self._vectors.rows, slots, out, a, b), len(rows), grain=_GRAIN)
        return out

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        return {"vectors": self._vectors.rows}

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take the vectors of ``n`` slots out of the arrays of a file."""
        self._vectors = GrowingArray(take(arrays, "vectors", np.float32, (n, self.dim)))

    def check(self) -> None:
        """Any numbers are vectors."""

    def _prepared(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return normalized(rows) if self.metric == "cosine" else rows


class KeptSets:
    """Sets by slot and their Jaccard similarities."""

    def __init__(self) -> None:
        self._offsets = GrowingArray(np.zeros(1, np.int64))
        self._items = GrowingArray(np.zeros(0, np.int64))

    def append(self, sets: Sets) -> None:
        """Keep sets for the next slots."""
        clean = without_repeats(sets)
        self._offsets.append(clean.offsets[1:] + self._offsets.rows[-1])
        self._items.append(clean.items)

    def keep(self, alive: NDArray[np.bool_]) -> None:
        """Drop the others; slots are numbered again."""
        sizes = np.diff(self._offsets.rows)
        self._items = GrowingArray(self._items.rows[np.repeat(alive, sizes)])
        self._offsets = GrowingArray(np.concatenate([[0], np.cumsum(sizes[alive])]).astype(np.int64))

    def scores(self, queries: Sets, slots: NDArray[np.int64]) -> Scores:
        """Return the true similarities of slots (n, m); NaN where a slot is -1."""
        asked, out = without_repeats(queries), np.full(slots.shape, np.nan, np.float32)
        held = self._offsets.rows, self._items.rows
        parallel_ranges(
            lambda a, b: _overlaps(asked.offsets, asked.items, *held, slots, out, a, b), len(slots), grain=_GRAIN
        )
        return out

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        return {"set_offsets": self._offsets.rows, "set_items": self._items.rows}

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take the sets of ``n`` slots out of the arrays of a file."""
        self._offsets = GrowingArray(take(arrays, "set_offsets", np.int64, (n + 1,)))
        self._items = GrowingArray(take(arrays, "set_items", np.int64, (None,)))

    def check(self) -> None:
        """Raise a ``FormatError`` where the offsets do not divide the items into sets."""
        offsets, items = self._offsets.rows, self._items.rows
        if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) <= 0).any():
            raise FormatError("array 'set_offsets' does not divide array 'set_items' into sets")


def without_repeats(sets: Sets) -> Sets:
    """Return sets whose items ascend, each once.

    Examples
    --------
    >>> clean = without_repeats(Sets.of([[3, 1, 3], [2]]))
    >>> clean.offsets.tolist(), clean.items.tolist()
    ([0, 2, 3], [1, 3, 2])
    """
    owners = np.repeat(np.arange(len(sets)), np.diff(sets.offsets))
    order = np.lexsort((sets.items, owners))
    owners, items = owners[order], sets.items[order]
    first = np.ones(len(items), bool)
    first[1:] = (owners[1:] != owners[:-1]) | (items[1:] != items[:-1])
    sizes = np.bincount(owners[first], minlength=len(sets))
    return Sets(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), items[first])


def best_scored(scores: Scores, slots: NDArray[np.int64], k: int) -> tuple[Scores, NDArray[np.int64]]:
    """Return the k best of each row, best first, equal ones by slot; missing ones (-1, NaN) stand last."""
    order = np.lexsort((slots, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def _products(rows: Any, vectors: Any, slots: Any, out: Any, start: Any, stop: Any) -> None:
    for i in range(start, stop):
        for j in range(slots.shape[1]):
            slot = slots[i, j]
            if slot >= 0:
                total = np.float32(0.0)
                for c in range(rows.shape[1]):
                    total += rows[i, c] * vectors[slot, c]
                out[i, j] = total


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def _distances(rows: Any, vectors: Any, slots: Any, out: Any, start: Any, stop: Any) -> None:
    """Minus the Euclidean distances, from differences: equal vectors are at distance zero."""
    for i in range(start, stop):
        for j in range(slots.shape[1]):
            slot = slots[i, j]
            if slot >= 0:
                total = np.float32(0.0)
                for c in range(rows.shape[1]):
                    gap = rows[i, c] - vectors[slot, c]
                    total += gap * gap
                out[i, j] = -np.sqrt(total)


@njit(nogil=True, cache=True, fastmath=False)
def _overlaps(
    asked_offsets: Any, asked: Any, offsets: Any, items: Any, slots: Any, out: Any, start: Any, stop: Any
) -> None:
    for i in range(start, stop):
        for j in range(slots.shape[1]):
            slot = slots[i, j]
            if slot < 0:
                continue
            a, b, shared = asked_offsets[i], offsets[slot], 0
            while a < asked_offsets[i + 1] and b < offsets[slot + 1]:
                if asked[a] == items[b]:
                    shared += 1
                    a += 1
                    b += 1
                elif asked[a] < items[b]:
                    a += 1
                else:
                    b += 1
            union = asked_offsets[i + 1] - asked_offsets[i] + offsets[slot + 1] - offsets[slot] - shared
            out[i, j] = np.float32(shared) / np.float32(union)
