"""Modules by their definitions, slow and readable: the int8 linear layer in NumPy, element by element."""

import math

import numpy as np
from scipy.special import erf, expit

ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: 0.5 * y * (1 + erf(y / math.sqrt(2))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y * expit(y),
}


def quantise_row(row, inverse, levels, alpha):
    """Return the codes (Python ints) and the step of one row, in float32 arithmetic; the row must be finite."""
    row = np.float32(row)
    scaled = row if inverse is None else row * np.float32(inverse)
    peak = np.float32(max((abs(v) for v in (scaled if alpha is None else row)), default=0))
    if alpha is not None and peak >= 1e-36:
        peak = np.float32(float(peak) ** alpha)
    if peak < 1e-36:
        return [0] * len(row), np.float32(0)
    levels = np.float32(levels)
    factor = levels / peak
    # Python's round is half to even, as np.rint.
    codes = [max(-int(levels), min(int(levels), round(float(np.float32(v * factor))))) for v in scaled]
    return codes, peak / levels


def int8_linear(x, codes, scale, bias=None, inverse=None, levels=127, alpha=None, activation=None):
    """Return y (float64), the activation codes and the integer sums, from float32 x (n, k) and int codes (m, k)."""
    n, m = len(x), len(codes)
    quantised = [quantise_row(row, inverse, levels, alpha) for row in x]
    sums = [[sum(int(a) * int(b) for a, b in zip(q, w, strict=True)) for w in codes] for q, _ in quantised]
    y = np.zeros((n, m))
    for i, (_, step) in enumerate(quantised):
        for k in range(m):
            y[i, k] = sums[i][k] * float(step) * float(scale[k]) + (0.0 if bias is None else float(bias[k]))
    return ACTIVATIONS[activation](y), [q for q, _ in quantised], sums
