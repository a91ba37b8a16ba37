"""The mean embedding of many rows, as what a few weighted points have to reach: overlaps, gradients, the constant.

    E(beta, z) = beta^T K beta - 2 beta^T c + const,   c_n = mean_j k(z_n, x_j),   const = mean_ij k(x_i, x_j)

Rows are taken some at a time, so nothing but an (M, block) matrix is held: an evaluation costs M N d multiply-adds, the
constant N^2 d / 2 once. Rows are moved to the origin and scaled to a kernel of width 1. Kernels of float32 rows are
float32, a rounding of 1e-7 that averages out over the rows; sums, points, weights and K are float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from quernel._errors import QuernelError
from quernel.kernels.gaussian import gaussian_kernel
from quernel.kernels.linalg import jittered_cholesky
from quernel.kernels.psd import simplex_qp

KERNELS = ("gaussian", "cosine")

# Kernel values held at a time, 2 MB: they stay in the second-level cache.
_BLOCK = 2**18
# Rows of a side of a block where all pairs of rows are met.
_PAIRS = 512
# Steps of L-BFGS between two problems for the weights.
_STEPS = 10
# A round that gains less than this share of the error is the last one.
_STILL = 1e-7
# On the diagonal of K where weights are free of sign.
_RIDGE = 1e-6
# On it where they are not: of weights that are equally good (more points than the kernel has dimensions) the flattest.
_FLATTEST = 1e-10

Floats = NDArray[np.floating[Any]]


class MeanTarget(ABC):
    """The mean of k(x_j, .) over rows x; points are given and returned in the units of the rows.

    Attributes
    ----------
    rows : Tensor, shape (N, d)
        In the target's own units, see ``inside``; float32 where the rows were.
    """

    rows: Tensor

    @abstractmethod
    def inside(self, z: Floats) -> Tensor:
        """Return points in the target's units."""

    @abstractmethod
    def outside(self, z: Tensor) -> Floats:
        """Undo ``inside``, up to what the kernel does not see."""

    @abstractmethod
    def gram(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the kernel between all rows of y (m, d) and of z (n, d)."""

    @abstractmethod
    def gradient(self, z: Tensor, beta: Tensor) -> tuple[float, Tensor]:
        """Return E without its constant, and dE/dz of shape (M, d)."""

    def overlaps(self, z: Tensor) -> Tensor:
        """Return c_n = mean_j k(z_n, x_j), shape (M,)."""
        total, held = z.new_zeros(len(z)), z.to(self.rows.dtype)
        for part in self.blocks(len(z)):
            total += self.gram(held, part).sum(1, dtype=torch.float64)
        return total / len(self.rows)

    def blocks(self, m: int) -> tuple[Tensor, ...]:
        """Return the rows in parts that give m rows of kernel values of about 2 MB."""
        return self.rows.split(max(256, _BLOCK // max(1, m)))

    def constant(self) -> float:
        """Return mean_ij k(x_i, x_j), each pair of blocks met once."""
        parts, total = self.rows.split(_PAIRS), 0.0
        for i, part in enumerate(parts):
            total += float(self.gram(part, part).sum(dtype=torch.float64))
            # Pairs of different blocks count twice.
            total += 2.0 * sum(float(self.gram(part, other).sum(dtype=torch.float64)) for other in parts[i + 1 :])
        return total / len(self.rows) ** 2


class GaussianTarget(MeanTarget):
    """The mean embedding under exp(-gamma |x - y|^2)."""

    def __init__(self, x: Floats, gamma: float) -> None:
        self._middle, self._scale = x.mean(0, dtype=np.float64), float(np.sqrt(2 * gamma))
        self.rows = self.inside(x).to(torch.float32 if x.dtype == np.float32 else torch.float64)

    def inside(self, z: Floats) -> Tensor:
        return torch.from_numpy((np.asarray(z, np.float64) - self._middle) * self._scale)

    def outside(self, z: Tensor) -> Floats:
        return np.asarray(z.numpy() / self._scale + self._middle)

    def gram(self, y: Tensor, z: Tensor) -> Tensor:
        return gaussian_kernel(y, z)

    def gradient(self, z: Tensor, beta: Tensor) -> tuple[float, Tensor]:
        """With gamma = 1/2 dE/dz_n = -2 beta_n [sum_m beta_m k_nm (z_n - z_m) - mean_j k(z_n, x_j) (z_n - x_j)]."""
        c, pull, held = z.new_zeros(len(z)), torch.zeros_like(z), z.to(self.rows.dtype)
        for part in self.blocks(len(z)):
            k = gaussian_kernel(held, part)
            c += k.sum(1, dtype=torch.float64)
            pull += k @ part
        c, pull = c / len(self.rows), pull / len(self.rows)
        kb = gaussian_kernel(z, z) * beta  # (M, M), column m times beta_m
        own = kb.sum(1)
        slope = -2.0 * beta[:, None] * ((own - c)[:, None] * z - kb @ z + pull)
        return float(beta @ (own - 2.0 * c)), slope


class CosineTarget(MeanTarget):
    """The mean embedding under the cosine, which is the mean of the directions."""

    def __init__(self, x: Floats) -> None:
        self.rows = self.inside(x)
        self._mean = self.rows.mean(0)

    def inside(self, z: Floats) -> Tensor:
        return _directions(torch.from_numpy(np.array(z, np.float64)))

    def outside(self, z: Tensor) -> Floats:
        return np.asarray(_directions(z).numpy())

    def gram(self, y: Tensor, z: Tensor) -> Tensor:
        return _directions(y) @ _directions(z).T

    def overlaps(self, z: Tensor) -> Tensor:
        return _directions(z) @ self._mean

    def constant(self) -> float:
        return float(self._mean @ self._mean)

    def gradient(self, z: Tensor, beta: Tensor) -> tuple[float, Tensor]:
        """DE/dz_n = 2 beta_n (I - e_n e_n^T) (sum_m beta_m e_m - mean) / |z_n|, with e_n the direction of z_n."""
        unit = _directions(z)
        off = beta @ unit - self._mean
        across = off - (unit @ off)[:, None] * unit
        slope = 2.0 * beta[:, None] * across / z.norm(dim=1, keepdim=True)
        return float(off @ off - self._mean @ self._mean), slope


def mean_target(x: Floats, kernel: str, gamma: float) -> MeanTarget:
    """Return the target for rows x; gamma counts for the Gaussian kernel only."""
    return GaussianTarget(x, gamma) if kernel == "gaussian" else CosineTarget(x)


def kernel_matrix(y: Floats, z: Floats, kernel: str, gamma: float) -> Floats:
    """Return k between rows of y (m, d) and of z (n, d), float64 (m, n)."""
    target = mean_target(np.asarray(z, np.float64), kernel, gamma)
    return np.asarray(target.gram(target.inside(y), target.rows).numpy())


def best_weights(k: Tensor, c: Tensor, beta: Tensor | None, *, simplex: bool) -> Tensor:
    """Return the weights of least E: on the simplex, or free as (K + 1e-6 I)^-1 c."""
    raised = k + (_FLATTEST if simplex else _RIDGE) * torch.eye(len(k), dtype=k.dtype)
    if simplex:
        start = None if beta is None else beta.numpy()
        return torch.from_numpy(simplex_qp(raised.numpy(), c.numpy(), start=start))
    return torch.cholesky_solve(c[:, None], jittered_cholesky(raised))[:, 0]


def alternate(
    target: MeanTarget, z: Tensor, beta: Tensor, *, rounds: int, simplex: bool, constant: float, told: Any = None
) -> tuple[Tensor, Tensor, list[float]]:
    """Minimise E over weights and points in turn.

    Parameters
    ----------
    target : MeanTarget
    z, beta : Tensor, shapes (M, d) and (M,)
        Where to begin; beta on the simplex.
    rounds : int
        Of: some steps of L-BFGS on z, then the weights.
    simplex : bool
    constant : float
        Added to E, 0 where it is not known.
    told : callable, optional
        ``told(round, rounds)`` after each round.

    Returns
    -------
    z, beta : Tensor
    history : list of float
        E at the start, after the first weights, and after each round; it never rises.
    """

    def error(b: Tensor, k: Tensor, c: Tensor) -> float:
        return float(b @ k @ b - 2.0 * b @ c) + constant

    k, c = target.gram(z, z), target.overlaps(z)
    history = [error(beta, k, c)]

    def weighted(z: Tensor, beta: Tensor) -> tuple[Tensor, float]:
        k, c = target.gram(z, z), target.overlaps(z)
        found = best_weights(k, c, beta if simplex else None, simplex=simplex)
        before, after = error(beta, k, c), error(found, k, c)
        # The ridge, and rounding near the solution, may cost a little: then the weights there were stay.
        return (found, after) if after < before else (beta, before)

    beta, after = weighted(z, beta)
    history.append(min(after, history[-1]))
    for done in range(rounds):
        moved = _descended(target, z, beta)
        found, after = weighted(moved, beta)
        if not after < history[-1]:
            break
        gain = history[-1] - after
        z, beta = moved, found
        history.append(after)
        if told is not None:
            told(done + 1, rounds)
        if gain <= _STILL * abs(after):
            break
    return z, beta, history


def _descended(target: MeanTarget, z: Tensor, beta: Tensor) -> Tensor:
    """Return points of lower E after some steps of L-BFGS."""
    shape = tuple(z.shape)
    # Gradients fall with the weights, about 1 / M; the solver's tolerances do not.
    scale = float(len(z))

    def evaluate(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, slope = target.gradient(torch.from_numpy(flat.reshape(shape)), beta)
        return scale * value, scale * slope.numpy().ravel()

    options = {"maxiter": _STEPS, "maxcor": 10, "ftol": 0.0, "gtol": 0.0}
    solved = minimize(evaluate, z.numpy().ravel(), method="L-BFGS-B", jac=True, options=options)
    if not np.isfinite(solved.x).all():
        raise QuernelError("the points ran away: scale the rows, or choose gamma nearer to 1 / median distance^2")
    return torch.from_numpy(solved.x.reshape(shape))


def _directions(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)
