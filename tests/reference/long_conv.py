"""Slow, obvious versions of long convolutions: sums over lags, regularised kernels, transforms by definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def convolved(u: Tensor, k: Tensor, skip: Tensor | None = None, later: Tensor | None = None) -> Tensor:
    """Return y[b, c, h, t] = sum_j k[c, h, j] u[b, h, t - j] + sum_j later[c, h, j] u[b, h, t + j + 1] + skip u."""
    batch, channels, length = u.shape
    y = torch.zeros(batch, len(k), channels, length, dtype=u.dtype)
    for t in range(length):
        for j in range(min(t + 1, k.shape[-1])):
            y[..., t] += k[..., j] * u[:, None, :, t - j]
        for j in range(0 if later is None else min(length - t - 1, later.shape[-1])):
            y[..., t] += later[..., j] * u[:, None, :, t + j + 1]
    return y if skip is None else y + skip[..., None] * u[:, None]


def toeplitz(k: Tensor, length: int) -> Tensor:
    """Return T[h, t, s] = k[h, t - s] for t >= s and 0 else; k: (H, taps)."""
    lags = torch.arange(length)[:, None] - torch.arange(length)
    known = (lags >= 0) & (lags < k.shape[-1])
    return torch.where(known, k[:, lags.clamp(0, k.shape[-1] - 1)], 0.0)


def squashed(k: float, lam: float) -> float:
    """Return sign(k) max(|k| - lam, 0)."""
    return math.copysign(max(abs(k) - lam, 0.0), k)


def smoothed(k: list[float], window: int) -> list[float]:
    """Return averages over an odd window, zeros beyond the ends."""
    half = window // 2
    return [sum(k[max(0, i - half) : i + half + 1]) / window for i in range(len(k))]


def spectrum(x: Tensor) -> Tensor:
    """Return sum_t x[t] exp(-2 pi i t f / N) over the last axis, term by term."""
    n = x.shape[-1]
    waves = [
        [complex(math.cos(a), math.sin(a)) for t in range(n) for a in [-2 * math.pi * (t * f % n) / n]]
        for f in range(n)
    ]
    return x.to(torch.complex128) @ torch.tensor(waves, dtype=torch.complex128).T


def butterfly(x: list[complex], matrices: dict[int, list[list[complex]]]) -> list[complex]:
    """Return the transform by blocks of 16 of a list, with given small matrices whose rows are frequencies."""
    n = len(x)
    if n <= 16:
        return [sum(m * v for m, v in zip(row, x, strict=True)) for row in matrices[n]]
    rest, out = n // 16, [0j] * n
    for k1, row in enumerate(matrices[16]):
        turned = []
        for n2 in range(rest):
            value = sum(row[n1] * x[rest * n1 + n2] for n1 in range(16))
            angle = -2 * math.pi * k1 * n2 / n
            turned.append(value * complex(math.cos(angle), math.sin(angle)))
        for k2, value in enumerate(butterfly(turned, matrices)):
            out[k1 + 16 * k2] = value
    return out
