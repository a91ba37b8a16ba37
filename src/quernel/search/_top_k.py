"""The k largest of a row of scores, in one pass; equal scores in the order of their slots."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._threads import parallel_ranges


def top_k(scores: NDArray[np.float32], k: int, alive: NDArray[np.bool_]) -> tuple[Any, Any]:
    """Return the k best scores of each row and their slots, best first; NaN and -1 where there are fewer.

    Parameters
    ----------
    scores : array, shape (n, N), float32
        Larger is better; NaN is never taken.
    k : int
    alive : array, shape (N,), bool
        Which columns count.
    """
    best = np.full((len(scores), k), np.nan, np.float32)
    slots = np.full((len(scores), k), -1, np.int64)
    rows = np.ascontiguousarray(scores, dtype=np.float32)
    parallel_ranges(lambda start, stop: _scan(rows, alive, best, slots, start, stop), len(rows))
    return best, slots


@njit(nogil=True, cache=True, fastmath=False)
def _scan(scores: Any, alive: Any, best: Any, slots: Any, start: Any, stop: Any) -> None:
    for i in range(start, stop):
        held = 0
        for j in range(scores.shape[1]):
            if alive[j]:
                held = keep_best(best[i], slots[i], held, scores[i, j], j)


@njit(nogil=True, cache=True, fastmath=False)
def keep_best(best: Any, slots: Any, held: Any, score: Any, slot: Any) -> Any:
    """Insert a score into the sorted first ``held`` entries of ``best`` if it belongs there; return the new ``held``.

    An equal score that came earlier stays in front. NaN is left out.
    """
    k = best.shape[0]
    if np.isnan(score) or (held == k and not score > best[k - 1]):
        return held
    place = held if held < k else k - 1
    while place > 0 and best[place - 1] < score:
        best[place] = best[place - 1]
        slots[place] = slots[place - 1]
        place -= 1
    best[place] = score
    slots[place] = slot
    return min(held + 1, k)


def _warmup() -> None:
    """Compile the scan; ``quernel warmup`` calls it."""
    top_k(np.zeros((1, 1), np.float32), 1, np.ones(1, bool))
