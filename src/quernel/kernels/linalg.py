"""Cholesky factors of matrices that rounding has made slightly indefinite: one policy for the library.

The matrix is tried as it is; members of a batch that fail get ``jitter * mean(diagonal)`` on the
diagonal, ten times more each time, up to 1 % of the mean diagonal. Adding any is warned about, with an
estimate of the condition number. Cost O(n^3 / 3) a try; gradients flow through the factor.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float

Array = TypeVar("Array", Tensor, np.ndarray)

# First jitter, relative to the mean diagonal: what rounding in a product of a few thousand terms amounts to.
_FIRST_JITTER = {torch.float32: 1e-6, torch.float64: 1e-12}
_MOST_JITTER = 1e-2
# Rows of a symmetric product at a time: few save more of it, powers of two alias in the caches.
_PRODUCTS = 96


class JitterWarning(UserWarning):
    """A matrix was not positive definite in its precision; its diagonal was raised."""


def jittered_cholesky(a: Array, eps: float | None = None, *, name: str = "a") -> Array:
    """Return the lower Cholesky factor of ``a``, raising the diagonal only as far as needed.

    Parameters
    ----------
    a : Tensor or array, shape (..., n, n)
        Symmetric positive semi-definite, float32 or float64; the lower triangle is read.
    eps : float, optional
        First jitter, relative to the mean diagonal; default 1e-6 in float32, 1e-12 in float64.
    name : str, default="a"
        What errors and warnings call the matrix.

    Returns
    -------
    factor : same kind as ``a``, shape (..., n, n)
        Lower triangular L with ``L L^T = a + jitter I``.

    Raises
    ------
    QuernelError
        If ``a`` is not square, not finite, or indefinite beyond 1 % of its mean diagonal.

    Warns
    -----
    JitterWarning
        If the diagonal was raised; with an estimate of the condition number.

    Examples
    --------
    >>> jittered_cholesky(torch.eye(2) * 4.0).diagonal().tolist()
    [2.0, 2.0]
    """
    matrix = as_tensor(name, a)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise QuernelError(f"{name} must have shape (..., n, n); got {tuple(matrix.shape)}")
    if matrix.dtype not in _FIRST_JITTER:
        raise QuernelError(f"{name} must be float32 or float64; got {matrix.dtype}")
    check_finite(name, matrix)
    first = _FIRST_JITTER[matrix.dtype] if eps is None else check_float("eps", eps, low=0.0, open_low=True)
    return like(_factor(matrix, first, name), a)


def add_products(to: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows @ rows.T`` to ``to``, (n, n), in place, for little more than half the price; returns it.

    Products below the diagonal are computed once for both sides of it; blocks on it are as symmetric as their product.
    """
    step = _PRODUCTS if rows.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        part = rows[start:stop] @ rows[:stop].mT
        to[start:stop, :stop] += part
        to[:start, start:stop] += part[:, :start].mT
    return to


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor or array as a tensor, sharing memory where possible."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.as_tensor(np.ascontiguousarray(value))
    raise QuernelError(f"{name} must be a torch.Tensor or a numpy.ndarray; got {type(value).__name__}")


def like(result: Tensor, model: Array) -> Array:
    """Return ``result`` as the kind of container that ``model`` is."""
    return result if isinstance(model, Tensor) else result.numpy()


def _factor(matrix: Tensor, first: float, name: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return factor
    n = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).detach().mean(-1)  # (...,)
    if bool((diagonal <= 0).any()):
        raise QuernelError(f"{name} is not positive semi-definite: the mean of its diagonal is not positive")
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    jitter = first
    failed = info != 0
    amounts = torch.zeros_like(diagonal)
    while jitter <= _MOST_JITTER * (1 + 1e-9):
        amounts = torch.where(failed, jitter * diagonal, amounts)
        factor, info = torch.linalg.cholesky_ex(matrix + amounts[..., None, None] * eye)
        failed = info != 0
        if not failed.any():
            warnings.warn(_advice(name, factor, n, float((amounts / diagonal).max())), JitterWarning, stacklevel=3)
            return factor
        jitter *= 10
    raise QuernelError(
        f"{name} ({n} x {n}) is not positive definite even with {_MOST_JITTER:g} of its mean diagonal added. "
        "Likely causes: (a) it is not symmetric, (b) a kernel that is not positive definite, (c) a difference of large "
        "numbers"
    )


def _advice(name: str, factor: Tensor, n: int, jitter: float) -> str:
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1)
    condition = float((pivots.amax(-1) / pivots.amin(-1)).square().max())
    dtype = str(factor.dtype).removeprefix("torch.")
    finer = "" if dtype == "float64" else ", or compute it in float64"
    return (
        f"{name} ({n} x {n}) is not positive definite in {dtype} (condition number at least {condition:.0e}): "
        f"{jitter:.0e} of its mean diagonal was added. Regularise more{finer}"
    )
