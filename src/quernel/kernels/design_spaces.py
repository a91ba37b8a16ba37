"""Spaces of functions to fit in: Legendre and trigonometric polynomials, and features of finitely many rows.

A space is what designs of experiments need of phi_1 .. phi_m, orthonormal in L2(mu): their values, draws from mu, and
draws from nu with density |phi(x)|^2/m to mu (leverage scores, if X is finite). Whatever has ``n_features``, ``phi``,
``sample_mu`` and ``sample_nu`` is one; ``check_orthonormal`` tests those that come from elsewhere.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int, check_type
from quernel.kernels._dpp_kernels import legendre_squares, legendre_table

Array = NDArray[np.float64]

INDEX_SETS = ("total", "hyperbolic")
# Draws and standard errors of the moment test: 8 of them are a false alarm in 1e15.
_MOMENT_DRAWS, _MOMENT_ERRORS = 4096, 8.0
# Their Gram matrix would have 10^10 numbers.
_MOST_FUNCTIONS = 100_000
# Rounding of coordinates that were scaled into the cube.
_OUTSIDE = 1e-9


@runtime_checkable
class Space(Protocol):
    """m functions that are orthonormal in L2(mu), and draws from mu and nu.

    ``phi(x)`` has shape (n, m); points are an array whose first axis counts them.
    """

    @property
    def n_features(self) -> int: ...

    def phi(self, x: Any) -> Array: ...

    def sample_mu(self, n: int, random_state: Seed = None) -> NDArray[Any]: ...

    def sample_nu(self, n: int, random_state: Seed = None) -> NDArray[Any]: ...


def check_orthonormal(space: Any) -> None:
    """Raise unless ``space`` is a ``Space`` whose functions are orthonormal, by a moment test.

    Over draws from nu, m phi phi^T/|phi|^2 must have mean I and m/|phi|^2 mean 1; both are bounded, so that few draws
    decide. Spaces of this module are orthonormal by construction, and are not tested.

    Raises
    ------
    QuernelError
        If a method is missing, shapes are wrong, or a moment is more than 8 standard errors off.
    """
    check_type("space", space, Space)
    if getattr(space, "orthonormal_by_construction", False):
        return
    m = check_int("space.n_features", space.n_features, low=1)
    rows = np.asarray(space.phi(space.sample_nu(_MOMENT_DRAWS, 0)), np.float64)
    if rows.shape != (_MOMENT_DRAWS, m):
        raise QuernelError(f"space.phi must give shape (n, {m}) for n points; got {rows.shape} for {_MOMENT_DRAWS}")
    check_finite("space.phi of points from sample_nu", rows)
    lengths = (rows**2).sum(1)
    if not (lengths > 0).all():
        raise QuernelError("space.sample_nu gives points where all functions are zero; their density should be zero")
    weights = m / lengths
    means = np.append((rows.T @ (rows * weights[:, None])).ravel() / _MOMENT_DRAWS, weights.mean())
    squares = np.append(((rows**2).T @ (rows * weights[:, None]) ** 2).ravel() / _MOMENT_DRAWS, (weights**2).mean())
    error = np.maximum(np.sqrt(np.maximum(squares - means**2, 0.0) / _MOMENT_DRAWS), 1e-9)
    worst = float((np.abs(means - np.append(np.eye(m).ravel(), 1.0)) / error).max())
    if worst > _MOMENT_ERRORS:
        raise QuernelError(
            "the functions of space are not orthonormal, or sample_nu does not draw from |phi|^2/m dmu: a second "
            f"moment is {worst:.0f} standard errors off. Likely causes: (a) mu is no probability, (b) functions are "
            "not scaled to unit norm; EmpiricalSpace(phi(points)) makes an orthonormal basis of any features"
        )


class _TensorSpace(ABC):
    """Products of functions of one coordinate each, over a set of multi-indices."""

    orthonormal_by_construction: ClassVar[bool] = True

    def __init__(self, degree: int, dim: int = 1, *, index_set: Literal["total", "hyperbolic"] = "total") -> None:
        self.degree = check_int("degree", degree, low=0)
        self.dim = check_int("dim", dim, low=1)
        self.index_set = check_choice("index_set", index_set, INDEX_SETS)
        orders = list(itertools.islice(_orders(self.degree, self.dim, index_set == "total"), _MOST_FUNCTIONS + 1))
        if len(orders) > _MOST_FUNCTIONS:
            raise QuernelError(
                f"degree={degree} in dim={dim} gives more than {_MOST_FUNCTIONS:,} functions, too many to fit; lower "
                'it, or take index_set="hyperbolic"'
            )
        self.indices = self._columns(np.array(orders, np.int64))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.degree}, {self.dim}, index_set={self.index_set!r})"

    @property
    def n_features(self) -> int:
        """The number of functions m."""
        return len(self.indices)

    def phi(self, x: ArrayLike) -> Array:
        """Return the functions at points ``x``, shape (n, dim), or (n,) in one dimension, as (n, m)."""
        points = self._points(x)
        values = np.ones((len(points), self.n_features))
        for axis in range(self.dim):
            values *= self._table(np.ascontiguousarray(points[:, axis]))[:, self.indices[:, axis]]
        return values

    def sample_nu(self, n: int, random_state: Seed = None) -> Array:
        """Return ``n`` points from |phi|^2/m dmu: a function is picked, then a point from its square; (n, dim)."""
        check_int("n", n, low=0)
        rng = generator(random_state, "random_state")
        return self._sample_squares(self.indices[rng.integers(self.n_features, size=n)], rng)

    @abstractmethod
    def sample_mu(self, n: int, random_state: Seed = None) -> Array:
        """Return ``n`` points from mu, shape (n, dim)."""

    @abstractmethod
    def _table(self, x: Array) -> Array:
        """Return all functions of one coordinate at ``x`` (n,)."""

    @abstractmethod
    def _sample_squares(self, columns: NDArray[np.int64], rng: np.random.Generator) -> Array:
        """Return a point a row, from the product of the squares of these functions; (n, dim) -> (n, dim)."""

    def _columns(self, orders: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which columns of the table multi-indices of orders (k, dim) mean."""
        return orders

    def _points(self, x: ArrayLike) -> Array:
        points = np.asarray(x, np.float64)
        if points.ndim == 1 and self.dim == 1:
            points = points[:, None]
        if points.ndim != 2 or points.shape[1] != self.dim:
            raise QuernelError(f"x must have shape (n, {self.dim}); got {np.shape(x)}")
        check_finite("x", points)
        return points


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
class LegendreSpace(_TensorSpace):
    """Polynomials on the cube [-1, 1]^dim, orthonormal for the uniform distribution.

    Functions are products of sqrt(2j + 1) P_j. Draws from nu are exact: each coordinate by rejection from the arcsine
    law, (2j + 1) P_j(x)^2/2 <= (2/pi) (1 - x^2)^(-1/2), which keeps every second proposal.

    Parameters
    ----------
    degree : int
        Largest degree.
    dim : int, default=1
        Coordinates.
    index_set : {"total", "hyperbolic"}, default="total"
        Degrees with sum_k j_k <= degree, or with prod_k (j_k + 1) <= degree + 1.

    Attributes
    ----------
    n_features : int
        Functions m.
    indices : array of int, shape (m, dim)
        The degree of each function in each coordinate.

    References
    ----------
    Nouy and Michel, "Weighted least-squares approximation with determinantal point processes and generalized volume
    sampling", arXiv 2312.14057, 2023.

    Examples
    --------
    >>> LegendreSpace(8, 2).n_features, LegendreSpace(8, 2, index_set="hyperbolic").n_features
    (45, 23)
    """

    def sample_mu(self, n: int, random_state: Seed = None) -> Array:
        """Return ``n`` uniform points, shape (n, dim)."""
        return generator(random_state, "random_state").uniform(-1.0, 1.0, (check_int("n", n, low=0), self.dim))

    def _table(self, x: Array) -> Array:
        return legendre_table(x, self.degree)

    def _sample_squares(self, columns: NDArray[np.int64], rng: np.random.Generator) -> Array:
        degrees = columns.ravel()
        found = np.empty(degrees.size)
        pending = np.arange(degrees.size)
        while pending.size:
            angle = np.pi * rng.random(pending.size)
            x = np.cos(angle)
            share = 0.25 * np.pi * np.sin(angle) * legendre_squares(x, degrees[pending])
            kept = rng.random(pending.size) < share
            found[pending[kept]] = x[kept]
            pending = pending[~kept]
        return found.reshape(columns.shape)

    def _points(self, x: ArrayLike) -> Array:
        points = super()._points(x)
        if points.size and np.abs(points).max() > 1 + _OUTSIDE:
            raise QuernelError(
                f"x must lie in [-1, 1]^{self.dim}; got a coordinate of {points.flat[np.abs(points).argmax()]:.6g}. "
                "Map each variable to [-1, 1] first"
            )
        return points


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
class TrigonometricSpace(_TensorSpace):
    """Trigonometric polynomials of period 1 in every coordinate, orthonormal for uniform points of [0, 1)^dim.

    Functions are products of 1, 2^0.5 cos(2 pi f x) and 2^0.5 sin(2 pi f x). The sum of their squares is the same
    everywhere, so that nu is uniform too.

    Parameters
    ----------
    degree : int
        Largest frequency; 2 degree + 1 functions in one dimension.
    dim : int, default=1
        Coordinates.
    index_set : {"total", "hyperbolic"}, default="total"
        Frequencies with sum_k f_k <= degree, or with prod_k (f_k + 1) <= degree + 1.

    Attributes
    ----------
    n_features : int
        Functions m.
    indices : array of int, shape (m, dim)
        0 for the constant, 2 f - 1 for the cosine and 2 f for the sine of frequency f.

    References
    ----------
    Nouy and Michel, arXiv 2312.14057, 2023.

    Examples
    --------
    >>> TrigonometricSpace(1).phi([0.0, 0.25]).round(3).tolist()
    [[1.0, 1.414, 0.0], [1.0, 0.0, 1.414]]
    """

    def sample_mu(self, n: int, random_state: Seed = None) -> Array:
        """Return ``n`` uniform points, shape (n, dim)."""
        return generator(random_state, "random_state").random((check_int("n", n, low=0), self.dim))

    def _table(self, x: Array) -> Array:
        table = np.ones((len(x), 2 * self.degree + 1))
        angles = 2 * np.pi * x[:, None] * np.arange(1, self.degree + 1)
        table[:, 1::2] = np.sqrt(2) * np.cos(angles)
        table[:, 2::2] = np.sqrt(2) * np.sin(angles)
        return table

    def _sample_squares(self, columns: NDArray[np.int64], rng: np.random.Generator) -> Array:
        # With every cosine there is its sine, and the mixture of their squares is uniform.
        return rng.random(columns.shape)

    def _columns(self, orders: NDArray[np.int64]) -> NDArray[np.int64]:
        for axis in range(self.dim):
            waves = orders[orders[:, axis] > 0]
            cosines, sines = waves.copy(), waves.copy()
            # Negative until all axes are done, so that no column is taken for a frequency.
            cosines[:, axis] = -(2 * waves[:, axis] - 1)
            sines[:, axis] = -2 * waves[:, axis]
            orders = np.concatenate((orders[orders[:, axis] == 0], cosines, sines))
        return -orders


def _orders(degree: int, dim: int, total: bool) -> Iterator[tuple[int, ...]]:
    """Yield the multi-indices of sum <= degree, or of prod (j + 1) <= degree + 1."""
    if dim == 0:
        yield ()
        return
    for first in range(degree + 1):
        rest = degree - first if total else (degree + 1) // (first + 1) - 1
        for later in _orders(rest, dim - 1, total):
            yield (first, *later)
