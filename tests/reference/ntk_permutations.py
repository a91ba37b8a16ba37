"""Kernels of wide networks by their definitions, pair by pair; training step by step; wrong coordinates by loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy.integrate import quad
from scipy.stats import norm

Scalar = Callable[[float], float]


def relu_averages(a: float, b: float, c: float) -> tuple[float, float]:
    """Return E[relu(u) relu(v)] and E[step(u) step(v)] by integrating over the angle; the radius gives 1 and 1/2."""
    t = math.acos(max(-1.0, min(1.0, c / math.sqrt(a * b))))
    low, high = t - math.pi / 2, math.pi / 2  # where both cosines are positive
    if high <= low:
        return 0.0, 0.0
    value = quad(lambda s: math.cos(s) * math.cos(s - t), low, high, epsabs=1e-13)[0]
    return math.sqrt(a * b) * value / math.pi, (high - low) / (2 * math.pi)


def hermite_average(f: Callable[[np.ndarray], np.ndarray], a: float, b: float, c: float, nodes: int = 120) -> float:
    """Return E[f(u) f(v)] of a smooth f by a Gauss-Hermite rule in two dimensions."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    u = math.sqrt(a) * z
    v = c / math.sqrt(a) * z[:, None] + math.sqrt(max(b - c * c / a, 0.0)) * z[None, :]
    return float(w * f(u) @ f(v) @ w)


def erf_averages(a: float, b: float, c: float) -> tuple[float, float]:
    """Return E[erf(u) erf(v)] and E[erf'(u) erf'(v)]."""
    from scipy.special import erf

    return (
        hermite_average(erf, a, b, c),
        hermite_average(lambda z: 2 / math.sqrt(math.pi) * np.exp(-(z**2)), a, b, c),
    )


def kernels(
    x: np.ndarray, y: np.ndarray, depth: int, averages: Callable[..., tuple[float, float]], sw: float, sb: float
) -> tuple[float, float]:
    """Return the NNGP kernel and the NTK of two points by the recursion over layers."""
    a, b, c = (sb**2 + sw**2 * float(p @ q) / len(x) for p, q in ((x, x), (y, y), (x, y)))
    ntk = c
    for _ in range(depth):
        value, slope = averages(a, b, c)
        a, b = (sb**2 + sw**2 * averages(v, v, v)[0] for v in (a, b))
        c = sb**2 + sw**2 * value
        ntk = c + sw**2 * slope * ntk
    return c, ntk


def descent(ntk: np.ndarray, cross: np.ndarray, y: np.ndarray, lr: float, steps: int, ridge: float) -> np.ndarray:
    """Return the outputs at new points after steps of gradient descent of the linearised model, from outputs of 0.

    The parameters are theta = theta_0 + J^T alpha with J of all points; weight decay pulls towards theta_0.
    """
    alpha = np.zeros_like(y)
    for _ in range(steps):
        alpha = alpha - lr * ((ntk @ alpha - y) + ridge * alpha)
    return cross @ alpha


def all_inputs(k: int) -> np.ndarray:
    """Return all 2^k - 1 inputs but 0."""
    return np.array(list(itertools.product((0, 1), repeat=k)))[1:]


def errors_of_one(k: int, n: int, m: int, moments: tuple[Scalar, Scalar, Scalar], cut: Scalar) -> float:
    """Return the expected number of wrong coordinates of one input with m ones; moments: on, off, variance of m."""
    on, off, variance = (part(m) for part in moments)
    spread = math.sqrt(variance / n)
    return m * norm.sf((on - cut(m)) / spread) + (k - m) * norm.sf((cut(m) - off) / spread)


def errors_of_all(k: int, n: int, last: int, moments: tuple[Scalar, Scalar, Scalar], cut: Scalar) -> float:
    """Return the same, summed over all inputs with 2 to ``last`` ones."""
    return sum(math.comb(k, m) * errors_of_one(k, n, m, moments, cut) for m in range(2, last + 1))


def trained(
    hidden: np.ndarray, output: np.ndarray, y: np.ndarray, lr: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of one two-layer network after gradient descent on basis vectors, gradients by hand."""
    (n, k), x = hidden.shape, np.eye(hidden.shape[1])
    for _ in range(steps):
        pre = x @ hidden.T / math.sqrt(k)
        active = np.maximum(pre, 0)
        error = active @ output.T / math.sqrt(n) - y
        back = (error @ output / math.sqrt(n)) * (pre > 0)
        output, hidden = output - lr * error.T @ active / math.sqrt(n), hidden - lr * back.T @ x / math.sqrt(k)
    return hidden, output
