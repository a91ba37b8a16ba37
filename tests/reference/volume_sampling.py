"""Determinantal designs the slow way: probabilities by enumeration, the textbook sampler, fits by normal equations.

Written from the definitions: subsets have probability det K_S, tuples a density of det(G) to the product of nu, the
sampler conditions the whole kernel matrix on every point it takes.
"""

from itertools import combinations, product

import numpy as np
from numpy.polynomial import legendre


def subset_probabilities(q):
    """Return all m-subsets of the rows of orthonormal q (N, m), and det(K_S) of each."""
    subsets = list(combinations(range(len(q)), q.shape[1]))
    return subsets, np.array([np.linalg.det(q[list(s)]) ** 2 for s in subsets])


def sequential_dpp(q, rng):
    """Draw a subset by the chain rule over all rows, with the residual kernel K - K_S (K_SS)^-1 K_S."""
    kernel = q @ q.T
    taken = []
    for left in range(q.shape[1], 0, -1):
        p = np.diag(kernel).clip(0)
        i = int(rng.choice(len(q), p=p / p.sum()))
        assert abs(p.sum() - left) < 1e-6
        taken.append(i)
        kernel = kernel - np.outer(kernel[:, i], kernel[i]) / kernel[i, i]
    return taken


def volume_tuples(q, n):
    """Return all n-tuples of rows, and their probabilities under volume-rescaled sampling from leverage scores."""
    m = q.shape[1]
    nu = (q**2).sum(1) / m
    tuples = np.array(list(product(range(len(q)), repeat=n)))
    whitened = q / np.sqrt((q**2).sum(1, keepdims=True) / m)
    grams = np.einsum("tni,tnj->tij", whitened[tuples], whitened[tuples]) / n
    density = np.linalg.det(grams).clip(0) * nu[tuples].prod(1)
    return tuples, density / density.sum(), grams


def fit(phi, weights, y):
    """Return the weighted least-squares coefficients from the normal equations, in extended precision sums."""
    rows = (phi * weights[:, None]).astype(np.longdouble)
    return np.linalg.solve((rows.T @ phi).astype(float), (rows.T @ y).astype(float))


def least_without(phi, weights, i):
    """Return the least eigenvalue of the Gram matrix of the n - 1 other points."""
    rest = np.delete(np.arange(len(phi)), i)
    rows = phi[rest] * np.sqrt(weights[rest])[:, None]
    return np.linalg.eigvalsh(rows.T @ rows / len(rest))[0]


def legendre_marginal(space):
    """Return the distribution function of nu of a one-dimensional Legendre space, by integrating the polynomial."""
    density = np.zeros(1)
    for j in range(space.n_features):
        unit = np.zeros(j + 1)
        unit[j] = 1
        density = legendre.legadd(density, (2 * j + 1) * legendre.legmul(unit, unit))
    integral = legendre.legint(density / (2 * space.n_features), lbnd=-1)
    return lambda x: legendre.legval(x, integral)
