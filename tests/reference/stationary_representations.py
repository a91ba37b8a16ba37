"""Stationary representations by their definitions: the simplex row by row, the HOC loss and the metrics in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def simplex(n: int) -> Tensor:
    """Unit vectors and one more, centred, each divided by its length; float64 (n, n - 1)."""
    d = n - 1
    w = torch.zeros(n, d, dtype=torch.float64)
    for i in range(d):
        w[i, i] = 1
    w[d] = (1 - math.sqrt(d + 1)) / d
    w = w - w.mean(0)
    return torch.stack([row / row.norm() for row in w])


def hoc(y: Tensor, new: Tensor, old: Tensor, mu: float, *, reference_mask: bool = False) -> float:
    """L_c, sample by sample in float64."""
    total = 0.0
    for i in range(len(y)):
        anchor = old[i].double() / old[i].double().norm()
        terms = []
        for j in range(len(y)):
            cosine = float(anchor @ (new[j].double() / new[j].double().norm()))
            if i == j:
                total -= mu * cosine
            if int(y[i]) != int(y[j]):
                terms.append(math.exp(mu * cosine))
            elif reference_mask:
                terms.append(math.exp(0.0))
        if terms:
            total += math.log(sum(terms))
    return total / len(y)


def cross_entropy(logits: Tensor, y: Tensor) -> float:
    """The mean of log sum exp less the logit of the target."""
    losses = [
        math.log(sum(math.exp(v) for v in row.tolist())) - float(row[t]) for row, t in zip(logits, y, strict=True)
    ]
    return sum(losses) / len(losses)


def retrieval(queries: Any, asked: Any, gallery: Any, held: Any, metric: str) -> float:
    """Rank the gallery by cosine for one query after another; top1 or mean average precision."""
    scores = []
    for q, label in zip(np.asarray(queries, float), asked, strict=True):
        cosines = [float(q @ g / (np.linalg.norm(q) * np.linalg.norm(g))) for g in np.asarray(gallery, float)]
        order = sorted(range(len(cosines)), key=lambda i: -cosines[i])
        right = [held[i] == label for i in order]
        if metric == "top1":
            scores.append(float(right[0]))
            continue
        precisions = [sum(right[: place + 1]) / (place + 1) for place in range(len(right)) if right[place]]
        scores.append(sum(precisions) / len(precisions))
    return sum(scores) / len(scores)


def class_means(features: Any, labels: Any) -> tuple[Any, list[int]]:
    """The mean unit vector of each class, and the classes."""
    unit = [np.asarray(f, float) / np.linalg.norm(f) for f in features]
    classes = sorted(set(labels))
    return [np.mean([u for u, y in zip(unit, labels, strict=True) if y == c], axis=0) for c in classes], classes


def ac_aa(c: Any) -> tuple[float, float]:
    """Average compatibility and average accuracy, entry by entry."""
    better = pairs = 0
    total, entries = 0.0, 0
    for i in range(len(c)):
        for j in range(i + 1):
            total, entries = total + c[i][j], entries + 1
            if i > j:
                pairs += 1
                better += c[i][j] > c[j][j]
    return better / pairs, total / entries
