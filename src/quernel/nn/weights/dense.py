"""``DenseWeight``: a plain tensor in a chosen dtype, so that a cast is one more storage format.

Layers over it compute in the stored dtype and take inputs of any floating dtype.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._registry import register
from quernel._validate import check_choice
from quernel.nn.weights._base import StoredWeight, dtype_name

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def _example() -> dict[str, Any]:
    return {
        "make": lambda: DenseWeight.from_dense(torch.linspace(-1, 1, 35).reshape(5, 7), "bfloat16"),
        "input": lambda generator: (torch.randn(3, 7, generator=generator),),
    }


@register("cast", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example)
class DenseWeight(StoredWeight):
    """A dense weight stored in ``bfloat16``, ``float16``, ``float32`` or ``float64``.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in, *kernel)``.
    dtype : str, default="bfloat16"
        Name of the stored dtype.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str = "bfloat16") -> None:
        super().__init__()
        check_choice("dtype", dtype, tuple(DTYPES))
        self.shape = tuple(shape)
        self.values = nn.Parameter(torch.zeros(self.shape, dtype=DTYPES[dtype]))

    @classmethod
    def from_dense(cls, weight: Tensor, dtype: str) -> Self:
        """Store ``weight``, shape (out, in, *kernel), rounded to ``dtype``."""
        new = cls(tuple(weight.shape), dtype)
        new.values = nn.Parameter(weight.detach().to(DTYPES[dtype]), requires_grad=weight.requires_grad)
        return new

    @classmethod
    def over(cls, parameter: nn.Parameter, dtype: str) -> Self:
        """Round ``parameter`` in place and hold that very object, so that what is tied to it stays tied."""
        new = cls(tuple(parameter.shape), dtype)
        parameter.data = parameter.data.to(DTYPES[dtype])
        new.values = parameter
        return new

    def dense(self) -> Tensor:
        """Return the stored tensor itself."""
        return self.values

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` computed and returned in the stored dtype."""
        return F.linear(x.to(self.values.dtype), self.values)

    def config(self) -> dict[str, Any]:
        """Return shape and dtype."""
        return {"shape": list(self.shape), "dtype": dtype_name(self.values.dtype)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(tuple(config["shape"]), config["dtype"])
