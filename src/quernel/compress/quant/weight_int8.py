"""WeightInt8: weights in 8 bits, activations as they are; the second honest baseline.

Each output channel k is stored as int8 codes with one float32 scale, ``w_kj ~= scale_k * q_kj``,
``scale_k = max_j |w_kj| / 127``. A quarter of the bytes; the time is that of decoding plus the dense
product, so it wins time only where reading the weight is what costs (batch 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quernel._registry import register
from quernel.compress.quant._weight_only import WeightOnly
from quernel.nn.weights import Int8Weight, StoredWeight


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()

    data = [torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)]
    return {"method": WeightInt8(), "model": model, "data": data, "example_inputs": (data[0],)}


@register("weight-int8", pillar="compress", contract="method", paper=None, status="stable", example=_example)
@dataclass(frozen=True)
class WeightInt8(WeightOnly):
    """Store the weights of linear, convolution and embedding layers in int8, one scale a row.

    Needs no data. Embedding tables decode only the rows that are looked up; low-rank layers get both factors in int8.

    Examples
    --------
    >>> import torch, quernel
    >>> table = torch.nn.Sequential(torch.nn.Embedding(1000, 64))
    >>> result = quernel.compress.compress(table, quernel.compress.WeightInt8())
    >>> round(result.report.ratio, 1)
    3.8
    """

    @classmethod
    def menu(cls) -> tuple[WeightInt8, ...]:
        """Return the one configuration."""
        return (cls(),)

    def store(self, weight: Tensor) -> StoredWeight:
        """Round to int8."""
        return Int8Weight.from_dense(weight)

    def form(self, weight: Tensor) -> str:
        """Take all but rows that are hardly longer than their scale."""
        return "" if weight[0].numel() < 2 * weight.element_size() else "int8 weight"
