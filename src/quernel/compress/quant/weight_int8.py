"""WeightInt8: weights in 8 bits, activations as they are; the second honest baseline.

Each output channel k is stored as int8 codes with one float32 scale, ``w_kj ~= scale_k * q_kj``,
``scale_k = max_j |w_kj| / 127``. A quarter of the bytes; the time is that of decoding plus the dense
product, so it wins time only where reading the weight is what costs (batch 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quernel._registry import register
from quernel.compress._method import LayerPlan, PerModuleMethod
from quernel.nn import StoredConv2d, StoredEmbedding, StoredLinear
from quernel.nn.weights import Int8Weight


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()

    data = [torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)]
    return {"method": WeightInt8(), "model": model, "data": data, "example_inputs": (data[0],)}


@register("weight-int8", pillar="compress", contract="method", paper=None, status="stable", example=_example)
@dataclass(frozen=True)
class WeightInt8(PerModuleMethod):
    """Store the weights of linear, convolution and embedding layers in int8, one scale a row.

    Needs no data. Embedding tables decode only the rows that are looked up.

    Examples
    --------
    >>> import torch, quernel
    >>> table = torch.nn.Sequential(torch.nn.Embedding(1000, 64))
    >>> result = quernel.compress.compress(table, quernel.compress.WeightInt8())
    >>> round(result.report.ratio, 1)
    3.8
    """

    stage: ClassVar[str] = "quantise"
    action: ClassVar[str] = "int8 weight"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, nn.Embedding)

    @classmethod
    def menu(cls) -> tuple[WeightInt8, ...]:
        """Return the one configuration."""
        return (cls(),)

    def decide(self, name: str, module: nn.Module, stats: Any) -> LayerPlan:
        """Take every module whose rows are long enough for a scale to pay."""
        weight = module.weight
        if not isinstance(weight, Tensor):
            return LayerPlan(name, "skip", "its weight is not a tensor")
        if not bool(weight.isfinite().all()):
            return LayerPlan(name, "skip", "its weight holds NaN or infinity")
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return LayerPlan(name, "skip", "max_norm rewrites the table in forward")
        if weight[0].numel() < 2 * weight.element_size():
            return LayerPlan(name, "skip", f"rows of {weight[0].numel()} values are too short to save bytes")
        return LayerPlan(name, self.action)

    def convert(self, module: nn.Module, stats: Any, layer: LayerPlan) -> nn.Module:
        """Quantise the weight and keep bias and geometry."""
        weight = Int8Weight.from_dense(module.get_parameter("weight"))
        if isinstance(module, nn.Conv2d):
            return StoredConv2d.like(module, weight)
        if isinstance(module, nn.Embedding):
            return StoredEmbedding(weight, module.padding_idx)
        return StoredLinear(weight, module.bias)
