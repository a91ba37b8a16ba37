"""Binary trees of counts over m leaves: their noisy nodes made consistent (Hay et al., arXiv 0904.0942), ranges, sums.

Nodes of d trees are an array (d, 2 m - 1) in levels, the root first; children of node i are 2 i + 1 and 2 i + 2. With
equal noise in every node the least-squares leaves come from one pass up, leaves having height h = 1 and z = y,

    z[v] = (2^h - 2^(h-1)) / (2^h - 1) y[v] + (2^(h-1) - 1) / (2^h - 1) (z[left] + z[right]),

and one down, which deals what a parent has more than its children to both alike.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def tree_nodes(leaves: NDArray[Any]) -> NDArray[Any]:
    """Return all nodes (d, 2 m - 1) over leaves (d, m), m a power of two; exact for integers."""
    levels = [leaves]
    while levels[-1].shape[1] > 1:
        levels.append(levels[-1][:, ::2] + levels[-1][:, 1::2])
    return np.concatenate(levels[::-1], axis=1)


def consistent_leaves(nodes: Floats) -> Floats:
    """Return the least-squares leaves (d, m) of noisy nodes (d, 2 m - 1)."""
    levels = _levels(nodes)
    best = [levels[-1]]
    for height, level in enumerate(levels[-2::-1], start=2):
        children = best[-1][:, ::2] + best[-1][:, 1::2]
        whole, half = 2.0**height, 2.0 ** (height - 1)
        best.append(((whole - half) * level + (half - 1) * children) / (whole - 1))
    result = best[-1]
    for below in best[-2::-1]:
        excess = result - (below[:, ::2] + below[:, 1::2])
        result = below + np.repeat(excess / 2, 2, axis=1)
    return result


def range_sums(nodes: Floats, start: NDArray[np.int64], stop: NDArray[np.int64]) -> Floats:
    """Return sums over leaves [start, stop) of one tree, nodes (2 m - 1,), each from O(log m) nodes as they are."""
    m = (len(nodes) + 1) // 2
    total = np.zeros(np.broadcast(start, stop).shape)
    low, high = (np.broadcast_to(np.asarray(edge), total.shape).astype(np.int64) + m - 1 for edge in (start, stop))
    while True:
        active = low < high
        if not active.any():
            return total
        # A first leaf that is a right child, or an end behind a left child, cannot be part of a larger node.
        right = active & (low % 2 == 0)
        total += np.where(right, nodes[np.where(right, low, 0)], 0.0)
        low = low + right
        left = (low < high) & (high % 2 == 0)
        total += np.where(left, nodes[np.where(left, high - 1, 0)], 0.0)
        high = high - left
        low, high = np.where(low < high, (low - 1) // 2, 0), np.where(low < high, (high - 1) // 2, 0)


def l1_coefficients(leaves: Floats, low: Floats, width: Floats) -> tuple[Floats, Floats]:
    """Return slopes and intercepts (d, m + 1): a sum of distances is linear in y while i centres lie below it.

    sum_b c_b |g_b - y| = y (2 C_i - C) + (S - 2 S_i), with C_i and S_i the sums of c_b and c_b g_b over the first i.
    """
    d, m = leaves.shape
    centres = low[:, None] + (np.arange(m) + 0.5) * width[:, None]
    counts, moments = np.zeros((2, d, m + 1))
    np.cumsum(leaves, axis=1, out=counts[:, 1:])
    np.cumsum(leaves * centres, axis=1, out=moments[:, 1:])
    return 2 * counts - counts[:, -1:], moments[:, -1:] - 2 * moments


def centres_below(y: Floats, low: float, width: float, m: int) -> NDArray[np.int64]:
    """Return how many of the m centres low + (b + 1/2) width are at most y."""
    return np.clip(np.floor((y - low) / width + 0.5), 0, m).astype(np.int64)


def shell_sums(nodes: Floats, y: Floats, low: float, width: float, ratio: float) -> Floats:
    """Return the paper's estimate of sum |x - y| from one noisy tree: shells of leaves, each at its far end.

    Shell j holds the leaves whose centres are between R ratio^-(j+1) and R ratio^-j away from y, and counts at
    R ratio^-j: at most ``ratio`` times too much. Outside [low, high] the distance to the interval is added for each.
    """
    m = (len(nodes) + 1) // 2
    span = m * width
    inner = np.clip(y, low, low + span)
    n_shells = int(np.ceil(np.log(m) / np.log(ratio))) + 1
    total = np.abs(y - inner) * nodes[0]
    for j in range(n_shells):
        far = span * ratio**-j
        near = span * ratio ** -(j + 1) if j + 1 < n_shells else 0.0
        edges = [centres_below(inner + offset, low, width, m) for offset in (-far, -near, near, far)]
        total += far * (range_sums(nodes, edges[0], edges[1]) + range_sums(nodes, edges[2], edges[3]))
    return total


def _levels(nodes: Floats) -> list[Floats]:
    """Return views of the levels, the root first."""
    edges = [2**k - 1 for k in range((nodes.shape[1] + 1).bit_length())]
    return [nodes[:, a:b] for a, b in itertools.pairwise(edges)]
