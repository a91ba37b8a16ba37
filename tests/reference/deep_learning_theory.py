"""The theory of deep networks the slow way: adaptive integrals, and random networks that are counted.

``networks`` draws every matrix. ``preactivations`` draws from the same law without matrices: given the layer before,
the neurons of a layer are independent and normal, z' = c z + N(0, C_b + C_W mean s(z)^2), so a network costs n
numbers a layer instead of n^2. A test holds one against the other.
"""

import itertools
import math

import numpy as np
from scipy import integrate


def average(f, variance, kinks=()):
    """Return E f(z), z ~ N(0, variance), by adaptive integration between kinks."""
    deviation = math.sqrt(variance)
    edges = sorted({-12.0, 0.0, 12.0, *(k / deviation for k in kinks if abs(k) < 12 * deviation)})

    def density(x):
        return float(f(deviation * x)) * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    parts = (integrate.quad(density, a, b, epsabs=1e-13, limit=200)[0] for a, b in itertools.pairwise(edges))
    return sum(parts)


def pair_average(f, g, left, right, cross, points=801):
    """Return E f(u) g(v) on a fine grid of both variables; f, g take arrays."""
    x = np.linspace(-9, 9, points)
    weight = np.exp(-(x**2) / 2)
    weight /= weight.sum()
    slope = cross / math.sqrt(left)
    rest = math.sqrt(max(right - slope**2, 0.0))
    inner = np.array([(g(slope * u + rest * x) * weight).sum() for u in x])
    return float((f(math.sqrt(left) * x) * inner * weight).sum())


def networks(s, count, width, depth, weight, bias, power, draw, residual=0.0):
    """Return preactivations of every layer of random networks for one input of mean square ``power``; (L, count, n)."""
    x = np.full(width, math.sqrt(power))
    every = []
    for _ in range(count):
        z = draw.normal(0, math.sqrt(bias), width) + draw.normal(0, math.sqrt(weight / width), (width, width)) @ x
        layers = [z]
        for _ in range(depth - 1):
            matrix = draw.normal(0, math.sqrt(weight / width), (width, width))
            z = residual * z + draw.normal(0, math.sqrt(bias), width) + matrix @ s(z)
            layers.append(z)
        every.append(layers)
    return np.swapaxes(np.array(every), 0, 1)


def preactivations(s, count, width, depth, weight, bias, start, draw, residual=0.0):
    """Yield the preactivations of layers 1, 2, ... of random networks with K^1 = ``start``; each (count, n)."""
    z = math.sqrt(start) * draw.standard_normal((count, width))
    yield z
    for _ in range(depth - 1):
        spread = bias + weight * np.square(s(z)).mean(1, keepdims=True)
        z = residual * z + np.sqrt(spread) * draw.standard_normal((count, width))
        yield z


def mean_squares(z):
    """Return of each network the mean of z_i^2."""
    return np.square(z).mean(1)


def pair_products(z):
    """Return of each network the mean of z_i^2 z_j^2 over pairs i != j: free of the heavy tails of z_i^4."""
    square = np.square(z)
    n = z.shape[1]
    return (square.sum(1) ** 2 - np.square(square).sum(1)) / (n * (n - 1))


def relative_vertex(z):
    """Return V / (n K^2), estimated over networks."""
    return float(pair_products(z).mean() / mean_squares(z).mean() ** 2 - 1)
