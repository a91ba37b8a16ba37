"""HyperZ.Z.W by its definitions: the coordinate net point by point, the products entry by entry."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def magnet(net: torch.nn.Module) -> Tensor:
    """The kernel of a net without context in float64, (C, *grid)."""
    out = torch.zeros(net.out_channels, *net.size, dtype=torch.float64)
    for place in itertools.product(*(range(n) for n in net.size)):
        c = [-1 + 2 * i / (n - 1) if n > 1 else -1.0 for i, n in zip(place, net.size, strict=True)]
        waves = [
            [
                math.sin(
                    sum(float(u) * x for u, x in zip(net.frequencies[i, h], c, strict=True)) + float(net.phases[i, h])
                )
                for h in range(net.hidden)
            ]
            for i in range(net.layers + 1)
        ]
        z = waves[0]
        for i, layer in enumerate(net.inner):
            inner = layer.weight.double() @ torch.tensor(z, dtype=torch.float64) + layer.bias.double()
            z = [waves[i + 1][h] * float(inner[h]) + float(net.map[(0, 0, *place)]) for h in range(net.hidden)]
        out[(slice(None), *place)] = net.out.weight.double() @ torch.tensor(z, dtype=torch.float64) + net.out.bias
    return out


def product(weights: Tensor, f: Tensor) -> Tensor:
    """Y[b, c, i, j] = sum_t W[b, c, i, t] F[b, c, t, j]."""
    y = torch.zeros_like(f)
    batch, channels, height, width = f.shape
    for b, c, i, j in itertools.product(range(batch), range(channels), range(height), range(width)):
        y[b, c, i, j] = sum(weights[b, c, i, t] * f[b, c, t, j] for t in range(width))
    return y
