"""Where a funnel keeps its vectors: prefixes of unit length in panels, to scan them all; whole rows, to rerank a few.

A slice of a wide matrix is read at the cost of its whole cache lines, so prefixes lie by themselves, as the scan reads
them. Both stores hold float32, float16, or int8 with a scale a vector, and score in float32 what they hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import Arrays, take
from quernel._growing import GrowingArray
from quernel.search._best_keys import bars_at, best_slots, rerank, sorted_best
from quernel.search._panel_kernels import PANEL, scan_panels
from quernel.search._stored_numbers import VectorType, encoded

# One panel of so many is looked at first, to guess a bar that few items pass.
_SAMPLED = 16
# The guess is the score of rank MARGIN k / SAMPLED + SPARE in the sample: about MARGIN k items pass, and that fewer
# than k do is a matter of one query in some thousands, which is then scanned without a guess.
_MARGIN, _SPARE = 2, 8
# Numbers of decoded candidates at a time, 4 MB.
_DECODED = 2**20

Vectors = NDArray[np.float32]
Slots = NDArray[np.int64]


class PrefixPanels:
    """The first ``width`` coordinates of vectors, divided by their length, in panels of 64 vectors.

    Parameters
    ----------
    width : int
    dtype : {"float32", "float16", "int8"}
    """

    def __init__(self, width: int, dtype: VectorType) -> None:
        self.width, self.dtype = width, dtype
        self._full = GrowingArray(np.zeros((0, width, PANEL), dtype))
        self._scales = GrowingArray(np.zeros(0, np.float32))
        # Full panels and the one that is being filled, exchanged together: a search may be under way.
        self._held = self._full.rows, self._full.rows
        self._n = 0

    def append(self, rows: Vectors) -> None:
        """Store the prefixes of rows (n, >= width) for the next slots."""
        codes, scales = encoded(unit_rows(rows[:, : self.width]), self.dtype)
        begun = self._n % PANEL
        if begun:
            codes = np.concatenate([self._held[1][0].T[:begun], codes])
        self._n += len(rows)
        whole = len(codes) // PANEL * PANEL
        if whole:
            self._full.append(codes[:whole].reshape(-1, PANEL, self.width).transpose(0, 2, 1))
        last = np.zeros((int(len(codes) > whole), self.width, PANEL), self.dtype)
        if len(last):
            last[0, :, : len(codes) - whole] = codes[whole:].T
        if scales is not None:
            self._scales.append(scales)
        self._held = self._full.rows, last

    def shortlist(self, queries: Vectors, k: int, alive: NDArray[np.bool_]) -> Slots:
        """Return the slots of the ``k`` best inner products, (n, k), in no order; -1 where there are fewer."""
        slots = np.empty((len(queries), k), np.int64)
        best_slots(*self._scanned(queries, k, alive), slots)
        return slots

    def top_k(self, queries: Vectors, k: int, alive: NDArray[np.bool_]) -> tuple[Vectors, Slots]:
        """Return the ``k`` best inner products and slots, (n, k), best first; NaN and -1 where there are fewer."""
        scores, slots = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        sorted_best(*self._scanned(queries, k, alive), scores, slots)
        return scores, slots

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        full, last = self._held
        held = {"prefixes": np.concatenate([full, last]) if len(last) else full}
        return held | ({"prefix_scales": self._scales.rows} if self.dtype == "int8" else {})

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take the prefixes of ``n`` slots out of the arrays of a file."""
        panels = take(arrays, "prefixes", self.dtype, (-(-n // PANEL), self.width, PANEL))
        whole = n // PANEL
        # What is being filled is this object's own: a file may be mapped and not writable.
        self._full, self._n = GrowingArray(panels[:whole]), n
        self._held = self._full.rows, panels[whole:].copy()
        if self.dtype == "int8":
            self._scales = GrowingArray(take(arrays, "prefix_scales", np.float32, (n,)))

    def _scanned(self, queries: Vectors, k: int, alive: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Slots]:
        """Return each query's list of keys, the best among them, and how many it holds."""
        n, held, scales = len(alive), self._held, self._scales.rows
        cut = np.ascontiguousarray(queries[:, : self.width])
        bars = np.full(len(cut), -np.inf, np.float32)
        rank = _MARGIN * k // _SAMPLED + _SPARE
        if 4 * rank * _SAMPLED < n:
            bars_at(*self._passed(cut, held, _SAMPLED, scales, alive, rank, bars), rank, bars)
        keys, counts = self._passed(cut, held, 1, scales, alive, k, bars)
        short = np.flatnonzero(counts < min(k, int(np.count_nonzero(alive)))) if np.isfinite(bars).any() else ()
        if len(short):
            bars[short] = -np.inf
            keys[short], counts[short] = self._passed(cut[short], held, 1, scales, alive, k, bars[short])
        return keys, counts

    def _passed(
        self,
        queries: Vectors,
        panels: tuple[NDArray[Any], NDArray[Any]],
        step: int,
        scales: Vectors,
        alive: NDArray[np.bool_],
        k: int,
        bars: Vectors,
    ) -> tuple[NDArray[np.int64], Slots]:
        """Return lists of the items of every ``step``-th panel that are above the bars."""
        keys, counts = np.empty((len(queries), 4 * k + PANEL), np.int64), np.zeros(len(queries), np.int64)
        full, last = (part.view(np.uint16) if self.dtype == "float16" else part for part in panels)
        rising = bars.copy()
        scan_panels(queries, full[: -(-len(alive) // PANEL)], step, scales, 0, alive, k, keys, counts, rising)
        if step == 1 and len(full) * PANEL < len(alive):
            scan_panels(queries, last, 1, scales, len(full) * PANEL, alive, k, keys, counts, rising)
        return keys, counts


class VectorRows:
    """Whole vectors by slot.

    Parameters
    ----------
    dim : int
    dtype : {"float32", "float16", "int8"}
    """

    def __init__(self, dim: int, dtype: VectorType) -> None:
        self.dim, self.dtype = dim, dtype
        self._rows = GrowingArray(np.zeros((0, dim), dtype))
        self._scales = GrowingArray(np.zeros(0, np.float32))

    def append(self, rows: Vectors) -> None:
        """Store rows (n, dim) for the next slots; refuses what float16 cannot hold before anything is stored."""
        codes, scales = encoded(rows, self.dtype)
        self._rows.append(codes)
        if scales is not None:
            self._scales.append(scales)

    def rerank(self, queries: Vectors, slots: Slots, k: int, width: int, *, unit: bool) -> tuple[Vectors, Slots]:
        """Return the ``k`` best of the candidates (n, m) by their first ``width`` coordinates, best first.

        ``unit`` divides by the length of these; what is stored is not changed.
        """
        n, m = slots.shape
        scores, best = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
        keys = np.empty(m, np.int64)
        if self.dtype == "float32":
            rerank(queries, self._rows.rows, slots, slots, width, unit, keys, scores, best)
            return scores, best
        step = max(1, _DECODED // (m * width))
        for start in range(0, n, step):
            part = slice(start, start + step)
            places = slots[part].ravel()
            decoded = self._decoded(np.maximum(places, 0), width)
            local = np.arange(len(places)).reshape(-1, m)
            rerank(queries[part], decoded, local, slots[part], width, unit, keys, scores[part], best[part])
        return scores, best

    def vectors(self) -> Vectors:
        """Return what is stored, decoded, (N, dim); the array itself where it is float32."""
        rows: Vectors = self._rows.rows
        return rows if self.dtype == "float32" else self._decoded(np.arange(len(rows)), self.dim)

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        scales = {"vector_scales": self._scales.rows} if self.dtype == "int8" else {}
        return {"vectors": self._rows.rows, **scales}

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take the vectors of ``n`` slots out of the arrays of a file."""
        self._rows = GrowingArray(take(arrays, "vectors", self.dtype, (n, self.dim)))
        if self.dtype == "int8":
            self._scales = GrowingArray(take(arrays, "vector_scales", np.float32, (n,)))

    def _decoded(self, slots: Slots, width: int) -> Vectors:
        rows = self._rows.rows[slots, :width].astype(np.float32)
        return rows * self._scales.rows[slots, None] if self.dtype == "int8" else rows


def unit_rows(rows: Vectors) -> Vectors:
    """Return rows divided by their lengths; rows of zeros stay.

    Examples
    --------
    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).round(2).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
