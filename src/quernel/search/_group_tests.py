"""``GroupTests``: the core of FLINNG without a hash family: codes and groups of items in, items by group tests out.

Every group of every repetition owns a distance-sensitive Bloom filter: bit (t, c) is set when a member has code c in
table t. The filters are held inverted, as the sorted cells of every (t, c), each cell once. Items added later wait in
linked lists and are read together with the sorted ones, as if they had been sorted in; they are once they outgrow a
tenth of the rest. So the answer depends on what is there, not on how it came.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import FormatError, QuernelError
from quernel._growing import GrowingArray
from quernel._threads import parallel_ranges
from quernel.hashing import BucketTables
from quernel.hashing._chains import Chains
from quernel.search._flinng_kernels import Sorted, Tail, answer_rows, scratch

# Items that may wait, whatever is there: sorting costs a pass over all buckets, also of an index of ten items.
FEW = 1024
# Queries worth a thread of their own.
_GRAIN = 8


class GroupTests:
    """Codes, groups and the two inversions that a query reads.

    Parameters
    ----------
    n_rows, n_groups : int
        Repetitions R and groups B of each.
    n_tables, n_codes : int
        Tables L and the range of their codes.
    """

    def __init__(self, n_rows: int, n_groups: int, n_tables: int, n_codes: int) -> None:
        self.n_rows, self.n_groups, self.n_tables, self.n_codes = n_rows, n_groups, n_tables, n_codes
        self._codes = GrowingArray(np.zeros((0, n_tables), narrow(n_codes)))
        self._groups = GrowingArray(np.zeros((0, n_rows), narrow(n_groups)))
        # Most indexes never have a tail; its heads, eight bytes a bucket, are made when something waits.
        self._chains: tuple[Chains, Chains] | None = None
        self._tail_cells: GrowingArray
        self.sort()

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def codes(self) -> NDArray[Any]:
        """Codes of all items, (n, L)."""
        return self._codes.rows

    @property
    def groups(self) -> NDArray[Any]:
        """Groups of all items, (n, R)."""
        return self._groups.rows

    @property
    def waiting(self) -> int:
        """Items that are not sorted in yet."""
        return len(self) - self._sorted

    def append(self, codes: NDArray[Any], groups: NDArray[Any]) -> None:
        """Add items: codes (n, L) and groups (n, R)."""
        self._codes.append(codes)
        self._groups.append(groups)
        if not self._sorted or self.waiting > max(FEW, self._sorted // 10):
            self.sort()
            return
        if self._chains is None:
            self._chains = Chains(self.n_tables, self.n_codes), Chains(self.n_rows, self.n_groups)
        for chains, rows in zip(self._chains, (self.codes, self.groups), strict=True):
            chains.append(rows[-len(codes) :])
        self._tail_cells.append(self._cells(self.groups[-len(codes) :]))

    def regroup(self, groups: NDArray[Any], n_groups: int) -> None:
        """Give all items other groups; the next ``append`` sorts them."""
        self.n_groups = n_groups
        self._groups = GrowingArray(groups)
        self._sorted, self._chains = 0, None

    def sort(self) -> None:
        """Sort everything, what waits included."""
        self._tables = BucketTables.build(self.codes, self.n_codes, values=self._cells(self.groups))
        self._members = BucketTables.build(self.groups, self.n_groups)
        self._empty_tail()

    def answer(self, codes: NDArray[Any], k: int, alive: NDArray[np.bool_]) -> tuple[NDArray[np.float32], Any, Any]:
        """Return scores, slots and the cells that decided, (n, k) each, for queries of codes (n, L).

        NaN and -1 where fewer items were met. Items of one score stand in the order of their cells, then of slots.
        """
        scores = np.full((len(codes), k), np.nan, np.float32)
        slots, last = (np.full((len(codes), k), -1, np.int64) for _ in range(2))
        held = Sorted(self._tables.offsets, self._tables.items, self._members.offsets, self._members.items)
        links = [(c.heads, c.nexts) for c in self._chains or ()] or [_no_links(self.n_tables), _no_links(self.n_rows)]
        tail = Tail(self._sorted, *links[0], *links[1], self._tail_cells.rows)

        def work(start: int, stop: int) -> None:
            mine = scratch(self.n_tables, self.n_rows * self.n_groups, len(self), tail=self.waiting > 0)
            answer_rows(codes, self.n_codes, self.n_rows, held, tail, alive, mine, scores, slots, last, start, stop)

        parallel_ranges(work, len(codes), grain=_GRAIN)
        return scores, slots, last

    def list_lengths(self) -> NDArray[np.int64]:
        """Return how many cells every (table, code) lists, those that wait left out; (L, n_codes)."""
        return np.diff(self._tables.offsets).reshape(self.n_tables, self.n_codes)

    def arrays(self) -> Arrays:
        """Return what a file holds, and after it, under names of their own, the links of items that wait."""
        held: Arrays = {
            "codes": self.codes,
            "groups": self.groups,
            "table_offsets": self._tables.offsets,
            "table_cells": self._tables.items,
            "cell_offsets": self._members.offsets,
            "cell_items": self._members.items,
        }
        for name, chains in zip(("tables", "cells"), self._chains or (), strict=False):
            held |= {f"{name}_{part}": getattr(chains, part) for part in ("heads", "lasts", "nexts")}
        return held | ({"tail_cells": self._tail_cells.rows} if self._chains else {})

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take ``n`` sorted items out of the arrays of a file; shapes are checked, contents by ``check``."""
        cells, codes = self.n_rows * self.n_groups, self.n_tables * self.n_codes
        self._codes = GrowingArray(take(arrays, "codes", narrow(self.n_codes), (n, self.n_tables)))
        self._groups = GrowingArray(take(arrays, "groups", narrow(self.n_groups), (n, self.n_rows)))
        offsets = take(arrays, "table_offsets", np.int64, (codes + 1,))
        self._tables = BucketTables(offsets, take(arrays, "table_cells", narrow(cells), (None,)), self.n_codes)
        offsets = take(arrays, "cell_offsets", np.int64, (cells + 1,))
        items = take(arrays, "cell_items", np.int32, (n * self.n_rows,))
        self._members = BucketTables(offsets, items, self.n_groups)
        self._empty_tail()

    def check(self) -> None:
        """Raise a ``FormatError`` where a number points outside its array; a kernel would follow it."""
        cells = self.n_rows * self.n_groups
        for name, values, limit in (
            ("codes", self.codes, self.n_codes),
            ("groups", self.groups, self.n_groups),
            ("table_cells", self._tables.items, cells),
            ("cell_items", self._members.items, len(self)),
        ):
            if values.size and not (values.min() >= 0 and values.max() < limit):
                raise FormatError(
                    f"array {name!r} must hold numbers below {limit}; got {values.min()} to {values.max()}"
                )
        for name, tables in (("table_offsets", self._tables), ("cell_offsets", self._members)):
            offsets = tables.offsets
            if offsets[0] != 0 or offsets[-1] != len(tables.items) or (np.diff(offsets) < 0).any():
                raise FormatError(f"array {name!r} does not divide its {len(tables.items)} entries into buckets")

    def _cells(self, groups: NDArray[Any]) -> NDArray[Any]:
        """Number the cells: r B + u."""
        first = np.arange(self.n_rows, dtype=np.int64) * self.n_groups
        return (groups + first).astype(narrow(self.n_rows * self.n_groups))

    def _empty_tail(self) -> None:
        self._sorted, self._chains = len(self), None
        self._tail_cells = GrowingArray(self._cells(self.groups[:0]))


def _no_links(width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.zeros(0, np.int32), np.zeros((0, width), np.int32)


def narrow(limit: int) -> np.dtype[Any]:
    """Return the dtype that numbers below ``limit`` are kept in."""
    return np.dtype(np.uint16 if limit <= 2**16 else np.uint32 if limit > 2**31 else np.int32)


def code_rows(name: str, x: Any, width: int | None, limit: int) -> NDArray[Any]:
    """Return rows of non-negative integers below ``limit``, in the dtype in which they are kept."""
    rows = np.asarray(x)
    rows = rows[None] if rows.ndim == 1 and width is not None else rows
    if rows.ndim != 2 or rows.dtype.kind not in "iu" or width not in (None, rows.shape[1]):
        shape = f"(n, {'tables' if width is None else width})"
        raise QuernelError(f"{name} must be integers of shape {shape}; got {rows.dtype} of shape {rows.shape}")
    if rows.size and not (rows.min() >= 0 and rows.max() < limit):
        raise QuernelError(f"{name} must lie in [0, {limit}); got {rows.min()} to {rows.max()}")
    return np.ascontiguousarray(rows, dtype=narrow(limit))
