"""``LowRankWeight``: a weight stored as the product of two thin factors, W = A B.

A is (m, k), B is (k, n).  Stored k (m + n) numbers instead of m n; a product costs as many multiply-adds, so both
are won only for k < m n / (m + n), which is half the full rank of a square matrix.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int
from quernel.nn.functional.low_rank import truncated_svd, whitened_svd
from quernel.nn.weights._base import StoredWeight, dtype_name
from quernel.nn.weights.dense import DTYPES


def _example() -> dict[str, Any]:
    return {
        "make": lambda: LowRankWeight.from_dense(torch.linspace(-1, 1, 35).reshape(5, 7).sin(), 3),
        "input": lambda generator: (torch.randn(3, 7, generator=generator),),
    }


@register("welore", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example)
class LowRankWeight(StoredWeight):
    """A weight stored as ``a @ b``; both factors are trainable parameters.

    Parameters
    ----------
    shape : (int, int)
        ``(out, in)`` of the product.
    rank : int
        Columns of ``a``, in [1, min(shape)].
    dtype : str, default="float32"
        Name of the stored dtype.

    Raises
    ------
    QuernelError
        If the shape is not a matrix's, or ``rank`` is out of range.

    Examples
    --------
    >>> import torch
    >>> w = LowRankWeight.from_dense(torch.outer(torch.ones(4), torch.arange(3.0)), rank=1)
    >>> w.nbytes, w.matmul(torch.ones(2, 3)).shape
    (28, torch.Size([2, 4]))
    """

    def __init__(self, shape: tuple[int, int], rank: int, dtype: str = "float32") -> None:
        super().__init__()
        if len(shape) != 2:
            raise QuernelError(f"shape must be (out, in) for LowRankWeight; got {tuple(shape)}")
        check_int("rank", rank, low=1, high=min(shape))
        check_choice("dtype", dtype, tuple(DTYPES))
        self.shape = tuple(shape)
        self.a = nn.Parameter(torch.zeros(shape[0], rank, dtype=DTYPES[dtype]))
        self.b = nn.Parameter(torch.zeros(rank, shape[1], dtype=DTYPES[dtype]))

    @property
    def rank(self) -> int:
        """Columns of ``a``."""
        return self.a.shape[1]

    @classmethod
    def from_dense(cls, weight: Tensor, rank: int, gram: Tensor | None = None) -> Self:
        """Factor ``weight``, shape (out, in); with ``gram`` = X^T X of its inputs, whitened by them."""
        return cls.from_factors(*(truncated_svd(weight, rank) if gram is None else whitened_svd(weight, gram, rank)))

    @classmethod
    def from_factors(cls, a: Tensor, b: Tensor) -> Self:
        """Store given factors, shapes (out, rank) and (rank, in)."""
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
            raise QuernelError(
                "a and b must be matrices (out, rank) and (rank, in) of one dtype; got "
                f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            )
        new = cls((a.shape[0], b.shape[1]), a.shape[1], dtype_name(a.dtype))
        new.a, new.b = (nn.Parameter(factor.detach().contiguous()) for factor in (a, b))
        return new

    def dense(self) -> Tensor:
        """Return ``a @ b``."""
        return self.a @ self.b

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``(x @ b.T) @ a.T`` in the dtype of ``x``."""
        return self.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``(x @ b.T) @ a.T + bias`` with the bias added inside the second product."""
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(F.linear(x, self.b.to(x.dtype)), self.a.to(x.dtype), bias)

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Return rows of the product without forming the rest."""
        return F.embedding(ids, self.a) @ self.b

    def config(self) -> dict[str, Any]:
        """Return shape, rank and dtype."""
        return {"shape": list(self.shape), "rank": self.rank, "dtype": dtype_name(self.a.dtype)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(tuple(config["shape"]), config["rank"], config["dtype"])

    def extra_repr(self) -> str:
        """Show shape, rank and bytes."""
        return f"shape={tuple(self.shape)}, rank={self.rank}, nbytes={self.nbytes}"
