"""The Schur complement of paired features: what of C_XX a ridge regression on the other side leaves unexplained.

    C_XX = Lam_T + Lam_I,   Lam_T = C_XT (C_TT + eta I)^-1 C_TX (explained),   C_.. uncentred, divided by n.

Features (D of them): with L L^T = C_TT + eta I and B = L^-1 C_TX, Lam_T = B^T B. Pairs (n of them), for kernels
without features or n < D: with K_X = R R^T and L L^T = K_T + n eta I, (L^-1 R)^T (L^-1 R) eta has the nonzero spectrum
of Lam_I. Both are float64; with eta = 0, or nearly, eigenvectors take the place of L. O(n D^2 + D^3), or O(n^3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._validate import check_finite, check_float
from quernel.kernels.linalg import jittered_cholesky
from quernel.kernels.psd import checked_spectrum, ridge_projector, rounding_of
from quernel.kernels.ridge import solve_kernel_ridge, solve_ridge
from quernel.kernels.statistics._pair_maps import KernelMap, products

# Ridges that ``best_eta`` tries before it looks closer around the best of them.
_ETAS = tuple(10.0**power for power in range(-8, 2))
# Below it a Cholesky factor of K_T + n eta I loses more than 1e-12; eigenvalues of the hat matrix stay within [0, 1].
_CHOLESKY_ETA = 1e-4


@dataclass(frozen=True, eq=False)
class SchurSplit:
    """What ``schur_complement`` gives.

    Attributes
    ----------
    residual : Tensor, shape (D, D), float64
        Lam_I, positive semi-definite: what the other side does not explain.
    explained : Tensor, shape (D, D), float64
        Lam_T, positive semi-definite.
    total : Tensor, shape (D, D), float64
        C_XX, the sum of both.
    freedom : float
        Effective degrees of freedom of the regression, tr K_T (K_T + n eta I)^-1.
    """

    residual: Tensor
    explained: Tensor
    total: Tensor
    freedom: float


def schur_complement(phi_t: Tensor, phi_x: Tensor, eta: float = 1e-3) -> SchurSplit:
    """Split the second moments of ``phi_x`` into what ``phi_t`` explains linearly and what is left.

    Differentiable for eta > 0: ``matrix_entropy(split.residual)`` is the entropy that ``SchurEntropy`` reports, with
    gradients that stand repeated eigenvalues.

    Parameters
    ----------
    phi_t, phi_x : Tensors, shapes (n, D_T) and (n, D)
        Paired features, row by row; unit length for entropies.
    eta : float, default=1e-3
        Ridge, >= 0.

    Returns
    -------
    split : SchurSplit

    Raises
    ------
    QuernelError
        If shapes do not fit, a value is not finite, or a gradient is asked for at eta = 0.

    Examples
    --------
    >>> split = schur_complement(torch.eye(4), torch.eye(4).flip(0), eta=0.0)
    >>> round(float(split.explained.trace()), 6), round(float(split.residual.trace()), 6)
    (1.0, 0.0)
    """
    for name, rows in (("phi_t", phi_t), ("phi_x", phi_x)):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
            raise QuernelError(f"{name} must be a floating-point tensor of shape (n, D)")
        check_finite(name, rows)
    if len(phi_t) != len(phi_x):
        raise QuernelError(f"phi_t and phi_x must be pairs, row by row; got {len(phi_t)} and {len(phi_x)} rows")
    check_float("eta", eta, low=0.0)
    if eta == 0 and (phi_t.requires_grad or phi_x.requires_grad):
        raise QuernelError("a projector on the range of C_TT has no useful gradient; take eta > 0")
    t, x = phi_t.double(), phi_x.double()
    c_tt, c_tx = t.mT @ t / len(t), t.mT @ x / len(t)
    split = split_of_covariances(c_tt, c_tx, x.mT @ x / len(t), eta)
    # With the rows at hand the same as a sum of squares, which no rounding makes negative.
    weights = ridge_weights(c_tt, c_tx, eta)
    rest = x - t @ weights
    return replace(split, residual=rest.mT @ rest / len(t) + eta * weights.mT @ weights)


def split_of_covariances(c_tt: Tensor, c_tx: Tensor, c_xx: Tensor, eta: float, *, spectra: bool = False) -> SchurSplit:
    """Split by features: c_tt (D_T, D_T), c_tx (D_T, D), c_xx (D, D).

    With ``spectra`` the explained part may be a smaller matrix of the same nonzero eigenvalues.

    From moments alone the residual is a difference, and semi-definite up to its rounding: half^T half <= C_XX, and half
    comes from a triangular solve, so that no eigenvalue is below about -eps sqrt(tr C_TT / eta) tr C_XX, in float64
    1e-14 tr C_XX at eta = 1e-3. ``psd_eigenvalues`` sets such values to zero.
    """
    if eta > 0:
        factor = jittered_cholesky(_raised(c_tt, eta))
        half = torch.linalg.solve_triangular(factor, c_tx, upper=False)
        freedom = len(c_tt) - eta * _inverse_trace(factor)
    else:
        values, vectors = torch.linalg.eigh(c_tt)
        kept = values > rounding_of(values)
        half = (vectors[:, kept].mT @ c_tx) / values[kept].sqrt()[:, None]
        freedom = float(kept.sum())
    residual = torch.addmm(c_xx, half.mT, half, alpha=-1)
    explained = half @ half.mT if spectra and len(half) < len(c_xx) else half.mT @ half
    return SchurSplit(residual, explained, c_xx, freedom)


def ridge_weights(c_tt: Tensor, c_tx: Tensor, eta: float) -> Tensor:
    """Return (C_TT + eta I)^-1 C_TX, the transpose of the paper's Gamma; at eta = 0 with the pseudo-inverse."""
    if eta > 0:
        return torch.cholesky_solve(c_tx, jittered_cholesky(_raised(c_tt, eta)))
    values, vectors = torch.linalg.eigh(c_tt)
    kept = values > rounding_of(values)
    return (vectors[:, kept] / values[kept]) @ (vectors[:, kept].mT @ c_tx)


def split_of_pairs(k_t: Tensor, root: Tensor, eta: float, n: float) -> SchurSplit:
    """Split by pairs: k_t (m, m) and root (m, r), K_X = root root^T, whose weights add up to n."""
    total = products(root.mT).div_(n)
    if eta >= _CHOLESKY_ETA:
        factor = jittered_cholesky(_raised(k_t, n * eta))
        freedom = len(k_t) - n * eta * _inverse_trace(factor)
        half = torch.linalg.solve_triangular(factor, root, upper=False)
        del factor
        residual = products(half.mT).mul_(eta)
        del half
        return SchurSplit(residual, total - residual, total, freedom)
    hat = ridge_projector(k_t, n * eta)
    fitted = hat @ root
    return SchurSplit(root.mT @ (root - fitted) / n, root.mT @ fitted / n, total, float(hat.trace()))


def kernel_root(k: Tensor) -> Tensor:
    """Return R with R R^T = k: its Cholesky factor, or eigenvectors where it is singular."""
    factor, info = torch.linalg.cholesky_ex(k)
    if not int(info):
        return factor
    values, vectors = torch.linalg.eigh(k)
    values = checked_spectrum(values)
    kept = values > 0
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True, eq=False)
class PairSample:
    """Pairs at hand, each side in the smaller of its two forms.

    ``text`` is phi_T (m, D_T), or K_T (m, m) where ``dual``; ``root`` (m, r) is phi_X, or a root of K_X. Rows that are
    repeated have a root as wide as there are different ones. ``n`` is the number of pairs that the rows stand for: a
    row of weight w is multiplied by w^0.5.
    """

    text: Tensor
    root: Tensor
    dual: bool
    n: int
    form: Literal["features", "pairs"] = "features"

    @classmethod
    def of(cls, maps: tuple[KernelMap, KernelMap], t: Tensor, x: Tensor) -> PairSample:
        """Choose the forms."""
        wide = [side.dim is None or len(t) <= side.dim for side in maps]
        root = _side(maps[1], x, wide[1], True)[0]
        text, dual = _side(maps[0], t, wide[0], False)
        return cls(text, root, dual, len(t), "pairs" if any(wide) else "features")

    def weighted(self, counts: np.ndarray) -> PairSample:
        """Return the sample in which row i stands counts[i] times."""
        kept = torch.from_numpy(np.flatnonzero(counts))
        scale = torch.from_numpy(counts[counts > 0].astype(np.float64)).sqrt()[:, None]
        text = self.text[kept] * scale
        text = text[:, kept] * scale.T if self.dual else text
        return PairSample(text, self.root[kept] * scale, self.dual, self.n, self.form)

    def split(self, eta: float) -> SchurSplit:
        """Return matrices with the nonzero spectra of Lam_I and Lam_T."""
        if self.dual:
            return split_of_pairs(self.text, self.root, eta, self.n)
        t, x = self.text, self.root
        c_tt, c_xx = (products(rows.T).div_(self.n) for rows in (t, x))
        return split_of_covariances(c_tt, t.T @ x / self.n, c_xx, eta, spectra=True)

    def out_of_fold(self, eta: float, folds: int, seed: Seed) -> Tensor:
        """Return the second moments (r, r) of residuals, each from a regression that did not see its fold."""
        fold = torch.from_numpy(generator(seed).permutation(self.n) % folds)
        left = torch.empty_like(self.root)
        for number in range(folds):
            held, rest = (fold == number).nonzero()[:, 0], (fold != number).nonzero()[:, 0]
            strength = len(rest) * eta
            if self.dual:
                inner = self.text[rest][:, rest]
                fitted = self.text[held][:, rest] @ solve_kernel_ridge(inner, self.root[rest], strength)
            else:
                fitted = self.text[held] @ solve_ridge(self.text[rest], self.root[rest], strength)
            left[held] = self.root[held] - fitted
        return left.T @ left / self.n

    def leave_one_out(self) -> Callable[[float], float]:
        """Return the function eta -> mean squared error of pairs left out one at a time, at a fixed ridge n eta."""
        matrix = self.text if self.dual else self.text.T @ self.text / self.n
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(0.0)
        if self.dual:
            basis, rotated = vectors, vectors.T @ self.root
        else:
            basis, rotated = self.text @ vectors, vectors.T @ (self.text.T @ self.root / self.n)

        def error(eta: float) -> float:
            if self.dual:
                shrink = self.n * eta / (values + self.n * eta)
                residual, rest = (basis * shrink) @ rotated, basis.square() @ shrink
            else:
                weight = 1 / (values + eta)
                residual = self.root - (basis * weight) @ rotated
                rest = 1 - basis.square() @ weight / self.n
            # 1 - H_ii is positive for eta > 0; what rounding makes of it must not divide.
            return float((residual.square().sum(1) / rest.clamp_min(1e-14).square()).mean())

        return error


def best_eta(sample: PairSample) -> float:
    """Return the ridge of least leave-one-out error: the best power of ten, then a closer look around it."""
    from scipy.optimize import minimize_scalar

    error = sample.leave_one_out()
    errors = [error(eta) for eta in _ETAS]
    best = _ETAS[int(np.argmin(errors))]
    centre = float(np.log10(best))
    low, high = max(centre - 1, np.log10(_ETAS[0])), min(centre + 1, np.log10(_ETAS[-1]))
    found: Any = minimize_scalar(
        lambda power: error(10.0**power), bounds=(low, high), method="bounded", options={"xatol": 0.01}
    )
    return float(10.0**found.x) if found.fun < min(errors) else best


def _side(side: KernelMap, rows: Tensor, wide: bool, rooted: bool) -> tuple[Tensor, bool]:
    """Return features, or a root of the kernel matrix, or the matrix itself and True."""
    if not wide:
        return side.features(rows), False
    different, place = torch.unique(rows, dim=0, return_inverse=True)
    if len(different) < len(rows):
        return kernel_root(side.gram(different))[place], False
    return (kernel_root(side.gram(rows)), False) if rooted else (side.gram(rows), True)


def _raised(matrix: Tensor, by: float) -> Tensor:
    raised = matrix.clone()
    raised.diagonal().add_(by)
    return raised


def _inverse_trace(factor: Tensor) -> float:
    """Return the trace of (L L^T)^-1."""
    return float(torch.cholesky_inverse(factor.detach()).trace())
