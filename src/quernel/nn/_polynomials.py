"""Polynomials in place of functions inside kernels: interpolation at Chebyshev points, near the best in the maximum.

A kernel evaluates c_0 + t (c_1 + t (c_2 + ...)) with as many fused multiply-adds as its degree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev


def coefficients_of(function: Callable[..., Any], low: float, high: float, degree: int) -> list[float]:
    """Return the coefficients, lowest first, of the polynomial in t that stands for ``function`` on [low, high]."""
    middle, half = (low + high) / 2, (high - low) / 2
    series = chebyshev.cheb2poly(chebyshev.chebinterpolate(lambda t: function(middle + half * t), degree))
    power = np.polynomial.Polynomial(series)(np.polynomial.Polynomial([-middle / half, 1 / half]))
    return [float(c) for c in power.coef]
