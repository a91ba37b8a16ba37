"""Sums over the points of each model, where the kernel values of a block of points stand in the cache.

score = -max(0, a^T K a - 2 sum_n a_n mean_i k(z_n, x_i) + mean_ij k(x_i, x_j)),  a = beta, or weighted by the prompt
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

# Sums may be taken in any order; NaN and infinity do not occur.
_FASTMATH = {"reassoc", "contract", "nsz"}


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def mean_over_images(values: Any, images: Any, out: Any) -> None:
    """Average the columns of each query.

    values: (rows, columns); images: (n + 1,) where the columns of each query begin; out: (rows, n).
    """
    for row in range(values.shape[0]):
        for q in range(out.shape[1]):
            total = np.float32(0.0)
            for i in range(images[q], images[q + 1]):
                total += values[row, i]
            out[row, q] = total / np.float32(images[q + 1] - images[q])


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def plain_scores(near: Any, weights: Any, norms: Any, selves: Any, offsets: Any, out: Any) -> None:
    """Write the scores of models [0, m), whose points are the rows of ``near``, with their own weights.

    near: (rows, n) mean kernel of each point with the images of each query; weights: (rows,); norms: (m,), each
    beta^T K beta; selves: (n,) of the queries; offsets: (m + 1,) where each model begins; out: (n, m).
    """
    first = offsets[0]
    for t in range(len(offsets) - 1):
        for q in range(near.shape[1]):
            cross = np.float32(0.0)
            for row in range(offsets[t] - first, offsets[t + 1] - first):
                cross += weights[row] * near[row, q]
            value = norms[t] - np.float32(2.0) * cross + selves[q]
            out[q, t] = -max(value, np.float32(0.0))


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def weighted_scores(
    near: Any, cosines: Any, weights: Any, grams: Any, places: Any, selves: Any, sharpness: Any, offsets: Any,
    a: Any, out: Any,
) -> None:  # fmt: skip
    """Do the same with weights that a prompt decides.

    cosines: (rows, n) of the prompts of points and queries; grams: all K of these models, flat; places: (m + 1,) where
    each K begins, from places[0] on; sharpness: 1 / T; a: (most points of a model,) workspace.
    """
    first = offsets[0]
    for t in range(len(offsets) - 1):
        start, size = offsets[t] - first, offsets[t + 1] - offsets[t]
        for q in range(near.shape[1]):
            largest = np.float32(-4.0)  # below every cosine; points of no weight do not count
            for i in range(size):
                if weights[start + i] > 0.0:
                    largest = max(largest, cosines[start + i, q])
            total = np.float32(0.0)
            for i in range(size):
                # A point of no weight may have a larger cosine: its exponential must not overflow.
                away = min(cosines[start + i, q] - largest, np.float32(0.0))
                a[i] = weights[start + i] * np.float32(math.exp(sharpness * away))
                total += a[i]
            cross, square = np.float32(0.0), np.float32(0.0)
            for i in range(size):
                cross += a[i] * near[start + i, q]
                row = places[t] - places[0] + i * size
                across = np.float32(0.0)
                for j in range(size):
                    across += grams[row + j] * a[j]
                square += a[i] * across
            value = square / (total * total) - np.float32(2.0) * cross / total + selves[q]
            out[q, t] = -max(value, np.float32(0.0))


def _warmup() -> None:
    """Compile the sums; ``quernel warmup`` calls it."""
    near, one, ends = np.ones((1, 1), np.float32), np.ones(1, np.float32), np.array([0, 1])
    mean_over_images(near, ends, near.copy())
    plain_scores(near, one, one, one, ends, near.copy())
    weighted_scores(near, near, one, one, ends, one, np.float32(1.0), ends, one.copy(), near.copy())
