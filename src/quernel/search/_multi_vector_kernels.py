"""Kernels of ``MultiVectorIndex``: maxima over the vectors of a text, and votes of the lists that a query visits.

``add_maxima`` takes the products of one block of vectors with all query vectors while they are still in the cache.
``vote`` goes through inverted lists, best first: of each query vector a text gets the score of the best list that it
is met in, over the worst one visited.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# A maximum of numbers that were checked to be finite; sums in the order that suits the vectors.
_FASTMATH = {"contract", "reassoc"}


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def add_maxima(
    products: Any, scales: Any, offsets: Any, base: Any, asked: Any, best: Any, out: Any, a: Any, b: Any
) -> None:
    """Write the scores of texts [a, b) for all queries to ``out``.

    products: (rows, M), row j for vector ``base + j`` and column m for query vector m; scales: (rows,) or empty.
    asked: (n + 1,) where each query begins; best: (M,) workspace; out: (n, texts).
    """
    width = products.shape[1]
    scaled = len(scales) > 0
    for text in range(a, b):
        first, stop = offsets[text] - base, offsets[text + 1] - base
        for row in range(first, stop):
            factor = scales[row] if scaled else np.float32(1.0)
            if row == first:
                for m in range(width):
                    best[m] = products[row, m] * factor
            else:
                for m in range(width):
                    value = products[row, m] * factor
                    best[m] = value if value > best[m] else best[m]
        for q in range(len(asked) - 1):
            total = np.float32(0.0)
            for m in range(asked[q], asked[q + 1]):
                total += best[m]
            out[q, text] = total


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def add_rough_maxima(
    products: Any, offsets: Any, base: Any, asked: Any, best: Any, bits: Any, out: Any, a: Any, b: Any
) -> None:
    """Do the same for products in bfloat16, given as int16 of the same bits.

    Flipping all but the sign of negative ones makes their integers ascend as they do, and again undoes it.
    best: (M,) int16 and bits: (M,) int32 workspaces.
    """
    width = products.shape[1]
    values = bits.view(np.float32)
    for text in range(a, b):
        for m in range(width):
            best[m] = np.int16(-32768)
        for row in range(offsets[text] - base, offsets[text + 1] - base):
            for m in range(width):
                key = _ascending(products[row, m])
                best[m] = key if key > best[m] else best[m]
        for m in range(width):
            bits[m] = np.int32(_ascending(best[m])) << 16
        for q in range(len(asked) - 1):
            total = np.float32(0.0)
            for m in range(asked[q], asked[q + 1]):
                total += values[m]
            out[q, text] = total


@njit(nogil=True, cache=True, fastmath=False)
def _ascending(half: Any) -> Any:
    return np.int16(half ^ np.int16(np.int16(half >> 15) & np.int16(0x7FFF)))


@njit(nogil=True, cache=True, fastmath=False)
def vote(nearest: Any, near: Any, offsets: Any, texts: Any, alive: Any, votes: Any, stamps: Any, touched: Any) -> Any:
    """Add up the votes of one query; returns how many texts were met, whose numbers stand in ``touched``.

    nearest, near: (m, probes) lists of each query vector, best first, and their scores; offsets, texts: the lists.
    votes, stamps: (slots,) zeros before; whoever calls puts zeros back where ``touched`` says.
    """
    met = np.int64(0)
    for i in range(nearest.shape[0]):
        floor = near[i, near.shape[1] - 1]
        for p in range(nearest.shape[1]):
            gain = near[i, p] - floor
            for e in range(offsets[nearest[i, p]], offsets[nearest[i, p] + 1]):
                text = np.int64(texts[e])
                if stamps[text] == i + 1 or not alive[text]:
                    continue
                if stamps[text] == 0:
                    touched[met] = text
                    met += 1
                stamps[text] = i + 1
                votes[text] += gain
    return met


@njit(nogil=True, cache=True, fastmath=False)
def clear_votes(votes: Any, stamps: Any, touched: Any, met: Any) -> None:
    """Put zeros back."""
    for i in range(met):
        votes[touched[i]] = 0.0
        stamps[touched[i]] = 0


@njit(nogil=True, cache=True, fastmath=False)
def pairs_of(lists: Any, offsets: Any, first: Any) -> Any:
    """Return list and text of every pair of them, each pair once; sorts ``lists`` within each text.

    lists: (rows,) the list of each vector of the texts from number ``first`` on; offsets: (texts + 1,) into them.
    """
    listed, texts = np.empty(len(lists), np.int32), np.empty(len(lists), np.int32)
    held = 0
    for i in range(len(offsets) - 1):
        own = lists[offsets[i] : offsets[i + 1]]
        own.sort()
        for j in range(len(own)):
            if j == 0 or own[j] != own[j - 1]:
                listed[held], texts[held] = own[j], first + i
                held += 1
    return listed[:held], texts[:held]
