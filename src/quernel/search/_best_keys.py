"""The best of many scored items, in one order everywhere: larger scores first, equal ones by slot.

An item is one integer, its score above its slot turned round: larger keys are better items, and no two are equal.
Candidates that are known are scored here, one row of a matrix after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from quernel._intrinsics import Emitter, keyed

# Sums may be taken in the order that suits the vectors; NaN stays NaN.
_FASTMATH = {"contract", "reassoc"}
# Turns the bits of a negative float round, so that integers compare as the floats do.
_FLIP = np.int32(0x7FFFFFFF)
_SLOTS = np.int64(0xFFFFFFFF)
# Candidates whose rows are fetched ahead.
_AHEAD = 4


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Fetch the cache line of an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emitter(builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@njit(nogil=True, cache=True, fastmath=False)
def key_of(bits: Any, slot: Any) -> Any:
    """Return the key of an item from the bits of its score, int32, and its slot below 2 ** 32."""
    rank = bits if bits >= 0 else bits ^ _FLIP
    return (np.int64(rank) << 32) | (_SLOTS - np.int64(slot))


@njit(nogil=True, cache=True, fastmath=False)
def bits_of(key: Any) -> Any:
    """Return the bits of the score in a key."""
    rank = np.int32(key >> 32)
    return rank if rank >= 0 else rank ^ _FLIP


@njit(nogil=True, cache=True, fastmath=False)
def score_of(key: Any) -> Any:
    """Return the score in a key."""
    one = np.empty(1, np.int32)
    one[0] = bits_of(key)
    return one.view(np.float32)[0]


@njit(nogil=True, cache=True, fastmath=False)
def largest_first(keys: Any, n: Any, k: Any) -> None:
    """Bring the ``k`` largest of the first ``n`` keys to the front; the smallest of them stands last, at k - 1."""
    low, high = 0, n - 1
    while low < high:
        pivot = keys[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


@njit(nogil=True, cache=True, fastmath=False)
def bars_at(keys: Any, held: Any, k: Any, bars: Any) -> None:
    """Write the score of each row's ``k``-th best key; minus infinity where there are fewer."""
    for i in range(bars.shape[0]):
        bars[i] = -np.inf
        if held[i] >= k:
            largest_first(keys[i], held[i], k)
            bars[i] = score_of(keys[i, k - 1])


@njit(nogil=True, cache=True, fastmath=False)
def best_slots(keys: Any, held: Any, slots: Any) -> None:
    """Write the slots (n, k) of each row's ``k`` best keys, in no order; -1 where there are fewer."""
    for i in range(slots.shape[0]):
        count = min(held[i], slots.shape[1])
        largest_first(keys[i], held[i], count)
        for j in range(slots.shape[1]):
            slots[i, j] = _SLOTS - (keys[i, j] & _SLOTS) if j < count else -1


@njit(nogil=True, cache=True, fastmath=False)
def sorted_best(keys: Any, held: Any, scores: Any, slots: Any) -> None:
    """Write scores and slots (n, k) of each row's best keys, best first; NaN and -1 where there are fewer."""
    for i in range(slots.shape[0]):
        _write_sorted(keys[i], held[i], scores[i], slots[i])


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def rerank(
    queries: Any, vectors: Any, rows: Any, slots: Any, width: Any, unit: Any, keys: Any, scores: Any, best: Any
) -> None:
    """Score candidates by their first ``width`` coordinates and write the best of each row, best first.

    queries: (n, >= width); vectors: (N, >= width), contiguous; rows: (n, m) where in ``vectors`` the candidates stand;
    slots: (n, m) their slots, -1 for none; unit: divide by the length of the prefix; keys: (m,) scratch; scores, best:
    (n, k).
    """
    one = np.empty(1, np.float32)
    bits = one.view(np.int32)
    pitch, lines = 4 * vectors.shape[1], (4 * width + 63) // 64
    for i in range(slots.shape[0]):
        count = 0
        for j in range(slots.shape[1]):
            # Rows are far apart: without this a thread waits for the memory at each.
            if j + _AHEAD < slots.shape[1]:
                address = vectors.ctypes.data + pitch * rows[i, j + _AHEAD]
                for line in range(lines):
                    _prefetch(address + 64 * line)
            if slots[i, j] >= 0:
                one[0] = _scored(queries[i], vectors[rows[i, j]], width, unit) + np.float32(0.0)
                if not np.isnan(one[0]):
                    keys[count] = key_of(bits[0], slots[i, j])
                    count += 1
        _write_sorted(keys, count, scores[i], best[i])


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def _scored(q: Any, x: Any, width: Any, unit: Any) -> Any:
    total = np.float32(0.0)
    if not unit:
        for c in range(width):
            total += q[c] * x[c]
        return total
    square = np.float32(0.0)
    for c in range(width):
        total += q[c] * x[c]
        square += x[c] * x[c]
    # A prefix of zeros has no direction: it scores zero.
    return total / np.sqrt(square) if square > 0 else np.float32(0.0)


@njit(nogil=True, cache=True, fastmath=False)
def _write_sorted(keys: Any, n: Any, scores: Any, slots: Any) -> None:
    k = slots.shape[0]
    count = min(n, k)
    largest_first(keys, n, count)
    keys[:count].sort()
    bits = scores.view(np.int32)
    for j in range(k):
        if j < count:
            key = keys[count - 1 - j]
            bits[j] = bits_of(key)
            slots[j] = _SLOTS - (key & _SLOTS)
        else:
            scores[j] = np.nan
            slots[j] = -1


def _warmup() -> None:
    """Compile selection and rerank; ``quernel warmup`` calls it."""
    scores, best = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int64)
    keys, held = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
    bars_at(keys, held, 1, scores[0])
    best_slots(keys, held, best)
    sorted_best(keys, held, scores, best)
    rerank(scores, scores, best, best, 1, False, keys[0], scores, best)
