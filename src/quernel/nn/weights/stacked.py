"""``StackedWeight``: row blocks of one weight, each in a storage of its own.

For fused projections (q, k and v in one matrix): the parts have different spectra, so each may deserve another
rank, or none, while the layer keeps its one input and one output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel.nn._stored import weight_config, weight_from_config
from quernel.nn.weights._base import StoredWeight
from quernel.nn.weights.dense import DenseWeight
from quernel.nn.weights.low_rank import LowRankWeight


def _example() -> dict[str, Any]:
    block = torch.linspace(-1, 1, 28).reshape(4, 7).sin()
    return {
        "make": lambda: StackedWeight([LowRankWeight.from_dense(block, 2), DenseWeight.from_dense(block, "float32")]),
        "input": lambda generator: (torch.randn(3, 7, generator=generator),),
    }


@register("welore", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example)
class StackedWeight(StoredWeight):
    """A weight whose blocks of rows are stored weights themselves.

    Parameters
    ----------
    parts : sequence of StoredWeight, shapes (out_i, in)
        Top to bottom; ``out`` is the sum of ``out_i``.

    Raises
    ------
    QuernelError
        If there is no part, or the parts are not matrices of one input size.
    """

    def __init__(self, parts: Sequence[StoredWeight]) -> None:
        super().__init__()
        shapes = [tuple(part.shape) for part in parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise QuernelError(f"parts must be stored matrices (out_i, in) with one input size; got shapes {shapes}")
        self.parts = nn.ModuleList(parts)
        self.shape = (sum(shape[0] for shape in shapes), shapes[0][1])

    def blocks(self) -> list[StoredWeight]:
        """Return the parts, top to bottom."""
        return [part for part in self.parts if isinstance(part, StoredWeight)]

    def dense(self) -> Tensor:
        """Return the blocks under each other."""
        return torch.cat([part.dense() for part in self.blocks()])

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T``, block by block."""
        return torch.cat([part.matmul(x) for part in self.blocks()], dim=-1)

    def config(self) -> dict[str, Any]:
        """Return class and configuration of every part."""
        return {"parts": [weight_config(part) for part in self.blocks()]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``; only registered classes are built."""
        return cls([weight_from_config(part) for part in config["parts"]])
