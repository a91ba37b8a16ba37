"""WeightInt4: weights in 4 bits without any data; the honest baseline of every 4-bit claim.

Groups of inputs share an integer scale and zero point, rows a float scale, found by DGQ's two grids for the error of
the weight itself, which beats plain rounding.  An eighth of the bytes of float32; rows that 8 bits store in no more
(they are padded to 128 values) get 8.  Linear layers multiply in integers, with activations rounded to int8 by token;
embeddings decode the rows that are looked up; convolutions decode their weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quernel._registry import register
from quernel._validate import check_choice
from quernel.compress.quant.weight_int8 import WeightInt8
from quernel.nn._int4_packing import GROUP_SIZES
from quernel.nn.functional.dual_grained import auto_group_size
from quernel.nn.weights import Int4GroupWeight, StoredWeight


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(14, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8)).eval()

    data = [torch.linspace(-1, 1, 1008).reshape(2, 14, 6, 6)]
    return {"method": WeightInt4(), "model": model, "data": data, "example_inputs": (data[0],)}


@register("weight-int4", pillar="compress", contract="method", paper=None, status="stable", example=_example)
@dataclass(frozen=True)
class WeightInt4(WeightInt8):
    """Store the weights of linear, convolution and embedding layers in 4 bits, with a scale a group of inputs.

    Needs no data; with data, ``DGQ`` loses less on linear layers, and this takes what it leaves:
    ``compress(model, [DGQ(), WeightInt4()], data=...)``.

    Parameters
    ----------
    group_size : {"auto", 32, 64, 128}, default=32
        Inputs that share a scale; "auto" is 32 below 1024 inputs, else 128.

    Examples
    --------
    >>> import torch, quernel
    >>> table = torch.nn.Sequential(torch.nn.Embedding(1000, 128))
    >>> result = quernel.compress.compress(table, quernel.compress.WeightInt4())
    >>> round(result.report.ratio, 1)
    6.7
    """

    group_size: int | Literal["auto"] = 32

    def __post_init__(self) -> None:
        check_choice("group_size", self.group_size, ("auto", *GROUP_SIZES))

    @classmethod
    def menu(cls) -> tuple[WeightInt4, ...]:
        """Return the defaults."""
        return (cls(),)

    def store(self, weight: Tensor) -> StoredWeight:
        """Round to 4 bits, or 8."""
        return Int4GroupWeight.from_dense(weight, self.group_size) if self._pays(weight) else super().store(weight)

    def form(self, weight: Tensor) -> str:
        """Tell which."""
        return "int4 weight" if self._pays(weight) else super().form(weight)

    def _pays(self, weight: Tensor) -> bool:
        rows, values = len(weight), weight[0].numel()
        size = auto_group_size(values) if self.group_size == "auto" else self.group_size
        return Int4GroupWeight((rows, values), size).nbytes < rows * (values + 4)
