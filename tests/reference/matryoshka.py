"""Matryoshka by its definitions: sums of losses over prefixes, funnels by sorting, cascades by loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def nested_loss(loss: Callable[..., Tensor], columns: Sequence[Tensor], dims: Sequence[int], weights: Sequence[float]):
    """sum_m c_m loss(z_{1:m} / |z_{1:m}|), one row and one prefix after the other."""
    total = torch.zeros((), dtype=columns[0].dtype)
    for m, c in zip(dims, weights, strict=True):
        cut = [torch.stack([row[:m] / row[:m].square().sum().sqrt() for row in z]) for z in columns]
        total = total + c * loss(*cut)
    return total


def funnel(items: np.ndarray, query: np.ndarray, dims: Sequence[int], shortlist: Sequence[int], k: int) -> list[int]:
    """Order all items by the first prefix and keep some, those by the next, ..., the last ones by whole vectors."""
    left = list(range(len(items)))
    for m, kept in zip(dims, shortlist, strict=True):
        scores = {}
        for i in left:
            length = math.sqrt(sum(float(v) ** 2 for v in items[i][:m]))
            scores[i] = sum(float(a) * float(b) for a, b in zip(query[:m], items[i][:m], strict=True)) / length
        left = sorted(left, key=lambda i: (-scores[i], i))[:kept]
    whole = {i: sum(float(a) * float(b) for a, b in zip(query, items[i], strict=True)) for i in left}
    return sorted(left, key=lambda i: (-whole[i], i))[:k]


def cascade(probabilities: np.ndarray, dims: Sequence[int], thresholds: Sequence[float]) -> tuple[list[int], list[int]]:
    """Classes and dimensions, sample by sample; probabilities: (G, n, L)."""
    classes, used = [], []
    for sample in range(probabilities.shape[1]):
        for stage, m in enumerate(dims):
            row = probabilities[stage, sample]
            if stage == len(dims) - 1 or row.max() >= thresholds[stage]:
                classes.append(int(row.argmax()))
                used.append(m)
                break
    return classes, used


def cheapest_cascade(probabilities: np.ndarray, labels: np.ndarray, dims: Sequence[int], allowed: float) -> float:
    """The smallest mean dimension of any thresholds whose error is at most ``allowed``, by trying all there are."""
    values = [sorted({*stage.max(1).tolist(), 2.0}) for stage in probabilities[:-1]]
    best = math.inf
    for thresholds in itertools.product(*values):
        classes, used = cascade(probabilities, dims, thresholds)
        error = float((np.array(classes) != labels).mean())
        if error <= allowed:
            best = min(best, float(np.mean(used)))
    return best


def similarity_error(z: np.ndarray, e: np.ndarray, m: int) -> float:
    """Mean over pairs of (cos(z_{1:m}, z'_{1:m}) - cos(e, e'))^2."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    pairs = list(itertools.combinations(range(len(z)), 2))
    return sum((cosine(z[i][:m], z[j][:m]) - cosine(e[i], e[j])) ** 2 for i, j in pairs) / len(pairs)
