"""Percentile smoothing: the few largest input channels are divided down, their weight columns multiplied up.

a_j = max over tokens of |X_j|, B the r-th largest a, r = int((1 - p / 100) n + 1.5), s_j = max(1, a_j / B): exactly
r - 1 of n channels change (with p = 99.5, 2 of 384).  The division goes into the norm or linear layer before, and the
function of the model stays what it was.  Nothing is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quernel.compress._context import Context
from quernel.compress.quant._adjacent import scalable_pairs, scalable_producers

# Inputs that stay below this are as good as dead; a ratio to them would mean nothing.
LEAST = 1e-4


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Scales by module name: producers' outputs are divided by theirs, readers' columns multiplied."""

    producers: Mapping[str, Tensor]
    readers: Mapping[str, Tensor]


def percentile_scale(absmax: Tensor, percentile: float) -> Tensor:
    """Return ``s = max(1, absmax / B)``, shape (n,); ones where B is next to nothing."""
    n = len(absmax)
    rank = min(n, int((1 - percentile / 100) * n + 1.5))
    reference = absmax.topk(rank).values[-1]
    return (absmax / reference).clamp_min(1.0) if reference >= LEAST else torch.ones_like(absmax)


def find_smoothing(
    model: nn.Module, context: Context, absmax: Mapping[str, Tensor], percentile: float, *, mixing: bool
) -> Smoothing:
    """Return the scales of all linears, among the keys of ``absmax``, whose producer can take them."""
    groups = scalable_producers(model, context, absmax)
    read = {name for names in groups.values() for name in names}
    pairs = scalable_pairs(model, context, list(absmax), mixing=mixing)
    groups |= {name: found for name, found in pairs.items() if name not in groups and read.isdisjoint(found)}
    producers: dict[str, Tensor] = {}
    readers: dict[str, Tensor] = {}
    for producer, names in groups.items():
        # They read the same tensor; the largest is on the safe side where their calls differ.
        scale = percentile_scale(torch.stack([absmax[name] for name in names]).amax(0), percentile)
        if context.allows(producer) and bool((scale > 1).any()):
            producers[producer] = scale
            readers |= dict.fromkeys(names, scale)
    return Smoothing(producers, readers)
