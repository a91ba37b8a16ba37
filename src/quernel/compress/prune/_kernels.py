"""Jitted loops over the channels that are left; NumPy would make half a dozen passes over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

TILE = 32


@njit(nogil=True, cache=True, fastmath=False)
def nearest(adding: Any, averaging: Any, share: Any, rows: Any, live: Any, zero: float, near: Any, gap: Any) -> None:
    """Find the nearest other live channel of some rows, and its squared distance.

    adding, averaging: (n, n) Gram matrices  share: (n,) weight of a channel's adding entries
    rows: (r,) and live: (l,) indices  near: (n,) int64 and gap: (n,) float64, written at ``rows``
    """
    diagonal = np.empty(len(near))
    for j in live:
        diagonal[j] = adding[j, j] * share[j] * share[j] + averaging[j, j]
    for i in rows:
        gap[i] = np.inf
        for j in live:
            distance = diagonal[i] + diagonal[j] - 2.0 * (adding[i, j] * share[i] * share[j] + averaging[i, j])
            if distance < zero:
                distance = 0.0
            if distance < gap[i] and i != j:
                gap[i] = distance
                near[i] = j


@njit(nogil=True, cache=True, fastmath=False)
def add_symmetric(gram: Any, half: Any, live: Any) -> None:
    """Add half + half^T to the live rows and columns: gram (n, n), half (l, l), live (l,)."""
    # Square tiles, so that the transposed reads stay in the first-level cache.
    for top in range(0, len(live), TILE):
        for left in range(0, len(live), TILE):
            for a in range(top, min(top + TILE, len(live))):
                for b in range(left, min(left + TILE, len(live))):
                    gram[live[a], live[b]] += half[a, b] + half[b, a]
