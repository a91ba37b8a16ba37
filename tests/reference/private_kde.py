"""Private sums as a textbook has them: the Gaussian inequality, a least-squares tree, exact distances, shells."""

import math

import numpy as np
from scipy.special import ndtr


def delta_of(sigma, sensitivity, epsilon):
    """The inequality of the analytic Gaussian mechanism, as it is written."""
    mu = sensitivity / sigma
    return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)


def tree_matrix(m):
    """Rows of 0 and 1: which leaves each node sums, the root first."""
    rows, size = [], m
    while size >= 1:
        rows += [np.repeat(np.arange(m // size) == k, size) for k in range(m // size)]
        size //= 2
    return np.array(rows, float)


def least_squares_leaves(nodes):
    m = (nodes.size + 1) // 2
    return np.linalg.lstsq(tree_matrix(m), nodes, rcond=None)[0]


def distances(metric, x, y, p=None):
    gaps = np.abs(y[:, None] - x[None])
    if metric == "l1":
        return gaps.sum(-1)
    if metric == "lp":
        return (gaps**p).sum(-1)
    squares = (gaps**2).sum(-1)
    return squares if metric == "l2sq" else np.sqrt(squares)


def shells(leaves, low, width, y, ratio):
    """The paper's query on exact leaf counts: each shell of leaves at its far end."""
    m = len(leaves)
    centres = low + (np.arange(m) + 0.5) * width
    n_shells = math.ceil(math.log(m) / math.log(ratio)) + 1
    total = 0.0
    for centre, count in zip(centres, leaves, strict=True):
        gap = abs(centre - y)
        far = [m * width * ratio**-j for j in range(n_shells)]
        inside = [f for j, f in enumerate(far) if gap <= f and (j == n_shells - 1 or gap > far[j + 1])]
        total += count * inside[0]
    return total
