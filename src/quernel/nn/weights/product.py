"""``ProductWeight``: a weight stored as two factors, W = A B, each in a storage of its own.

For low-rank factors that are quantised afterwards: both savings multiply, and a product runs as two.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel.nn._stored import weight_config, weight_from_config
from quernel.nn.weights._base import StoredWeight
from quernel.nn.weights.int4 import Int4GroupWeight


def _example() -> dict[str, Any]:
    def make() -> ProductWeight:
        a, b = torch.linspace(-1, 1, 15).reshape(5, 3), torch.linspace(-2, 1, 21).reshape(3, 7).sin()
        return ProductWeight(Int4GroupWeight.from_dense(a), Int4GroupWeight.from_dense(b))

    return {"make": make, "input": lambda generator: (torch.randn(3, 7, generator=generator),)}


@register("dgq", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example)
class ProductWeight(StoredWeight):
    """A weight that is the product of two stored matrices.

    Parameters
    ----------
    a, b : StoredWeight, shapes (out, rank) and (rank, in)

    Raises
    ------
    QuernelError
        If they are no matrices that can be multiplied.
    """

    a: StoredWeight
    b: StoredWeight

    def __init__(self, a: StoredWeight, b: StoredWeight) -> None:
        super().__init__()
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
            raise QuernelError(
                f"a and b must be stored matrices (out, rank) and (rank, in); got shapes {a.shape} and {b.shape}"
            )
        self.a, self.b = a, b
        self.shape = (a.shape[0], b.shape[1])

    def dense(self) -> Tensor:
        """Return ``a @ b``."""
        return self.a.dense() @ self.b.dense()

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``(x @ b.T) @ a.T``, each product in its factor's own way."""
        return self.a.matmul(self.b.matmul(x))

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Return rows of the product without forming the rest."""
        return self.a.rows(ids) @ self.b.dense()

    def config(self) -> dict[str, Any]:
        """Return class and configuration of both factors."""
        return {"a": weight_config(self.a), "b": weight_config(self.b)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``; only registered classes are built."""
        return cls(weight_from_config(config["a"]), weight_from_config(config["b"]))
