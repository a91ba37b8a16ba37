"""Ridge and kernel ridge regression as functions: torch or NumPy in, the same out, gradients in torch.

``W = argmin ||X W - Y||^2 + alpha ||W||^2``. With p features and n rows the primal form solves
``(X^T X + alpha I) W = X^T Y`` (p x p), the dual form ``W = X^T (X X^T + alpha I)^-1 Y`` (n x n); both
give the same W. Gram matrices and solves are float64 whatever comes in, since float32 Gram matrices
move predictions by 1e-3 at the condition numbers that a small alpha brings. There is no intercept:
append a column of ones for one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float
from quernel.kernels.linalg import Array, as_tensor, jittered_cholesky, like
from quernel.kernels.moments import Gram


def solve_ridge(
    x: Array | Gram, y: Array, alpha: float | Tensor, *, solver: Literal["auto", "primal", "dual"] = "auto"
) -> Array:
    """Return the weights of ridge regression.

    Parameters
    ----------
    x : Tensor or array, shape (..., n, p), or Gram
        Rows of features; or their summary, then ``y`` is ``X^T Y``.
    y : Tensor or array, shape (..., n, q) or (n,)
        Targets. With a ``Gram``: ``X^T Y``, shape (p, q) or (p,).
    alpha : float or scalar Tensor
        Regularisation, >= 0, added to the diagonal as it is (not scaled by n or the trace).
    solver : {"auto", "primal", "dual"}, default="auto"
        ``"auto"`` takes the smaller system: dual where n <= p.

    Returns
    -------
    weights : same kind and dtype as ``y``, shape (..., p, q) or (p,)
        ``X @ weights`` predicts ``Y``.

    Raises
    ------
    QuernelError
        If shapes do not fit, a value is not finite, or ``alpha`` is negative.

    Examples
    --------
    >>> solve_ridge(torch.eye(2), torch.tensor([2.0, 4.0]), alpha=1.0).tolist()
    [1.0, 2.0]
    """
    check_choice("solver", solver, ("auto", "primal", "dual"))
    targets, vector = _targets(y)
    strength = _strength(alpha)
    if isinstance(x, Gram):
        if solver == "dual":
            raise QuernelError("solver='dual' needs the rows of x; a Gram only has their sum")
        if targets.shape[-2] != x.channels:
            raise QuernelError(f"with a Gram of {x.channels} channels y must be X^T Y with as many rows; got {y.shape}")
        weights = _solve(x.sum.to(targets.device), targets, strength)
    else:
        features = as_tensor("x", x)
        if features.ndim < 2 or features.shape[-2] != targets.shape[-2]:
            raise QuernelError(f"x must have shape (..., n, p) with n = {targets.shape[-2]}; got {tuple(x.shape)}")
        check_finite("x", features)
        features = features.double()
        n, p = features.shape[-2:]
        if solver == "dual" or (solver == "auto" and n <= p):
            weights = features.mT @ _solve(features @ features.mT, targets, strength)
        else:
            weights = _solve(features.mT @ features, features.mT @ targets, strength)
    return _finished(weights, y, vector)


def solve_kernel_ridge(k: Array, y: Array, alpha: float | Tensor) -> Array:
    """Return the dual coefficients ``(K + alpha I)^-1 Y`` of kernel ridge regression.

    Parameters
    ----------
    k : Tensor or array, shape (..., n, n)
        Kernel matrix of the training rows.
    y : Tensor or array, shape (..., n, q) or (n,)
        Targets.
    alpha : float or scalar Tensor
        Regularisation, >= 0.

    Returns
    -------
    coefficients : same kind and dtype as ``y``, shape of ``y``
        ``K(new, train) @ coefficients`` predicts.

    Examples
    --------
    >>> solve_kernel_ridge(torch.eye(2), torch.tensor([2.0, 4.0]), alpha=1.0).tolist()
    [1.0, 2.0]
    """
    targets, vector = _targets(y)
    kernel = as_tensor("k", k)
    n = targets.shape[-2]
    if kernel.ndim < 2 or kernel.shape[-2:] != (n, n):
        raise QuernelError(f"k must have shape (..., {n}, {n}) to match y; got {tuple(kernel.shape)}")
    check_finite("k", kernel)
    return _finished(_solve(kernel.double(), targets, _strength(alpha)), y, vector)


def _solve(matrix: Tensor, right: Tensor, alpha: float | Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(right, jittered_cholesky(matrix + alpha * eye))


def _targets(y: Any) -> tuple[Tensor, bool]:
    targets = as_tensor("y", y)
    if targets.ndim == 0 or not targets.is_floating_point():
        raise QuernelError(f"y must be floating point with shape (n,) or (..., n, q); got {targets.dtype}, {y.shape}")
    check_finite("y", targets)
    vector = targets.ndim == 1
    return (targets[:, None] if vector else targets).double(), vector


def _strength(alpha: float | Tensor) -> float | Tensor:
    if not isinstance(alpha, Tensor):
        return check_float("alpha", alpha, low=0.0)
    if alpha.numel() != 1:
        raise QuernelError(f"alpha must be one number; got a tensor of shape {tuple(alpha.shape)}")
    check_float("alpha", alpha.item(), low=0.0)
    return alpha.reshape(()).double()


def _finished(weights: Tensor, y: Array, vector: bool) -> Array:
    weights = weights[..., 0] if vector else weights
    return like(weights.to(as_tensor("y", y).dtype), y)
