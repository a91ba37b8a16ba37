"""Compiled steps of determinantal sampling: the chain rule over proposals, and Legendre polynomials.

``extend`` holds the whole of the chain rule, for every space: the points are proposed by the space, this decides which
of them are kept. The projection of a proposal on what was kept before is taken off twice, since norms lose their
accuracy where nearly everything is taken off.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Sums of squares and products may be taken in any order; NaN and infinities stay what they are.
REORDERED = {"reassoc", "contract", "nsz"}
# A residual below this share of the squared length is rounding, not a direction.
LEAST_SHARE = 1e-12
# By how much a rejection may be decided on the first pass: its rounding is some 1e-14.
SLACK = 1e-10


@njit(nogil=True, cache=True, fastmath=REORDERED)
def extend(rows: Array, uniforms: Array, basis: Array, filled: int, chosen: NDArray[np.int64]) -> int:
    """Keep each proposal with probability 1 - |Q phi|^2/|phi|^2, Q the projector on what was kept before.

    Parameters
    ----------
    rows : array, shape (p, m), C-contiguous
        phi of points drawn from nu.
    uniforms : array, shape (p,)
        Uniform in [0, 1), one a proposal.
    basis : array, shape (m, m), C-contiguous
        The first ``filled`` rows are orthonormal and span what was kept; further ones are written.
    filled : int
    chosen : array of int64, shape (m,)
        ``chosen[j]`` becomes the proposal that was kept as number j.

    Returns
    -------
    int
        How many are kept now, at most m; proposals after the m-th are not looked at.
    """
    m = rows.shape[1]
    residual = np.empty(m)
    for p in range(rows.shape[0]):
        if filled == m:
            break
        length = 0.0
        for k in range(m):
            residual[k] = rows[p, k]
            length += rows[p, k] * rows[p, k]
        threshold = uniforms[p] * length
        left = length
        for j in range(filled):
            dot = 0.0
            for k in range(m):
                dot += basis[j, k] * residual[k]
            for k in range(m):
                residual[k] -= dot * basis[j, k]
            left -= dot * dot
            # The norm only falls: what is below the threshold now is so at the end.
            if left < threshold - SLACK * length:
                break
        if left < threshold - SLACK * length:
            continue
        for j in range(filled):
            dot = 0.0
            for k in range(m):
                dot += basis[j, k] * residual[k]
            for k in range(m):
                residual[k] -= dot * basis[j, k]
        left = 0.0
        for k in range(m):
            left += residual[k] * residual[k]
        if left > threshold and left > LEAST_SHARE * length:
            scale = 1.0 / np.sqrt(left)
            for k in range(m):
                basis[filled, k] = residual[k] * scale
            chosen[filled] = p
            filled += 1
    return filled


@njit(nogil=True, cache=True, fastmath=False)
def legendre_table(x: Array, degree: int) -> Array:
    """Return sqrt(2j + 1) P_j(x_i) for j = 0 .. degree, shape (n, degree + 1): orthonormal for dx/2 on [-1, 1]."""
    table = np.empty((x.shape[0], degree + 1))
    for i in range(x.shape[0]):
        before, value = 0.0, 1.0
        table[i, 0] = 1.0
        for j in range(degree):
            before, value = value, ((2 * j + 1) * x[i] * value - j * before) / (j + 1)
            table[i, j + 1] = value * np.sqrt(2.0 * j + 3.0)
    return table


@njit(nogil=True, cache=True, fastmath=False)
def legendre_squares(x: Array, degrees: NDArray[np.int64]) -> Array:
    """Return (2j + 1) P_j(x_i)^2 with j = degrees_i, shape (n,)."""
    squares = np.empty(x.shape[0])
    for i in range(x.shape[0]):
        before, value = 0.0, 1.0
        for j in range(degrees[i]):
            before, value = value, ((2 * j + 1) * x[i] * value - j * before) / (j + 1)
        squares[i] = (2 * degrees[i] + 1) * value * value
    return squares


def _warmup() -> None:
    """Compile the kernels; ``quernel warmup`` calls it."""
    extend(np.ones((1, 1)), np.zeros(1), np.zeros((1, 1)), 0, np.zeros(1, np.int64))
    legendre_table(np.zeros(1), 1)
    legendre_squares(np.zeros(1), np.ones(1, np.int64))
