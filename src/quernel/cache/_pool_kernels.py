"""Compiled parts of retrieval: which units fill a budget, and their copy out of a pool.

Both run over a range of key heads without the GIL, so that threads share the heads.  A budget takes a few dozen of
thousands of units: a heap gives them in order without sorting the rest.
"""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(nogil=True, cache=True, fastmath=False)
def _before(scores: Any, a: Any, b: Any) -> Any:
    """Whether unit a comes before unit b: a larger score, and the older of equal ones."""
    return scores[a] > scores[b] or (scores[a] == scores[b] and a < b)


@njit(nogil=True, cache=True, fastmath=False)
def _sink(heap: Any, n: Any, at: Any, scores: Any) -> None:
    """Let the unit at a place of the heap of n sink until its children come after it."""
    unit = heap[at]
    child = 2 * at + 1
    while child < n:
        if child + 1 < n and _before(scores, heap[child + 1], heap[child]):
            child += 1
        if not _before(scores, heap[child], unit):
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = unit


@njit(nogil=True, cache=True, fastmath=False)
def choose_units(
    scores: Any, starts: Any, sizes: Any, budget: Any, from_starts: Any, from_counts: Any, low: Any, high: Any
) -> None:
    """Write the ranges of tokens that fill the budget of key heads low to high, the best unit first.

    scores: (Hk, U)  starts, sizes: (Hk, >= U) int64, size 0 where a head has no such unit
    from_starts, from_counts: (Hk, R) int64 of zeros, R >= min(U, budget).  Of the last unit the newest tokens are
    taken, which stand at its end.
    """
    units = scores.shape[1]
    heap = sizes[0, :units].copy()
    for h in range(low, high):
        n = 0
        for u in range(units):
            if sizes[h, u] > 0:
                heap[n] = u
                n += 1
        for at in range(n // 2 - 1, -1, -1):
            _sink(heap, n, at, scores[h])
        left, r = budget, 0
        while left > 0 and n > 0:
            u = heap[0]
            taken = min(left, sizes[h, u])
            from_starts[h, r] = starts[h, u] + sizes[h, u] - taken
            from_counts[h, r] = taken
            left -= taken
            r += 1
            n -= 1
            heap[0] = heap[n]
            _sink(heap, n, 0, scores[h])


@njit(nogil=True, cache=True, fastmath=False)
def copy_ranges(
    source: Any, first: Any, width: Any, starts: Any, counts: Any, out: Any, stride: Any, low: Any, high: Any
) -> None:
    """Copy those ranges of records that lie in this source, one behind the other for each key head.

    source: (records * width,) words, its first record numbered ``first``  starts, counts: (Hk, R) int64, a count of 0
    ends a head's ranges  out: flat words, those of head h from h * stride on.  A range lies in one source as a whole.
    """
    records = source.shape[0] // width
    for h in range(low, high):
        to = h * stride
        for r in range(counts.shape[1]):
            n = counts[h, r] * width
            if n == 0:
                break
            record = starts[h, r] - first
            if 0 <= record < records:
                # Slices first: indices that count from zero need no test for negative ones, and the copy vectorises.
                a, b = source[record * width : record * width + n], out[to : to + n]
                for i in range(n):
                    b[i] = a[i]
            to += n
