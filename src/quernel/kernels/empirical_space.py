"""``EmpiricalSpace``: linear functions of the features of N rows, of which a few shall be labelled.

mu is a distribution over the rows. With B_i = (N mu_i)^(1/2) A_i and B = Q R, functions are phi_i = Q_i/mu_i^(1/2), the
leverage is l_i = |Q_i|^2, nu_i = l_i/m, and the weight mu_i/nu_i = m mu_i/l_i. Ridge regression appends rows
lambda_j^(1/2) e_j with the known target 0: points of the population that need no label. Memory O(N m), no N x N.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import qr, solve_triangular

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_bool, check_finite, check_float, check_int

Array = NDArray[np.float64]

# Rows multiplied at once, so that the basis is the only large array that is made beside the factored one.
_BLOCK = 4096
# What a basis given as orthonormal may be off, entry by entry of its mean outer product.
_ORTHONORMAL = 1e-6


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
class EmpiricalSpace:
    """Linear functions of features of finitely many rows, made orthonormal by a rank-revealing QR factorisation.

    Points of this space are row numbers.

    Parameters
    ----------
    features : array, shape (N, M)
        One row an item. Columns may depend on each other: m is the numerical rank.
    masses : array, shape (N,), optional
        Positive probabilities of the rows, any sum; default is all alike. A fine grid with the density of mu at its
        nodes stands for a continuous mu (Hermite functions, splines).
    ridge : float or array of shape (M,), default=0.0
        lambda of the penalty sum_j lambda_j c_j^2, added to N sum_i mu_i (A_i c - y_i)^2; with equal masses it is the
        ``alpha`` of ``sklearn.linear_model.Ridge``. It allows more columns than rows.
    orthonormal : bool, default=False
        The columns are orthonormal in L2(mu) already; this is checked, and they are taken as they are.
    rank_tolerance : float, optional
        Columns (scaled to unit norm) with a pivot below this share of the largest are left out. Default is
        16 eps max(N, M)^(1/2), with eps of the dtype of ``features``.

    Attributes
    ----------
    n_features : int
        m, the rank.
    n_rows, n_points : int
        N, and N plus the rows of the penalty.
    columns : array of int, shape (m,)
        The columns that span the space.
    leverage : array, shape (n_points,)
        |Q_i|^2, in [0, 1], of sum m. A row of leverage 0 is never drawn.

    Raises
    ------
    QuernelError
        If features are not finite, all zero, more than the rows without a penalty, or not orthonormal though they are
        said to be.

    References
    ----------
    Nouy and Michel, arXiv 2312.14057, 2023; Derezinski, Warmuth, Hsu, "Unbiased estimators for random design
    regression", arXiv 1907.03411, 2019.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((100, 3))
    >>> space = EmpiricalSpace(np.column_stack((x, x[:, 0] + x[:, 1])))
    >>> space.n_features, round(float(space.leverage.sum()), 9)
    (3, 3.0)
    """

    orthonormal_by_construction: ClassVar[bool] = True

    def __init__(
        self,
        features: ArrayLike,
        *,
        masses: ArrayLike | None = None,
        ridge: float | ArrayLike = 0.0,
        orthonormal: bool = False,
        rank_tolerance: float | None = None,
    ) -> None:
        a = np.asarray(features)
        if a.ndim != 2 or not a.size or a.dtype.kind not in "biuf":
            raise QuernelError(f"features must be numbers of shape (N, M); got {a.dtype} of shape {a.shape}")
        check_finite("features", a)
        self.n_rows, self.n_columns = a.shape
        penalty = self._penalty(ridge)
        self.n_points = self.n_rows + len(penalty)
        self._masses = self._probabilities(masses)
        if self.n_columns > self.n_points:
            raise QuernelError(
                f"features have {self.n_columns} columns for {self.n_rows} rows: m must not exceed N. Reduce the "
                "columns (PCA), or give ridge > 0"
            )
        if check_bool("orthonormal", orthonormal):
            self._take_basis(a, len(penalty))
        else:
            self._factor(a, penalty, self._tolerance(rank_tolerance, a.dtype))
        self.leverage: Array = np.einsum("ij,ij->i", self._basis, self._basis)
        self._cumulated = np.cumsum(self.leverage)
        self._cumulated /= self._cumulated[-1]

    def __repr__(self) -> str:
        return f"EmpiricalSpace({self.n_rows} rows, {self.n_columns} columns, rank {self.n_features})"

    @property
    def n_features(self) -> int:
        """The number of functions m."""
        return len(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are held."""
        own = (self._basis, self.leverage, self._cumulated, self._masses, self.columns)
        return sum(array.nbytes for array in own) + (self._triangle.nbytes if self._triangle is not None else 0)

    def phi(self, x: ArrayLike) -> Array:
        """Return the functions, shape (n, m).

        Parameters
        ----------
        x : array of int, shape (n,), or array of float, shape (n, M)
            Row numbers of the population, or features of any rows.
        """
        given = np.asarray(x)
        if given.ndim == 1 and given.dtype.kind in "iu":
            if given.size and (given.min() < 0 or given.max() >= self.n_points):
                raise QuernelError(f"x must be row numbers in [0, {self.n_points}); got {given.min()} .. {given.max()}")
            scale: Array = 1 / np.sqrt(self._masses[given])
            rows: Array = self._basis[given] * scale[:, None]
            return rows
        if given.ndim != 2 or given.shape[1] != self.n_columns:
            raise QuernelError(
                f"x must be row numbers of shape (n,), or features of shape (n, {self.n_columns}); got {given.dtype} "
                f"of shape {given.shape}"
            )
        check_finite("x", given)
        if self._triangle is None:
            return given.astype(np.float64)
        wide = given[:, self.columns].astype(np.float64) / self._scale[self.columns]
        solved: Array = solve_triangular(self._triangle, wide.T, trans="T", check_finite=False).T
        return solved * np.sqrt(self.n_points)

    def feature_coefficients(self, coef: ArrayLike) -> Array:
        """Return the coefficients of the columns of ``features``, (M,) or (M, q), for those of phi, (m,) or (m, q)."""
        c = np.asarray(coef, np.float64)
        if c.ndim not in (1, 2) or len(c) != self.n_features:
            raise QuernelError(f"coef must have shape ({self.n_features},) or ({self.n_features}, q); got {c.shape}")
        if self._triangle is None:
            return c.copy()
        out = np.zeros((self.n_columns, *c.shape[1:]))
        scale = self._scale[self.columns].reshape(-1, *[1] * (c.ndim - 1))
        out[self.columns] = np.sqrt(self.n_points) * solve_triangular(self._triangle, c, check_finite=False) / scale
        return out

    def sample_mu(self, n: int, random_state: Seed = None) -> NDArray[np.int64]:
        """Return ``n`` independent points from mu, shape (n,)."""
        cumulated = np.cumsum(self._masses)
        return _inverse(cumulated / cumulated[-1], n, random_state)

    def sample_nu(self, n: int, random_state: Seed = None) -> NDArray[np.int64]:
        """Return ``n`` independent points, each with a probability of leverage/m, shape (n,)."""
        return _inverse(self._cumulated, n, random_state)

    def _penalty(self, ridge: float | ArrayLike) -> Array:
        """Return the rows that the penalty appends, (V, M)."""
        each = np.asarray(ridge)
        if each.ndim:
            each = each.astype(np.float64)
            if each.shape != (self.n_columns,) or not np.isfinite(each).all() or (each < 0).any():
                raise QuernelError(
                    f"ridge must be one number >= 0, or {self.n_columns} of them; got shape {each.shape}"
                )
        else:
            each = np.full(self.n_columns, check_float("ridge", ridge, low=0.0))
        rows: Array = np.diag(np.sqrt(each))[each > 0]
        return rows

    def _probabilities(self, masses: ArrayLike | None) -> Array:
        given = np.ones(self.n_rows) if masses is None else np.asarray(masses, np.float64)
        if given.shape != (self.n_rows,) or not np.isfinite(given).all() or not (given > 0).all():
            found = f"shape {given.shape}" if given.shape != (self.n_rows,) else f"values down to {given.min():g}"
            raise QuernelError(f"masses must be {self.n_rows} positive numbers, one a row; got {found}")
        # Rows of the penalty count like one row each.
        rows = given * (self.n_rows / given.sum())
        out: Array = np.append(rows, np.ones(self.n_points - self.n_rows)) / self.n_points
        return out

    def _tolerance(self, given: float | None, dtype: np.dtype[Any]) -> float:
        if given is not None:
            return check_float("rank_tolerance", given, low=0.0, high=1.0, open_high=True)
        eps = np.finfo(dtype if dtype.kind == "f" else np.float64).eps
        return float(16 * eps * np.sqrt(max(self.n_points, self.n_columns)))

    def _take_basis(self, a: NDArray[Any], penalties: int) -> None:
        if penalties:
            raise QuernelError(
                "ridge must be 0 with orthonormal=True: a penalty changes which functions are orthonormal"
            )
        self._basis: Array = a * np.sqrt(self._masses)[:, None]
        off = float(np.abs(self._basis.T @ self._basis - np.eye(self.n_columns)).max())
        if off > _ORTHONORMAL:
            raise QuernelError(
                f"features are not orthonormal: their mean outer product is off the identity by {off:.2g}. "
                "Leave orthonormal=False, and they are made so"
            )
        self.columns: NDArray[np.int64] = np.arange(self.n_columns)
        self._scale: Array = np.ones(self.n_columns)
        self._triangle: Array | None = None

    def _factor(self, a: NDArray[Any], penalty: Array, tolerance: float) -> None:
        # Column-major, and overwritten by its factor.
        b = np.empty((self.n_points, self.n_columns), order="F")
        b[: self.n_rows] = a
        b[: self.n_rows] *= np.sqrt(self._masses[: self.n_rows] * self.n_points)[:, None]
        b[self.n_rows :] = penalty
        norms = np.sqrt(np.einsum("ij,ij->j", b, b))
        self._scale = np.where(norms > 0, norms, 1.0)
        b /= self._scale
        tall, upper = qr(b, mode="economic", overwrite_a=True, check_finite=False)
        # Pivoting the small factor reveals the rank as pivoting the large one would, at the speed of blocked QR.
        turn, triangle, order = qr(upper, pivoting=True, check_finite=False)
        pivots = np.abs(np.diag(triangle))
        rank = int((pivots > max(tolerance * pivots[0], np.finfo(np.float64).tiny)).sum())
        if rank == 0:
            raise QuernelError("features are zero in every row: there is nothing to fit or to choose by")
        turn = np.ascontiguousarray(turn[:, :rank])
        self._basis = np.empty((self.n_points, rank))
        for start in range(0, self.n_points, _BLOCK):
            self._basis[start : start + _BLOCK] = tall[start : start + _BLOCK] @ turn
        self.columns = np.asarray(order[:rank], np.int64)
        self._triangle = np.ascontiguousarray(triangle[:rank, :rank])


def _inverse(cumulated: Array, n: int, random_state: Seed) -> NDArray[np.int64]:
    """Return draws from a distribution over finitely many, given its cumulated probabilities."""
    uniforms = generator(random_state, "random_state").random(check_int("n", n, low=0))
    # From the right: an outcome of probability 0 is never met.
    return np.searchsorted(cumulated, uniforms, side="right").astype(np.int64)
