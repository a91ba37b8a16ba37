"""Kernels of FLINNG: groups of slots, and the answer to one query after another over scratch that is kept.

A query counts, for every cell (repetition r, group u, numbered r B + u), the tables in which one of its members shares
the query's code; then cells are visited, most counted first, and an item is emitted once it was met in a visited cell
of every repetition. Equal counts are visited by ascending cell, members by ascending item, so the answer is one
sequence whatever the threads. Cost: L lists, the members of the visited cells, and nothing for what was not touched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._threads import workspace
from quernel.hashing._touched import clear_touched, count_touched, sort_by_count
from quernel.hashing.mixers import U64, fastrange_small, mix64_step


class Sorted(NamedTuple):
    """Items in sorted tables: cells by (table, code), and items by cell."""

    table_offsets: NDArray[np.int64]
    table_cells: NDArray[Any]
    cell_offsets: NDArray[np.int64]
    cell_items: NDArray[np.int32]


class Tail(NamedTuple):
    """Items that wait to be sorted, numbered from ``first``: links by (table, code) and by cell, and their cells."""

    first: int
    heads: NDArray[np.int32]
    nexts: NDArray[np.int32]
    cell_heads: NDArray[np.int32]
    cell_nexts: NDArray[np.int32]
    cells: NDArray[Any]


class Scratch(NamedTuple):
    """Arrays of one thread; the counters are zero between queries."""

    counts: NDArray[Any]
    stamps: NDArray[np.int32]
    touched: NDArray[np.int32]
    order: NDArray[np.int32]
    ends: NDArray[np.int64]
    hits: NDArray[np.uint8]
    seen: NDArray[np.int32]


def scratch(n_tables: int, n_cells: int, n_items: int, *, tail: bool) -> Scratch:
    """Return this thread's scratch for an index of so many tables, cells and items."""
    import torch

    # Counts go up to L: a byte would overflow silently beyond 255 tables.
    wide = n_tables > 255
    counts = workspace("flinng", n_cells, torch.int16 if wide else torch.uint8, zeroed=True).numpy()
    stamps = workspace("flinng stamps", n_cells if tail else 0, torch.int32, zeroed=True).numpy()
    hits = workspace("flinng hits", n_items, torch.uint8, zeroed=True).numpy()
    # One workspace for three lists: asking for one costs a single query microseconds.
    lists = workspace("flinng lists", 2 * n_cells + n_items + 2, torch.int32).numpy()
    touched, order, seen = lists[: n_cells + 1], lists[n_cells + 1 : 2 * n_cells + 1], lists[2 * n_cells + 1 :]
    ends = np.empty(n_tables + 2, np.int64)
    return Scratch(counts.view(np.uint16) if wide else counts, stamps, touched, order, ends, hits, seen)


@njit(nogil=True, cache=True, fastmath=False)
def assign_groups(state: Any, each: Any, n_parts: Any, first: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the groups of slots ``first + i`` to rows [start, stop) of ``out``.

    Slot P j + p is number j of part p, whose groups are p B to p B + B - 1: p B + fastrange(mix64(seed, j, r), B).
    """
    for i in range(start, stop):
        j, part = divmod(first + i, n_parts)
        slot = mix64_step(state, U64(j))
        for r in range(out.shape[1]):
            out[i, r] = U64(part) * each + fastrange_small(mix64_step(slot, U64(r)), each)


@njit(nogil=True, cache=True, fastmath=False)
def answer_rows(
    codes: Any,
    n_codes: Any,
    n_rows: Any,
    held: Any,
    tail: Any,
    alive: Any,
    s: Any,
    scores: Any,
    slots: Any,
    last: Any,
    a: Any,
    b: Any,
) -> None:
    """Answer queries [a, b): codes (n, L); scores, slots and last cells (n, k), which hold NaN and -1 before.

    A score is the smallest count of the item's cells over L, and that cell the one where it was met last.
    """
    n_tables = codes.shape[1]
    per_row, buckets = (len(held.cell_offsets) - 1) // n_rows, np.empty(n_tables, np.int64)
    for q in range(a, b):
        # The first cell of every list is read before any is counted, so that their cache misses overlap; the sum is
        # written somewhere, or the compiler would leave the reading out.
        early = np.int64(0)
        for t in range(n_tables):
            buckets[t] = t * n_codes + np.int64(codes[q, t])
            start = held.table_offsets[buckets[t]]
            if start < held.table_offsets[buckets[t] + 1]:
                early += np.int64(held.table_cells[start])
        s.ends[0] = early
        touched = np.int64(0)
        for t in range(n_tables):
            start, stop = held.table_offsets[buckets[t]], held.table_offsets[buckets[t] + 1]
            touched = count_touched(held.table_cells, start, stop, s.counts, s.touched, touched)
            if len(tail.nexts):
                touched = _count_tail(held.table_cells, start, stop, tail, buckets[t], t, s, touched)
        sort_by_count(s.touched, touched, s.counts, s.order, s.ends)
        seen = _visit(n_tables, n_rows, per_row, held, tail, alive, s, scores[q], slots[q], last[q])
        clear_touched(s.touched, touched, s.counts)
        clear_touched(s.seen, seen, s.hits)
        if len(tail.nexts):
            clear_touched(s.touched, touched, s.stamps)


@njit(nogil=True, cache=True, fastmath=False)
def _count_tail(cells: Any, start: Any, stop: Any, tail: Any, bucket: Any, t: Any, s: Any, touched: Any) -> Any:
    """Count the cells of waiting items in one bucket, unless the table has counted them already."""
    row = np.int64(tail.heads[bucket])
    if row < 0:
        return touched
    for j in range(start, stop):
        s.stamps[cells[j]] = t + 1
    while row >= 0:
        for r in range(tail.cells.shape[1]):
            cell = np.int64(tail.cells[row, r])
            if s.stamps[cell] != t + 1:
                s.stamps[cell] = t + 1
                s.touched[touched] = cell
                touched += np.int64(s.counts[cell] == 0)
                s.counts[cell] += 1
        row = np.int64(tail.nexts[row, t])
    return touched


@njit(nogil=True, cache=True, fastmath=False)
def _visit(
    n_tables: Any,
    n_rows: Any,
    per_row: Any,
    held: Any,
    tail: Any,
    alive: Any,
    s: Any,
    scores: Any,
    slots: Any,
    last: Any,
) -> Any:
    """Visit cells by decreasing count until the answer is full; returns how many items were seen."""
    seen, found = np.int64(0), np.int64(0)
    for count in range(n_tables, 0, -1):
        stretch = s.order[s.ends[count + 1] : s.ends[count]]
        if len(stretch) > 1:
            stretch.sort()
        score = np.float32(count) / np.float32(n_tables)
        for i in range(len(stretch)):
            cell = np.int64(stretch[i])
            for j in range(held.cell_offsets[cell], held.cell_offsets[cell + 1]):
                item = np.int64(held.cell_items[j])
                if _met(item, s, seen) == n_rows and alive[item]:
                    scores[found], slots[found], last[found] = score, item, cell
                    found += 1
                    if found == len(slots):
                        return seen + 1
                seen += np.int64(s.hits[item] == 1)
            if len(tail.nexts):
                row = np.int64(tail.cell_heads[cell])
                while row >= 0:
                    item = tail.first + row
                    if _met(item, s, seen) == n_rows and alive[item]:
                        scores[found], slots[found], last[found] = score, item, cell
                        found += 1
                        if found == len(slots):
                            return seen + 1
                    seen += np.int64(s.hits[item] == 1)
                    row = np.int64(tail.cell_nexts[row, cell // per_row])
    return seen


@njit(nogil=True, cache=True, fastmath=False)
def _met(item: Any, s: Any, seen: Any) -> Any:
    """Note an item in the list of those seen, and return in how many visited cells it was now."""
    s.seen[seen] = item
    s.hits[item] += 1
    return np.int64(s.hits[item])
