"""``SparseLinear``: a linear layer that multiplies its nonzero weights only (kernels of arXiv 1911.09723).

The tokens of the batch are the vector axis: 64 at a time are transposed in registers, multiplied, and transposed back,
all within the first caches.  Worth it from some tokens on; a single one uses one lane in sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._registry import register
from quernel._validate import check_choice, check_type
from quernel.nn._sparse_ops import sparse_linear
from quernel.nn._stored import StoredLinear
from quernel.nn.conv.sparse import LIMITS, warn_if_dense
from quernel.nn.weights.int8 import keep_float32
from quernel.nn.weights.sparse import SparseWeight


def _example() -> dict[str, Any]:
    linear = nn.Linear(24, 10)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 240).sin().reshape(10, 24))
        linear.weight[:, torch.arange(24) % 4 != 1] = 0
        linear.bias.copy_(torch.linspace(-1, 1, 10))
    return {
        "make": lambda: SparseLinear.from_linear(linear, activation="relu"),
        "input": lambda generator: (torch.randn(5, 24, generator=generator),),
    }


@register(
    "fast-sparse-convnets",
    pillar="nn",
    contract="module",
    paper="1911.09723",
    status="stable",
    headline=False,
    example=_example,
)
class SparseLinear(StoredLinear):
    """A linear layer over a sparse weight, for inference on a CPU; made by ``from_linear`` from a pruned one.

    Parameters
    ----------
    weight : SparseWeight, shape (out_features, in_features)
    bias : Tensor, shape (out_features,), optional
    activation : {None, "relu", "relu6"}
        Applied in the same pass.

    Notes
    -----
    Values and bias stay float32 when a module around them is cast; inputs of another dtype pass through float32.
    Gradients reach the input and the bias, not the weight.

    References
    ----------
    Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723, 2019.

    Examples
    --------
    >>> import torch
    >>> linear = torch.nn.Linear(64, 64)
    >>> _ = linear.weight.data.mul_(torch.rand(64, 64) < 0.1)
    >>> sparse, x = SparseLinear.from_linear(linear), torch.randn(32, 64)
    >>> torch.allclose(sparse(x), linear(x), atol=1e-5)
    True
    """

    weight: SparseWeight

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None, *, activation: str | None = None) -> None:
        check_type("weight", weight, SparseWeight)
        super().__init__(weight, bias)
        self.activation = check_choice("activation", activation, tuple(LIMITS))
        self._limits = LIMITS[activation]

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None, *, block: int = 1) -> Self:
        """Store the nonzero weights of a pruned layer; warns where they are too many to be worth it.

        Parameters
        ----------
        linear : nn.Linear
            In float32.  Left as it is; the bias parameter is shared, not copied.
        activation : {None, "relu", "relu6"}
            To compute in the same pass.
        block : {1, 2, 4}, default=1
            Consecutive output features that share a pattern, as block pruning leaves it.

        Raises
        ------
        QuernelError
            If the weight is not float32 or not finite.
        """
        check_type("linear", linear, nn.Linear)
        weight = SparseWeight.from_dense(linear.weight, block)
        warn_if_dense(weight, "the layer")
        return cls(weight, linear.bias, activation=activation).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``activation(x @ W.T + bias)``."""
        return sparse_linear(x, self.weight.operands(), self.bias, *self._limits)

    def config(self) -> dict[str, Any]:
        """Return weight, bias and activation."""
        return super().config() | {"activation": self.activation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        return cls(*cls._parts(config), activation=config["activation"])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show features, sparsity and activation."""
        return f"{super().extra_repr()}, sparsity={self.weight.sparsity:.3f}, activation={self.activation!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
