"""Parts of the Frank-Wolfe method: objectives, steps, the atoms with their exact scan, the active set.

Everything that decides a step is float64, whatever the atoms are: near the optimum <w - s, grad> is a small difference
of large numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import brentq

from quernel._errors import QuernelError
from quernel._validate import check_finite

Vector = NDArray[np.float64]
Evaluate = Callable[[Vector], tuple[float, Vector]]

# A slope is zero when it is this much smaller than at the beginning of the line.
_FLAT = 1e-10
# Rows made float64 at a time.
_BLOCK = 2**15


def open_loop_step(t: int, ratio: float = 1.0) -> float:
    """Return 2 / (c t + 2): in (0, 1] for every t, and right where <w - s, grad> >= c times the gap."""
    return 2.0 / (ratio * t + 2.0)


class Objective(Protocol):
    """A smooth convex function, a number that it never falls below, and the best step along a line."""

    floor: float

    def __call__(self, w: Vector) -> tuple[float, Vector]:
        """Return value and gradient."""

    def best_step(self, w: Vector, direction: Vector, slope: float, limit: float) -> float:
        """Return the step in [0, limit] with the least value; ``slope`` is <gradient, direction> < 0."""


class LeastSquares:
    """g(w) = |w - target|^2 / 2."""

    floor = 0.0

    def __init__(self, target: Vector) -> None:
        self.target = target

    def __call__(self, w: Vector) -> tuple[float, Vector]:
        """Return value and gradient."""
        rest = w - self.target
        return 0.5 * float(rest @ rest), rest

    def best_step(self, w: Vector, direction: Vector, slope: float, limit: float) -> float:
        """Return the step in closed form."""
        curvature = float(direction @ direction)
        return min(limit, -slope / curvature) if curvature > 0 else 0.0


class Given:
    """The user's function, checked on every call."""

    floor = -np.inf

    def __init__(self, evaluate: Evaluate, dim: int) -> None:
        self.evaluate, self.dim = evaluate, dim

    def __call__(self, w: Vector) -> tuple[float, Vector]:
        """Return value and gradient."""
        try:
            value, gradient = self.evaluate(w.copy())
        except (TypeError, ValueError) as error:
            raise QuernelError(
                f"objective must return (value, gradient) for w of shape ({self.dim},): {error}"
            ) from error
        grad = np.asarray(gradient, dtype=np.float64)
        if grad.shape != (self.dim,):
            raise QuernelError(f"objective must return a gradient of shape ({self.dim},); got {grad.shape}")
        if not np.isfinite(value) or not np.isfinite(grad).all():
            raise QuernelError(
                "objective returned NaN or infinity; likely causes: (a) it is not defined on the whole hull of the "
                "atoms, (b) a division or logarithm in it needs an epsilon, (c) the atoms are badly scaled"
            )
        return float(value), grad

    def best_step(self, w: Vector, direction: Vector, slope: float, limit: float) -> float:
        """Return where the slope, which grows along the line, is zero: two evaluations for a quadratic."""

        def along(step: float) -> float:
            return slope if step == 0 else float(self(w + step * direction)[1] @ direction)

        at_limit = along(limit)
        if at_limit <= 0:
            return limit
        secant = limit * slope / (slope - at_limit)
        if abs(along(secant)) <= _FLAT * -slope:
            return secant
        return float(brentq(along, 0.0, limit, xtol=1e-14 * limit, rtol=1e-12))


class Atoms:
    """The atoms, dense or CSR, as they were given, and the exact scan over them.

    Attributes
    ----------
    matrix : array or CSR matrix, shape (n, d), float32 or float64
    mean : array, shape (d,), float64
    """

    matrix: Any

    def __init__(self, atoms: Any) -> None:
        self.sparse = sparse.issparse(atoms)
        matrix: Any = atoms.tocsr() if self.sparse else np.asarray(atoms)
        if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
            raise QuernelError(
                f"atoms must be real numbers of shape (n, d); got {matrix.dtype} of shape {matrix.shape}"
            )
        if not matrix.shape[0] or not matrix.shape[1]:
            raise QuernelError(f"atoms must hold at least one atom and one coordinate; got shape {matrix.shape}")
        if matrix.dtype not in (np.float32, np.float64):
            matrix = matrix.astype(np.float64)
        check_finite("atoms", matrix.data if self.sparse else matrix)
        self.matrix = matrix if self.sparse else np.ascontiguousarray(matrix)
        self.n, self.dim = matrix.shape
        if self.sparse:
            self.mean = np.asarray(matrix.mean(0), dtype=np.float64).reshape(-1)
            self._slack = 0.0
        else:
            self.mean = matrix.mean(0, dtype=np.float64)
            longest = float(np.sqrt(np.einsum("ij,ij->i", self.matrix, self.matrix, dtype=matrix.dtype).max()))
            # Twice what rounding can add to a product of d float32 terms, relative to |grad|.
            single = matrix.dtype == np.float32
            self._slack = 2 * (self.dim + 3) * 2.0**-24 * longest if single else 0.0

    def row(self, i: int) -> Vector:
        """Return one atom, shape (d,)."""
        row = self.matrix[[i]].toarray()[0] if self.sparse else self.matrix[i]
        return np.asarray(row, dtype=np.float64)

    def scan(self, grad: Vector) -> tuple[int, float]:
        """Return the atom of least <s, grad> and that product, exact in float64; the first of equal ones.

        float32 atoms are compared in float32, and all that rounding could have put in the wrong order once more.
        """
        products = self.matrix @ (grad if self.sparse else grad.astype(self.matrix.dtype, copy=False))
        i = int(products.argmin())
        if not self._slack:
            return i, float(self.row(i) @ grad)
        near = np.flatnonzero(products <= products[i] + np.float32(self._slack * np.linalg.norm(grad)))
        parts = [near[j : j + _BLOCK] for j in range(0, len(near), _BLOCK)]
        exact = np.concatenate([self.matrix[part].astype(np.float64) @ grad for part in parts])
        return int(near[exact.argmin()]), float(exact.min())


class ActiveSet:
    """The atoms that w is made of: w = weights @ rows, weights positive with sum 1."""

    def __init__(self, i: int, row: Vector) -> None:
        self._ids, self._rows, self._weights = np.zeros(16, np.int64), np.zeros((16, len(row))), np.zeros(16)
        self._ids[0], self._rows[0], self._weights[0] = i, row, 1.0
        self._place = {i: 0}

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Numbers of the atoms, shape (k,)."""
        return self._ids[: len(self)]

    @property
    def rows(self) -> Vector:
        """The atoms, shape (k, d)."""
        return self._rows[: len(self)]

    @property
    def weights(self) -> Vector:
        """Their weights, shape (k,)."""
        return self._weights[: len(self)]

    def point(self) -> Vector:
        """Return w, shape (d,)."""
        return self.weights @ self.rows

    def toward(self, i: int, row: Vector, step: float) -> None:
        """Do w <- (1 - step) w + step s_i."""
        self.weights[:] *= 1 - step
        place = self._placed(i, row)
        self._weights[place] += step
        if step >= 1:
            self._drop(keep=place)

    def away(self, place: int, step: float, limit: float) -> None:
        """Do w <- w + step (w - s), s at ``place``; at ``limit`` = weight / (1 - weight) it leaves the set."""
        weight = self._weights[place]
        self.weights[:] *= 1 + step
        self._weights[place] = 0.0 if step >= limit else (1 + step) * weight - step
        self._remove_empty(place)

    def exchange(self, place: int, i: int, row: Vector, step: float) -> None:
        """Do w <- w + step (s_i - s), s at ``place``."""
        self._weights[place] = 0.0 if step >= self._weights[place] else self._weights[place] - step
        new = self._placed(i, row)
        self._weights[new] += step
        self._remove_empty(place)

    def _placed(self, i: int, row: Vector) -> int:
        """Return the place of an atom, a new one with weight 0 if it has none."""
        if i not in self._place:
            k = len(self)
            if k == len(self._ids):
                self._ids, self._weights = np.resize(self._ids, 2 * k), np.resize(self._weights, 2 * k)
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._ids[k], self._rows[k], self._weights[k] = i, row, 0.0
            self._place[i] = k
        return self._place[i]

    def _remove_empty(self, place: int) -> None:
        if self._weights[place] > 0:
            return
        last = len(self) - 1
        del self._place[int(self._ids[place])]
        if place != last:
            for held in (self._ids, self._rows, self._weights):
                held[place] = held[last]
            self._place[int(self._ids[place])] = place

    def _drop(self, keep: int) -> None:
        i, row = int(self._ids[keep]), self._rows[keep].copy()
        self._ids[0], self._rows[0], self._weights[0] = i, row, 1.0
        self._place = {i: 0}
