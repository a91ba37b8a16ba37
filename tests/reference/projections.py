"""Projections one fused multiply-add at a time, each rounded once to float32, in NumPy float64 arithmetic."""

import numpy as np


def fma32(a, b, c):
    """Return a b + c of float32 arrays, rounded once.

    The product is exact in float64; the sum is rounded to odd there, so that rounding it again to float32 is as
    rounding the exact sum.
    """
    product, addend = np.float64(a) * np.float64(b), np.float64(c)
    total = product + addend
    other = total - product
    error = (product - (total - other)) + (addend - other)
    bits = np.ascontiguousarray(total).view(np.int64).copy()
    inexact = (error != 0) & (bits & 1 == 0)
    bits[inexact] += np.where((error > 0) == (total > 0), 1, -1)[inexact]
    return bits.view(np.float64).astype(np.float32)


def project(x, directions):
    """Return x directions^T, summed over coordinates in order; x: (n, dim), directions: (m, dim), float32."""
    total = np.zeros((len(x), len(directions)), np.float32)
    for k in range(x.shape[1]):
        total = fma32(x[:, None, k], directions[None, :, k], total)
    return total


def project_sparse(x, places, weights):
    """Return sparse projections in float32, product and sum each rounded."""
    total = np.zeros((len(x), len(places)), np.float32)
    for j in range(places.shape[1]):
        total = total + weights[:, j] * x[:, places[:, j]]
    return total
