"""``ntk_dynamics``: mean and covariance of an infinite ensemble of infinitely wide networks at any time of training.

Training by squared error moves the outputs on the training rows X along Th = Th(X, X), and everything else with them:

    mean(z) = A Y,   cov(z, z') = K(z, z') + A K(X, X) A'^T - A K(X, z') - K(z, X) A'^T,   A = Th(z, X) G

    gradient flow, time t        G = (Th + r)^-1 (1 - exp(-lr (Th + r) t))
    gradient descent, s steps    G = (Th + r)^-1 (1 - (1 - lr (Th + r))^s)
    t = inf                      G = (Th + r)^-1

with r the strength of weight decay towards the initial weights. Cost: n^3 / 3 for t = inf, an eigendecomposition of
n x n for any other time, then n^2 a point and output for the covariance.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int, check_type
from quernel.kernels.linalg import Array, as_tensor, jittered_cholesky, like
from quernel.kernels.ntk.kernel import NTKernel


@dataclass(frozen=True)
class Dynamics:
    """Mean (m, q) or (m,) and covariance (m, m) of an ensemble's outputs; one covariance for every output."""

    mean: Any
    cov: Any


def ntk_dynamics(
    kernel: NTKernel,
    X: Array,
    Y: Array,
    Z: Array,
    *,
    t: float = math.inf,
    lr: float = 1.0,
    steps: int | None = None,
    ridge: float = 0.0,
) -> Dynamics:
    """Return what an infinite ensemble of networks says about new rows after training for some time.

    Parameters
    ----------
    kernel : NTKernel
    X : Tensor or array, shape (n, d)
        Training rows.
    Y : Tensor or array, shape (n, q) or (n,)
        Targets.
    Z : Tensor or array, shape (m, d)
        Rows to predict.
    t : float, default=inf
        Time of gradient flow on 1/2 sum (f(x) - y)^2, >= 0; inf is training to the end.
    lr : float, default=1.0
        Learning rate of all parameters, > 0.
    steps : int, optional
        Steps of full-batch gradient descent instead of a time; ``t`` must be left alone then.
    ridge : float, default=0.0
        Weight decay r >= 0 towards the initial weights, added to the loss as r/2 |theta - theta_0|^2.

    Returns
    -------
    dynamics : Dynamics
        ``mean``, shape (m, q) or (m,), and ``cov``, shape (m, m): kind and dtype of ``Z``. Outputs are independent and
        have the same covariance.

    Raises
    ------
    QuernelError
        If shapes do not fit, a value is not finite, or gradient descent would diverge: lr >= 2 / (lambda_max + ridge).

    References
    ----------
    Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", arXiv 1902.06720.

    Examples
    --------
    >>> x = np.eye(3)
    >>> ntk_dynamics(NTKernel(), x, np.array([1.0, 2.0, 3.0]), x).mean.round(9).tolist()
    [1.0, 2.0, 3.0]
    """
    check_type("kernel", kernel, NTKernel)
    targets = as_tensor("Y", Y).double()
    check_finite("Y", targets)
    if targets.ndim not in (1, 2) or X.ndim != 2 or Z.ndim != 2 or len(targets) != len(X):
        raise QuernelError(
            "X, Y and Z must have shapes (n, d), (n, q) or (n,), and (m, d); "
            f"got {tuple(X.shape)}, {tuple(Y.shape)}, {tuple(Z.shape)}"
        )
    x, z = as_tensor("X", X).double(), as_tensor("Z", Z).double()
    train, cross = kernel.both(x), kernel.both(z, x)
    a = cross.ntk @ training_gain(train.ntk, t=t, lr=lr, steps=steps, ridge=ridge)
    cov = ensemble_covariance(a, train.nngp, cross.nngp, kernel.nngp(z))
    dtype = Z.dtype if isinstance(Z, Tensor) and Z.is_floating_point() else torch.float64
    if isinstance(Z, np.ndarray) and Z.dtype == np.float32:
        dtype = torch.float32
    return Dynamics(like((a @ targets).to(dtype), Z), like(cov.to(dtype), Z))


def training_gain(
    ntk: Tensor, *, t: float = math.inf, lr: float = 1.0, steps: int | None = None, ridge: float = 0.0
) -> Tensor:
    """Return G, symmetric (n, n), with A = Th(z, X) G; ``ntk`` is Th(X, X) in float64.

    Examples
    --------
    >>> training_gain(2 * torch.eye(1, dtype=torch.float64), lr=0.25, steps=2).tolist()
    [[0.375]]
    """
    check_schedule(t=t, lr=lr, steps=steps, ridge=ridge)
    if steps is None and math.isinf(t):
        eye = torch.eye(len(ntk), dtype=ntk.dtype, device=ntk.device)
        return torch.cholesky_inverse(jittered_cholesky(ntk + ridge * eye, name="the kernel of X plus ridge"))
    values, vectors = torch.linalg.eigh(ntk)
    # A kernel has no negative eigenvalues; what rounding makes of zeros must not grow with time.
    values = values.clamp_min(0.0) + ridge
    if steps and len(values) and lr * float(values[-1]) >= 2:
        raise QuernelError(
            f"gradient descent with lr={lr} diverges: it must be below 2 / (largest eigenvalue of the NTK + ridge) = "
            f"{2 / float(values[-1]):.4g}"
        )
    return (vectors * _gains(values, t, lr, steps)) @ vectors.mT


def _gains(values: Tensor, t: float, lr: float, steps: int | None) -> Tensor:
    """Return (1 - what is left of an error) / eigenvalue; where that is 0, its limit, lr times the time."""
    if steps is None:
        learned, limit = -torch.expm1(-lr * t * values), lr * t
    else:
        moved, limit = lr * values, lr * steps
        # 1 - (1 - x)^s loses its digits for small x, the logarithm is none for x > 1.
        small = -torch.expm1(steps * torch.log1p(-moved.clamp_max(0.5)))
        learned = torch.where(moved < 0.5, small, 1 - (1 - moved) ** steps)
    some = values > 0
    return torch.where(some, learned / torch.where(some, values, torch.ones_like(values)), limit)


def ensemble_covariance(a: Tensor, train: Tensor, cross: Tensor, own: Tensor) -> Tensor:
    """Return K(z, z') + A K(X, X) A'^T - A K(X, z') - K(z, X) A'^T; all NNGP kernels in float64."""
    known = a @ cross.mT
    return own + a @ train @ a.mT - known - known.mT


def ensemble_variance(a: Tensor, train: Tensor, cross: Tensor, own: Tensor) -> Tensor:
    """Return the diagonal of ``ensemble_covariance``, (m,), from the variances ``own``; never below 0."""
    return (own + ((a @ train - 2 * cross) * a).sum(1)).clamp_min(0.0)


def check_schedule(*, t: Any, lr: Any, steps: Any, ridge: Any) -> None:
    """Raise a ``QuernelError`` that names what is no time, rate, number of steps or strength."""
    check_float("lr", lr, low=0.0, open_low=True)
    check_float("ridge", ridge, low=0.0)
    if not (isinstance(t, float) and math.isinf(t) and t > 0):
        if isinstance(t, bool) or not isinstance(t, numbers.Real) or not float(t) >= 0:
            raise QuernelError(f"t must be a number >= 0, or infinity; got {t!r}")
        if steps is not None:
            raise QuernelError(f"give a time or a number of steps, not both; got t={t} and steps={steps}")
    if steps is not None:
        check_int("steps", steps, low=0)
