"""``LowRankLinear``: a linear layer over two thin factors, y = (x B^T) A^T + bias.

k (in + out) stored numbers and multiply-adds a row instead of in * out: a win below half the full rank of a
square weight.  Training it from scratch, or only its factors, needs no change to the training loop.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.nn._stored import StoredLinear
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES
from quernel.nn.weights.low_rank import LowRankWeight


def linear_over(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a plain layer that holds these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _example() -> dict[str, Any]:
    return {
        "make": lambda: LowRankLinear(7, 5, 3, generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(4, 7, generator=generator),),
    }


@register(
    "welore", pillar="nn", contract="module", paper="2407.11239", status="stable", headline=False, example=_example
)
class LowRankLinear(StoredLinear):
    """A linear layer whose weight is the product of two thin trainable factors.

    Parameters
    ----------
    in_features, out_features : int
        As in ``torch.nn.Linear``.
    rank : int
        In [1, min(in_features, out_features)].
    bias : bool, default=True
        Whether to add a learned vector.
    device, dtype : optional
        As in ``torch.nn.Linear``; float32, float64, bfloat16 or float16.
    generator : torch.Generator, optional
        For the initial values; default is torch's own.

    Raises
    ------
    QuernelError
        If a size or the rank is out of range.

    Notes
    -----
    Initial values: uniform factors of equal Frobenius norm whose product has the variance 1 / (3 in_features)
    of ``torch.nn.Linear``'s weight; the bias as there.

    Examples
    --------
    >>> import torch
    >>> linear = torch.nn.Linear(64, 64)
    >>> thin = LowRankLinear.from_linear(linear, rank=16)
    >>> thin(torch.ones(2, 64)).shape, sum(p.numel() for p in thin.parameters())
    (torch.Size([2, 64]), 2112)
    """

    weight: LowRankWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_int("in_features", in_features, low=1)
        check_int("out_features", out_features, low=1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        weight = LowRankWeight((out_features, in_features), rank, dtype_name(dtype))
        super().__init__(weight, torch.zeros(out_features, dtype=dtype) if bias else None)
        self.to(device)
        self.reset_parameters(generator)

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.weight.rank

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``(x @ b.T) @ a.T + bias``."""
        return self.weight.linear(x, self.bias)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values."""
        out_features, in_features = self.weight.shape
        # Var(A B) = rank Var(A) Var(B) = 1 / (3 in) and out Var(A) = in Var(B) (equal Frobenius norms).
        balance = math.sqrt(out_features / (3 * self.rank))
        with torch.no_grad():
            for factor, size in ((self.weight.a, out_features), (self.weight.b, in_features)):
                bound = math.sqrt(3 * balance / size)
                factor.uniform_(-bound, bound, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, whiten: Tensor | None = None) -> Self:
        """Factor a trained layer.

        Parameters
        ----------
        linear : nn.Linear
            Left as it is; the bias parameter is shared, not copied.
        rank : int
            In [1, min(in_features, out_features)].
        whiten : Tensor, shape (in_features, in_features), optional
            ``X^T X`` of the layer's inputs: keep what matters for the outputs on them (SVD-LLM) instead of
            what is large in the weight.
        """
        check_type("linear", linear, nn.Linear)
        weight = LowRankWeight.from_dense(linear.weight, rank, whiten)
        return cls.from_weight(weight.requires_grad_(linear.weight.requires_grad), linear.bias)

    @classmethod
    def from_weight(cls, weight: LowRankWeight, bias: nn.Parameter | None = None) -> Self:
        """Build a layer around existing factors, shared with whoever else holds them."""
        check_type("weight", weight, LowRankWeight)
        new = cls.__new__(cls)  # __init__ would draw values from the default generator only to drop them
        StoredLinear.__init__(new, weight, bias)
        return new

    def to_linear(self) -> nn.Linear:
        """Return the plain layer with the multiplied-out weight; the bias parameter is shared."""
        weight = self.weight.dense().detach()
        weight = nn.Parameter(weight, requires_grad=self.weight.a.requires_grad)
        return linear_over(weight, self.bias).train(self.training)

    def config(self) -> dict[str, Any]:
        """Return weight and bias configuration."""
        return {"weight": self.weight.config(), "bias": None if self.bias is None else dtype_name(self.bias.dtype)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer with the shapes of ``config()``."""
        weight = LowRankWeight.from_config(config["weight"])
        bias = config["bias"]
        return cls.from_weight(
            weight, None if bias is None else nn.Parameter(torch.zeros(weight.shape[0], dtype=DTYPES[bias]))
        )

    def extra_repr(self) -> str:
        """Show features and rank."""
        return f"{super().extra_repr()}, rank={self.rank}"
