"""Slow, readable oracle of ROAST: the weight by its definition, number by number."""

from __future__ import annotations

import numpy as np

from tests.reference.hashing import fastrange, mix64, sign_at, tile_slot


def weight(values, shape, tile, seed, *, signs=True, order="n-major"):
    """Return W, without a scale, from an array of m numbers."""

    def start(a, b):
        return fastrange(mix64(seed, a, b), len(values) - tile[0] * tile[1] + 1)

    w = np.empty(shape, dtype=values.dtype)
    for n in range(shape[0]):
        for k in range(shape[1]):
            slot, position = tile_slot(n, k, shape, tile, order, start)
            w[n, k] = values[slot] * (sign_at(seed, position) if signs else 1)
    return w
