"""The branches of InceptionNeXt tap by tap: one channel, one place, one neighbour after another."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cross-correlate every channel with its own odd kernel, zeros beyond the border; x: (B, *S, C), (C, *k), (C,)."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    half = [k // 2 for k in weight.shape[1:]]
    for place in itertools.product(*(range(n) for n in x.shape[1:-1])):
        for tap in itertools.product(*(range(k) for k in weight.shape[1:])):
            other = [p + t - h for p, t, h in zip(place, tap, half, strict=True)]
            if all(0 <= o < n for o, n in zip(other, x.shape[1:-1], strict=True)):
                y[(slice(None), *place)] += x[(slice(None), *other)].double() * weight[(slice(None), *tap)].double()
    return y + bias.double()


def inception(x: Tensor, branches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Leave the first channels as they are and filter a group for each (weight (g, *k), bias (g,)); x: (B, *S, C)."""
    groups = [len(bias) for _, bias in branches]
    parts = x.double().split([x.shape[-1] - sum(groups), *groups], dim=-1)
    return torch.cat([parts[0], *(depthwise(p, *b) for p, b in zip(parts[1:], branches, strict=True))], dim=-1)
