"""Softmax-free attention by its definitions: loops over tokens and heads in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-||x_i - y_j||^2 / 2), entry by entry; x: (n, d), y: (m, d)."""
    k = torch.empty(len(x), len(y), dtype=torch.float64)
    for i, a in enumerate(x.double()):
        for j, b in enumerate(y.double()):
            k[i, j] = math.exp(-0.5 * float((a - b).square().sum()))
    return k


def exact(x: Tensor, layer: torch.nn.Module) -> Tensor:
    """The Gaussian attention of one sample by its scale 1 / (2 sqrt(D)); x: (n, C)."""
    heads = layer.num_heads
    q, v = (m(x).double() for m in (layer.query, layer.value))
    head = q.shape[1] // heads
    out = torch.zeros_like(v)
    for h in range(heads):
        part = slice(h * head, (h + 1) * head)
        for i in range(len(x)):
            for j in range(len(x)):
                distance = float((q[i, part] - q[j, part]).square().sum())
                out[i, part] += math.exp(-distance / (2 * math.sqrt(head))) * v[j, part]
    return layer.proj(out.to(x.dtype))


def implied(q: Tensor, marks: Tensor, eps: float, norm: str | None) -> Tensor:
    """The n x n matrix that the Nystrom product stands for; q: (n, d), marks: (m, d)."""
    p, a = kernel(q, marks), kernel(marks, marks)
    inner = torch.linalg.inv(a + eps * torch.eye(len(a), dtype=torch.float64))
    if norm == "bottleneck":
        d = a.sum(1).rsqrt()
        inner = d[:, None] * inner * d[None]
    s = p @ inner @ p.T
    if norm == "token":
        d = s.sum(1).clamp_min(1.0).rsqrt()
        s = d[:, None] * s * d[None]
    return s
