"""Positive semi-definite matrices: spectra without rounding's negatives, entropy, ridge projector, simplex QP.

Everything is float64 inside. Cost: an eigendecomposition of n^3 to 9 n^3, values only where nobody needs vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int
from quernel.kernels.linalg import Array, as_tensor, jittered_cholesky, like

# Eigenvalues down to this share of the largest, times the size, are rounding when they are negative.
_ROUNDING = 1e-12


def psd_eigenvalues(a: Array, *, rounding: float = 0.0) -> Array:
    """Return the eigenvalues of a positive semi-definite matrix, ascending, those that rounding made negative as 0.

    Parameters
    ----------
    a : Tensor or array, shape (..., n, n)
        Symmetric; the lower triangle is read.
    rounding : float, default=0.0
        What negative eigenvalues may amount to where ``a`` is a difference; else a small part of the largest.

    Returns
    -------
    eigenvalues : same kind, shape (..., n), float64

    Raises
    ------
    QuernelError
        If ``a`` is not square or finite, or has an eigenvalue below what rounding explains.

    Examples
    --------
    >>> psd_eigenvalues(torch.diag(torch.tensor([2.0, 0.0]))).tolist()
    [0.0, 2.0]
    """
    return like(checked_spectrum(torch.linalg.eigvalsh(_square("a", a)), check_float("rounding", rounding, low=0.0)), a)


def matrix_entropy(a: Tensor) -> Tensor:
    """Return sum_i l_i log(tau / l_i) over the eigenvalues l of ``a``, tau their sum; natural logarithm.

    tau times the entropy of the normalised spectrum. The gradient is U diag(log(tau / l)) U^T: it has no differences
    of eigenvalues, so repeated ones do no harm; an eigenvalue of 0, where it is infinite, counts as rounding there.

    Parameters
    ----------
    a : Tensor, shape (..., n, n)
        Symmetric positive semi-definite.

    Returns
    -------
    entropy : Tensor, shape (...), float64

    Examples
    --------
    >>> round(float(matrix_entropy(torch.eye(4) / 4).exp()), 6)
    4.0
    """
    result: Tensor = _Entropy.apply(_square("a", a))[0]  # type: ignore[no-untyped-call]
    return result


def spectral_entropy(eigenvalues: Tensor, order: float = 1.0) -> Tensor:
    """Return tau times the Renyi entropy of ``eigenvalues`` / tau, tau their sum; order 1 is Shannon's.

    Parameters
    ----------
    eigenvalues : Tensor, shape (..., n)
        >= 0.
    order : float, default=1.0
        a > 0 in (1 / (1 - a)) log sum (l / tau)^a.

    Returns
    -------
    entropy : Tensor, shape (...), float64
        0 where tau is 0.

    Examples
    --------
    >>> round(float(spectral_entropy(torch.full((4,), 0.25), order=2.0).exp()), 6)
    4.0
    """
    check_float("order", order, low=0.0, open_low=True)
    values = eigenvalues.double()
    tau = values.sum(-1, keepdim=True)
    share = values / torch.where(tau > 0, tau, torch.ones_like(tau))
    if order == 1.0:
        entropy = -torch.special.xlogy(share, share).sum(-1)
    else:
        total = torch.where(share > 0, share.clamp_min(torch.finfo(share.dtype).tiny) ** order, 0.0).sum(-1)
        entropy = torch.where(total > 0, total.clamp_min(torch.finfo(share.dtype).tiny).log() / (1 - order), 0.0)
    return tau[..., 0] * entropy


def ridge_projector(k: Array, alpha: float) -> Array:
    """Return H = K (K + alpha I)^-1, the matrix that takes targets to the fit of kernel ridge regression.

    Parameters
    ----------
    k : Tensor or array, shape (..., n, n)
        Symmetric positive semi-definite.
    alpha : float
        >= 0; at 0 the projector on the range of K.

    Returns
    -------
    h : same kind, shape (..., n, n), float64
        Symmetric, eigenvalues in [0, 1]; its trace is the number of effective degrees of freedom.

    Examples
    --------
    >>> ridge_projector(np.diag([1.0, 3.0]), 1.0).diagonal().tolist()
    [0.5, 0.75]
    """
    check_float("alpha", alpha, low=0.0)
    values, vectors = torch.linalg.eigh(_square("k", k))
    values = checked_spectrum(values)
    floor = rounding_of(values)
    share = torch.where(values > floor, values / (values + alpha).clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return like((vectors * share[..., None, :]) @ vectors.mT, k)


def nearest_psd(a: Array) -> Array:
    """Return the positive semi-definite matrix closest to a symmetric one in the Frobenius norm; keeps the dtype.

    Examples
    --------
    >>> nearest_psd(np.diag([1.0, -1.0])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    dtype = as_tensor("a", a).dtype
    values, vectors = torch.linalg.eigh(_square("a", a))
    return like(((vectors * values.clamp_min(0.0)[..., None, :]) @ vectors.mT).to(dtype), a)


def simplex_qp(
    k: np.ndarray, c: np.ndarray, *, start: np.ndarray | None = None, max_steps: int | None = None
) -> np.ndarray:
    """Return argmin b^T K b - 2 c^T b over b >= 0, sum b = 1, by an active set.

    Parameters
    ----------
    k : array, shape (m, m)
        Symmetric positive definite, or nearly: one that is singular is solved with the library's jitter.
    c : array, shape (m,)
    start : array, shape (m,), optional
        A point of the simplex to begin from: near the solution it saves steps.
    max_steps : int, optional
        Changes of the support; default 20 m + 100.

    Returns
    -------
    b : array, shape (m,), float64
        Sums to 1, no entry negative.

    Raises
    ------
    QuernelError
        If shapes do not fit, values are not finite, ``start`` is not on the simplex, or the steps do not suffice.

    Notes
    -----
    Lawson and Hanson's method with one equality: entries join where the objective falls fastest, the problem on the
    support is solved exactly, and a step that would leave the simplex stops at its face. O(s^3) a step, s the support.

    Examples
    --------
    >>> simplex_qp(np.eye(3), np.array([1.0, 0.9, 0.0])).round(3).tolist()
    [0.55, 0.45, 0.0]
    """
    k, c, b = _checked_problem(k, c, start)
    m = len(c)
    steps = 20 * m + 100 if max_steps is None else check_int("max_steps", max_steps, low=1)
    tolerance = 1e-11 * max(1.0, float(np.abs(k).max()), float(np.abs(c).max()))
    support = b > 0
    for _ in range(steps):
        inside = np.flatnonzero(support)
        target = _on_face(k, c, inside)
        if (target > 0).all():
            b[:] = 0.0
            b[inside] = target
            slope = c - k @ b
            gain = np.where(support, -np.inf, slope - b @ slope)
            best = int(gain.argmax())
            if gain[best] <= tolerance:
                return b / b.sum()
            support[best] = True
        else:
            falling = target <= 0
            ratio = b[inside][falling] / np.maximum(b[inside][falling] - target[falling], np.finfo(np.float64).tiny)
            b[inside] += ratio.min() * (target - b[inside])
            gone = inside[falling][ratio <= ratio.min()]
            b[gone] = 0.0
            support[gone] = False
    raise QuernelError(f"the simplex problem of {m} entries is not solved after max_steps={steps}")


class _Entropy(torch.autograd.Function):
    """Entropy with the gradient of its logarithms."""

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entropy; eigenvalues and eigenvectors go along for the gradient."""
        values, vectors = torch.linalg.eigh(a)
        values = checked_spectrum(values)
        return spectral_entropy(values), values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the decomposition."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return U diag(log(tau / l)) U^T."""
        values, vectors = ctx.saved_tensors
        tau = values.sum(-1, keepdim=True)
        floor = (rounding_of(values)).clamp_min(torch.finfo(values.dtype).tiny)
        slope = (tau.clamp_min(torch.finfo(values.dtype).tiny) / values.clamp_min(floor)).log()
        return grads[0][..., None, None] * ((vectors * slope[..., None, :]) @ vectors.mT)


def _square(name: str, a: Any) -> Tensor:
    matrix = as_tensor(name, a)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise QuernelError(f"{name} must have shape (..., n, n); got {tuple(matrix.shape)}")
    check_finite(name, matrix)
    return matrix.double()


def rounding_of(values: Tensor) -> Tensor:
    """Return the eigenvalue below which there is only rounding, shape (..., 1)."""
    return _ROUNDING * values.shape[-1] * values.abs().amax(-1, keepdim=True)


def checked_spectrum(values: Tensor, rounding: float = 0.0) -> Tensor:
    """Return ascending eigenvalues with rounding's negatives as 0."""
    # float32 kernels that arrive here were rounded at 1e-7 each: a thousand of those is no sign of a mistake.
    if bool((values[..., 0] < -(1e-4 * values.abs().amax(-1)).clamp_min(rounding)).any()):
        raise QuernelError(
            f"the matrix is not positive semi-definite: its least eigenvalue is {float(values.min()):.3g}"
        )
    return values.clamp_min(0.0)


def _on_face(k: np.ndarray, c: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the solution on a support, with sum 1 and signs free."""
    factor = torch.from_numpy(jittered_cholesky(k[np.ix_(inside, inside)]))
    sides = torch.from_numpy(np.stack((c[inside], np.ones(len(inside))), 1))
    solved = torch.cholesky_solve(sides, factor).numpy()
    weight = (solved[:, 0].sum() - 1.0) / solved[:, 1].sum()
    return np.asarray(solved[:, 0] - weight * solved[:, 1])


def _checked_problem(k: Any, c: Any, start: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, c = np.asarray(k, np.float64), np.asarray(c, np.float64)
    if k.ndim != 2 or c.ndim != 1 or k.shape != (len(c), len(c)) or len(c) == 0:
        raise QuernelError(f"k and c must have shapes (m, m) and (m,); got {k.shape} and {c.shape}")
    check_finite("k", k)
    check_finite("c", c)
    if start is None:
        b = np.zeros(len(c))
        b[int((k.diagonal() - 2 * c).argmin())] = 1.0
        return k, c, b
    b = np.array(start, np.float64)
    if b.shape != c.shape or (b < 0).any() or not abs(b.sum() - 1.0) < 1e-6:
        raise QuernelError(f"start must be {len(c)} numbers >= 0 that sum to 1")
    return k, c, b / b.sum()
