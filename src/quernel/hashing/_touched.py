"""Counting where a query touches little of a large array: what was touched is listed, and only that is zeroed after.

``count_touched`` adds one to a counter each and notes the counters that were zero; ``sort_by_count`` is a stable
counting sort of what was noted, most counted first; ``clear_touched`` leaves the counters as it found them. Between two
queries every counter is zero, so the arrays come from ``_threads.workspace(..., zeroed=True)`` and are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath=False)
def count_touched(values: Any, start: Any, stop: Any, counts: Any, touched: Any, n: Any) -> Any:
    """Count ``values[start:stop]`` and return how many counters have been touched, ``n`` of them before.

    counts: integers, zero where never touched; touched: int32, one place more than there are counters.
    """
    for j in range(start, stop):
        value = np.int64(values[j])
        # Written always, kept only where the counter was zero: no branch to mispredict.
        touched[n] = value
        n += np.int64(counts[value] == 0)
        counts[value] += 1
    return n


@njit(nogil=True, cache=True, fastmath=False)
def sort_by_count(touched: Any, n: Any, counts: Any, order: Any, ends: Any) -> None:
    """Write the first ``n`` touched values to ``order``, the most counted first.

    ends: (largest count + 2,) int64, overwritten: those counted c times are ``order[ends[c + 1] : ends[c]]``, in the
    order in which they were touched. A reader who wants them ascending sorts the stretch that he reads, not all.
    """
    ends[:] = 0
    for i in range(n):
        ends[counts[touched[i]]] += 1
    total = np.int64(0)
    for c in range(len(ends) - 2, 0, -1):
        held = ends[c]
        ends[c] = total
        total += held
    for i in range(n):
        c = counts[touched[i]]
        order[ends[c]] = touched[i]
        ends[c] += 1


@njit(nogil=True, cache=True, fastmath=False)
def clear_touched(touched: Any, n: Any, counts: Any) -> None:
    """Put the first ``n`` touched counters back to zero."""
    for i in range(n):
        counts[touched[i]] = 0
