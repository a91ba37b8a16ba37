"""Features or rows, rounded to a lattice and summed in one pass; the same bits for a row in any company.

A private sum must move by no more than what one record contributes, so the contribution of a row may not depend on the
rows beside it: everything here is plain IEEE arithmetic in float64, element by element, without fused or reordered
operations, and cos^2 + sin^2 = 1 up to 1e-12 for any angle, also one that is not a number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Adding and subtracting it rounds to the nearest integer, halves to even.
_MAGIC = 1.5 * 2.0**52
_TWO_OVER_PI = 0.6366197723675814
# pi / 2 in three parts; products of the first two with integers below 2^20 are exact.
_FIRST, _SECOND, _THIRD = 1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21
# Beyond it a float64 has no fraction worth an angle.
_LARGEST = 2.0**40
# Sums of squares may be taken in another order; the order does not depend on other rows.
REORDERED = {"reassoc", "nsz"}
# Taylor's coefficients: below 1e-13 on [-pi / 4, pi / 4].
_S3, _S5, _S7, _S9, _S11, _S13 = -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800
_C2, _C4, _C6, _C8 = -1 / 2, 1 / 24, -1 / 720, 1 / 40320
_C10, _C12, _C14 = -1 / 3628800, 1 / 479001600, -1 / 87178291200


@njit(nogil=True, cache=True, fastmath=False)
def _cos_sin(angle: Any) -> Any:
    wide = np.float64(angle)
    a = wide if abs(wide) < _LARGEST else 0.0
    k = (a * _TWO_OVER_PI + _MAGIC) - _MAGIC
    r = ((a - k * _FIRST) - k * _SECOND) - k * _THIRD
    # The quadrant, -2 .. 2.
    m = k - 4.0 * ((k * 0.25 + _MAGIC) - _MAGIC)
    z = r * r
    s = r + r * z * (_S3 + z * (_S5 + z * (_S7 + z * (_S9 + z * (_S11 + z * _S13)))))
    c = 1.0 + z * (_C2 + z * (_C4 + z * (_C6 + z * (_C8 + z * (_C10 + z * (_C12 + z * _C14))))))
    odd = abs(m) == 1.0
    cosine = s if odd else c
    sine = c if odd else s
    # cos: c, -s, -c, s and sin: s, c, -s, -c for the quadrants 0, 1, +-2, -1.
    cosine = -cosine if abs(m + 0.5) > 1.0 else cosine
    sine = -sine if abs(m - 0.5) > 1.0 else sine
    return cosine, sine


@njit(nogil=True, cache=True, fastmath=False)
def add_pairs(angles: Any, labels: Any, steps: Any, totals: Any, start: Any, stop: Any) -> None:
    """Add round(steps cos) and round(steps sin) of the columns [start, stop) of every row to the totals of its label.

    angles: (n, J or more); labels: (n,) int64; steps: (J,) float64; totals: (C, 2 J) float64, integers
    below 2^53.
    """
    half, n = totals.shape[1] // 2, stop - start
    # Through a buffer: what is computed is then surely apart from what is read, and becomes vector code.
    held = np.empty((2, n))
    cosines, sines, scales = held[0], held[1], steps[start:stop]
    for i in range(labels.shape[0]):
        row = angles[i, start:stop]
        for j in range(n):
            c, s = _cos_sin(row[j])
            cosines[j] = (c * scales[j] + _MAGIC) - _MAGIC
            sines[j] = (s * scales[j] + _MAGIC) - _MAGIC
        total = totals[labels[i]]
        for j in range(n):
            total[start + j] += cosines[j]
        for j in range(n):
            total[half + start + j] += sines[j]


@njit(nogil=True, cache=True, fastmath=False)
def write_pairs(angles: Any, amplitudes: Any, out: Any, start: Any, stop: Any) -> None:
    """Write amplitudes cos and amplitudes sin of the rows [start, stop); angles: (n, J or more), out: (n, 2 J)."""
    half = out.shape[1] // 2
    for i in range(start, stop):
        row, cosines, sines = angles[i], out[i, :half], out[i, half:]
        for j in range(half):
            c, s = _cos_sin(row[j])
            cosines[j] = c * amplitudes[j]
            sines[j] = s * amplitudes[j]


@njit(nogil=True, cache=True, fastmath=False)
def add_rows(x: Any, labels: Any, scale: Any, totals: Any, start: Any, stop: Any) -> None:
    """Add round(scale x) of the columns [start, stop) of every row (n, d) to the totals (C, d) of its label."""
    held = np.empty(stop - start)
    for i in range(labels.shape[0]):
        row = x[i, start:stop]
        for j in range(stop - start):
            held[j] = (np.float64(row[j]) * scale + _MAGIC) - _MAGIC
        total = totals[labels[i]]
        for j in range(stop - start):
            total[start + j] += held[j]


@njit(nogil=True, cache=True, fastmath=REORDERED)
def row_squares(x: Any, out: Any, start: Any, stop: Any) -> None:
    """Write squared lengths (n,) of the rows [start, stop), in float64."""
    for i in range(start, stop):
        total = 0.0
        for j in range(x.shape[1]):
            wide = np.float64(x[i, j])
            total += wide * wide
        out[i] = total


def projected(rows: Floats, axes: Floats) -> Floats:
    """Return ``rows @ axes.T``, each row rounded in the same way whatever rows are beside it.

    A BLAS product is not: near the edge of a leaf a row would then move others to the next one, which no declared
    sensitivity covers.
    """
    # In C order the sums run along a row; in Fortran order they would be taken in another order.
    rows = np.ascontiguousarray(rows)
    return np.stack([(rows * axis).sum(1) for axis in axes], 1)


def _warmup() -> None:
    """Compile the kernels for float32 and float64."""
    for dtype in (np.float32, np.float64):
        angles = np.zeros((2, 3), dtype)
        add_pairs(angles, np.zeros(2, np.int64), np.ones(3), np.zeros((1, 6)), 0, 3)
        write_pairs(angles, np.ones(3), np.zeros((2, 6), dtype), 0, 2)
        add_rows(angles, np.zeros(2, np.int64), 1.0, np.zeros((1, 3)), 0, 3)
        row_squares(angles, np.zeros(2), 0, 2)
