"""Norm-aware attention by its definitions: one entry at a time, and the whole matrix of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def query_features(q: Tensor, power: float, scale: float, variant: str = "split") -> Tensor:
    """q: (D,) -> (2 D,)."""
    norm = math.sqrt(sum(float(x) ** 2 for x in q))
    p = power * (0.5 + math.tanh(norm / scale))
    unit = [float(x) / max(norm, 1e-12) for x in q]
    return _parts([abs(u) ** p for u in unit], unit, unit, variant)


def key_features(k: Tensor, power: float, variant: str = "split") -> Tensor:
    norm = max(math.sqrt(sum(float(x) ** 2 for x in k)), 1e-12)
    return _parts([abs(float(x)) ** power for x in k], [float(x) for x in k], [float(x) / norm for x in k], variant)


def _parts(sizes: list[float], signs: list[float], units: list[float], variant: str) -> Tensor:
    if variant == "split":
        first = [s if x > 0 else 0.0 for s, x in zip(sizes, signs, strict=True)]
        last = [s if x < 0 else 0.0 for s, x in zip(sizes, signs, strict=True)]
    else:
        first = [s * math.cos(math.pi / 4 * u) for s, u in zip(sizes, units, strict=True)]
        last = [s * math.sin(math.pi / 4 * u) for s, u in zip(sizes, units, strict=True)]
    return torch.tensor(first + last, dtype=torch.float64)


def features(x: Tensor, power: float, scale: float | None, variant: str = "split") -> Tensor:
    """The features of all rows; keys have no scale.  x: (..., D)."""
    rows = x.double().reshape(-1, x.shape[-1])
    made = [
        key_features(r, power, variant) if scale is None else query_features(r, power, scale, variant) for r in rows
    ]
    return torch.stack(made).reshape(*x.shape[:-1], -1)


def turned(phi: Tensor, angles: Tensor) -> Tensor:
    """Each half of a row of features, turned pair by pair; phi: (N, 2 D), angles: (N, D / 2)."""
    out = torch.empty_like(phi)
    half = phi.shape[1] // 2
    for n in range(len(phi)):
        for start in (0, half):
            for pair in range(half // 2):
                a, b = phi[n, start + 2 * pair], phi[n, start + 2 * pair + 1]
                c, s = math.cos(angles[n, pair]), math.sin(angles[n, pair])
                out[n, start + 2 * pair], out[n, start + 2 * pair + 1] = a * c - b * s, b * c + a * s
    return out


def grid_angles(height: int, width: int, size: int) -> Tensor:
    """(height * width, size / 2): the first pairs by the row, the last by the column."""
    frequencies = [10_000 ** (-i / max(size // 4 - 1, 1)) for i in range(size // 4)]
    places = [(h, w) for h in range(height) for w in range(width)]
    return torch.tensor([[place * f for place in both for f in frequencies] for both in places], dtype=torch.float64)


def line_angles(length: int, size: int, start: int = 0) -> Tensor:
    frequencies = [10_000 ** (-i / max(size // 2 - 1, 1)) for i in range(size // 2)]
    return torch.tensor([[(start + n) * f for f in frequencies] for n in range(length)], dtype=torch.float64)


def attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    angles: Tensor | None = None,
    decay: float = 1.0,
    kept: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One head by its N x M weights; phi: (N, F), v: (M, D)."""
    turned_q, turned_k = (phi_q, phi_k) if angles is None else (turned(phi_q, angles), turned(phi_k, angles))
    out = torch.zeros(len(phi_q), v.shape[1], dtype=v.dtype)
    for i in range(len(phi_q)):
        weight, n = 0.0, 0.0
        for j in range(len(phi_k)):
            if (causal and j > i) or (kept is not None and not kept[j]):
                continue
            share = decay ** (i - j) if causal else 1.0
            out[i] += share * (turned_q[i] @ turned_k[j]) * v[j]
            weight += share * float(phi_q[i] @ phi_k[j])
            n += share
        n = n or 1.0
        out[i] = (out[i] / n) / (weight / n + eps)
    return out


def recurrent(phi_q: Tensor, phi_k: Tensor, v: Tensor, decay: float = 1.0, eps: float = 1e-6) -> Tensor:
    """One head token by token, from a matrix, a vector and a count."""
    values, keys, n = torch.zeros(phi_k.shape[1], v.shape[1], dtype=v.dtype), torch.zeros_like(phi_k[0]), 0.0
    out = []
    for q, k, x in zip(phi_q, phi_k, v, strict=True):
        values, keys, n = decay * values + torch.outer(k, x), decay * keys + k, decay * n + 1
        out.append((q @ values / n) / (q @ keys / n + eps))
    return torch.stack(out)
