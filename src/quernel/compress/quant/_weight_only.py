"""What methods share that only round weights, without data: which modules they take, and what stands there afterwards.

A subclass says in which form a weight is stored, and when that would save nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from quernel._validate import all_finite
from quernel.compress._method import LayerPlan, PerModuleMethod
from quernel.nn import LowRankLinear, StoredConv2d, StoredEmbedding, StoredLinear
from quernel.nn.weights import ProductWeight, StoredWeight


class WeightOnly(PerModuleMethod):
    """Base of the methods that store linear, convolution and embedding weights, and low-rank factors, in few bits."""

    stage: ClassVar[str] = "quantise"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, nn.Embedding, LowRankLinear)

    def store(self, weight: Tensor) -> StoredWeight:
        """Return the stored form of a weight, shape (out, in, *kernel)."""
        raise TypeError(f"{type(self).__name__} must define store()")

    def form(self, weight: Tensor) -> str:
        """Return what the report calls the stored form, empty where it would save nothing."""
        raise TypeError(f"{type(self).__name__} must define form()")

    def decide(self, name: str, module: nn.Module, stats: Any) -> LayerPlan:
        """Take every module whose rows are long enough for scales to pay."""
        weights = _weights(module)
        if not weights:
            return LayerPlan(name, "skip", "its weight is not a tensor")
        if not all(all_finite(weight) for weight in weights):
            return LayerPlan(name, "skip", "its weight holds NaN or infinity")
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return LayerPlan(name, "skip", "max_norm rewrites the table in forward")
        forms = {self.form(weight): weight for weight in weights}
        if "" in forms:
            return LayerPlan(name, "skip", f"rows of {forms[''][0].numel()} values are too short to save bytes")
        return LayerPlan(name, " and ".join(forms))

    def convert(self, module: nn.Module, stats: Any, layer: LayerPlan) -> nn.Module:
        """Store the weight and keep bias and geometry."""
        stored = [self.store(weight) for weight in _weights(module)]
        if isinstance(module, nn.Conv2d):
            return StoredConv2d.like(module, stored[0])
        if isinstance(module, nn.Embedding):
            return StoredEmbedding(stored[0], module.padding_idx)
        bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
        return StoredLinear(ProductWeight(*stored) if len(stored) == 2 else stored[0], bias)


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the weight, or both factors of a low-rank layer."""
    if isinstance(module, LowRankLinear):
        return [module.weight.a, module.weight.b]
    return [module.weight] if isinstance(module.weight, Tensor) else []
