"""How the constants of the fast GELU were found: a minimax polynomial for a root of the normal tail.

GELU(y) = max(y, 0) - a F(-a), a = |y|. ``fit`` looks for P with P(a)^power ~= F(-a) on [0, end] that minimises the
largest |a F(-a) - a P(a)^power| / (a F(-a) + floor): absolute error where the remainder is large, relative in the
tail. Gauss-Newton steps for the power, Lawson's reweighting for the maximum.
"""

import math

import numpy as np
from scipy.special import expit, ndtr

POINTS, STEPS = 1000, 200


def normal_tail(a):
    return ndtr(-a)


def tanh_tail(a):
    return expit(-2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))


def worst(coefficients, tail, end, power, floor=1e-3):
    """Return the weighted maximal error of a polynomial, lowest coefficient first, in float64."""
    a = np.linspace(0, end, 20001)
    remainder = a * tail(a)
    p = np.polynomial.polynomial.polyval(a, coefficients)
    return np.abs((remainder - a * p**power) / (remainder + floor)).max()


def fit(tail, end, degree, power, floor=1e-3):
    """Return coefficients, lowest first."""
    nodes = np.cos(np.linspace(0, np.pi, POINTS))
    a = (1 + nodes) / 2 * end
    remainder = a * tail(a)
    weight = 1 / (remainder + floor)
    basis = np.polynomial.chebyshev.chebvander(nodes, degree)
    start = remainder + floor
    found = np.linalg.lstsq(basis * start[:, None], tail(a) ** (1 / power) * start, rcond=None)[0]
    lawson, best, least = np.ones(POINTS), found, np.inf
    for step in range(STEPS):
        p = basis @ found
        error = weight * (remainder - a * p**power)
        largest = np.abs(error).max()
        if largest < least:
            best, least = found.copy(), largest
        lawson *= np.abs(error) / largest + 1e-6
        lawson /= lawson.sum()
        root = np.sqrt(lawson)
        slope = (weight * a * power * p ** (power - 1))[:, None] * basis
        change = np.linalg.lstsq(slope * root[:, None], error * root, rcond=None)[0]
        found = found + (0.5 if step < 6 else 1.0) * change
    chebyshev = np.polynomial.Chebyshev(best, domain=[0, end])
    return chebyshev.convert(kind=np.polynomial.Polynomial).coef
