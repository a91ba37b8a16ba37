"""The kernels of SGConv by their formula, tap by tap."""

from __future__ import annotations

import math


def upsampled(w: list[float], scale: int, mode: str) -> list[float]:
    """Return d * scale values read from d, half-pixel centres, ends held."""
    out = []
    for j in range(len(w) * scale):
        if mode == "nearest":
            out.append(w[j // scale])
            continue
        place = min(max((j + 0.5) / scale - 0.5, 0.0), len(w) - 1.0)
        low = math.floor(place)
        high = min(low + 1, len(w) - 1)
        out.append(w[low] + (place - low) * (w[high] - w[low]))
    return out


def kernel(weights: list[list[float]], decay: float, mode: str, combine: str = "cat") -> list[float]:
    """Return the kernel of one channel before it is divided by Z."""
    d, n = len(weights[0]), len(weights)
    if combine == "cat":
        out: list[float] = []
        for i, w in enumerate(weights):
            out += [v / decay**i for v in upsampled(w, 2 ** max(0, i - 1), mode)]
        return out
    out = [0.0] * (d * 2 ** (n - 1))
    for i, w in enumerate(weights):
        for j, v in enumerate(upsampled(w, 2**i, mode)):
            out[j] += v / decay**i
    return out
