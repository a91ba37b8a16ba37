"""``Design`` and ``WeightedLeastSquares``: points with weights, and the fit to what was measured there.

    c = argmin (1/n) sum_i w_i (y_i - c . phi(x_i))^2,   G = (1/n) sum_i w_i phi(x_i) phi(x_i)^T,

with w = dmu/drho for points whose reference measure is rho. The least eigenvalue of G says what a design is good for,
before anything is measured: |f - Qf|^2 <= |f - Pf|^2 + |f - Pf|_n^2/lambda_min(G). Cost O(n m^2), by a QR
factorisation of the weighted rows; G is never formed for the solution.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lstsq, qr, solve_triangular
from sklearn.exceptions import NotFittedError

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite, check_float, check_int, check_type
from quernel.kernels.design_spaces import Space

Array = NDArray[np.float64]

# Below this least eigenvalue of G a residual may come back a thousand times larger.
LEAST_GRAM = 1e-6
# Eigenvalues of G are right to about 1e-14; up to here a zero cannot be told, and singular values decide.
_UNDETERMINED = 1e-12


class IllConditionedDesignWarning(UserWarning):
    """The points of a design do not determine the fit: it may be far off, whatever is measured there."""


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Design:
    """Points to measure at, and how much each counts.

    Attributes
    ----------
    points : array, shape (n, dim), or of int, shape (n,)
        Points of a ``LegendreSpace`` and the like, or row numbers of an ``EmpiricalSpace``. A row may come twice: it
        is labelled once and counts twice.
    weights : array, shape (n,)
        w of each point.
    gram_min : float
        The least eigenvalue of G; 1 is perfect, 0 means that the fit is not determined.
    method : str
        How the points were drawn.
    unbiased : bool
        Whether the mean of the fitted coefficients over all draws is the projection's, whatever the function.
    tries : int
        Draws until one was good enough.
    n_rows : int or None
        Rows that can be labelled; higher numbers stand for a penalty, whose target is 0.
    """

    points: NDArray[Any]
    weights: Array
    gram_min: float
    method: str = "given"
    unbiased: bool = False
    tries: int = 1
    n_rows: int | None = None

    @classmethod
    def of(cls, space: Space, points: ArrayLike, weights: ArrayLike) -> Self:
        """Return the design of given points and weights; of what law they are is not known, so it is not unbiased."""
        check_type("space", space, Space)
        held, w = np.asarray(points), np.asarray(weights, np.float64)
        if w.shape != held.shape[:1] or not len(held) or not np.isfinite(w).all() or not (w > 0).all():
            raise QuernelError(
                f"weights must be positive, one a point; got shape {w.shape} for points of shape {held.shape}"
            )
        return cls(held, w, gram_min(space.phi(held), w), n_rows=getattr(space, "n_rows", None))

    def __len__(self) -> int:
        return len(self.points)

    @property
    def indices(self) -> NDArray[np.int64]:
        """Row numbers, where the space is that of finitely many rows."""
        if self.n_rows is None:
            raise QuernelError("this design has points, not rows; read .points")
        return self.points

    @property
    def rows(self) -> NDArray[np.int64]:
        """The different rows that need a label, ascending."""
        distinct: NDArray[np.int64] = np.unique(self.indices[self.indices < (self.n_rows or 0)])
        return distinct

    def spread(self, labels: ArrayLike) -> Array:
        """Return a target for each point from one label for each of ``rows``: repeated where a row is, else 0.

        Parameters
        ----------
        labels : array, shape (len(rows),) or (len(rows), q)
        """
        rows, given = self.rows, np.asarray(labels, np.float64)
        if given.ndim not in (1, 2) or len(given) != len(rows):
            raise QuernelError(f"labels must be one for each of the {len(rows)} rows; got shape {given.shape}")
        real = self.indices < (self.n_rows or 0)
        targets = np.zeros((len(self), *given.shape[1:]))
        targets[real] = given[np.searchsorted(rows, self.indices[real])]
        return targets


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
class WeightedLeastSquares:
    """The best approximation in a space, from values at the points of a design.

    Parameters
    ----------
    space : Space
        What is fitted in.
    min_gram : float, default=1e-6
        Designs whose ``gram_min`` is below are warned about.

    Attributes
    ----------
    coef_ : array, shape (m,) or (m, q)
        Coefficients of phi.
    gram_min_ : float
        Of the design.
    unbiased_ : bool
        Whether the design makes ``coef_`` an unbiased estimator of the projection's coefficients.

    Warns
    -----
    IllConditionedDesignWarning
        If the design leaves the fit undetermined, or nearly so; then the coefficients of least length are taken.

    References
    ----------
    Nouy and Michel, arXiv 2312.14057, 2023.

    Examples
    --------
    >>> from quernel.kernels import LegendreSpace, VolumeSampler
    >>> space = LegendreSpace(4)
    >>> design = VolumeSampler(space, n=10).sample(0)
    >>> fit = WeightedLeastSquares(space).fit(design, design.points[:, 0] ** 3)
    >>> fit.predict([0.5]).round(6).tolist()
    [0.125]
    """

    def __init__(self, space: Space, *, min_gram: float = LEAST_GRAM) -> None:
        self.space = check_type("space", space, Space)
        self.min_gram = check_float("min_gram", min_gram, low=0.0, high=1.0)

    def fit(self, design: Design, y: ArrayLike) -> Self:
        """Fit values ``y``, shape (n,) or (n, q), measured at ``design.points``; see ``Design.spread``."""
        check_type("design", design, Design)
        targets = np.asarray(y, np.float64)
        if targets.ndim not in (1, 2) or len(targets) != len(design):
            raise QuernelError(f"y must be one value for each of the {len(design)} points; got shape {targets.shape}")
        check_finite("y", targets)
        warn_if_ill(design.gram_min, len(design), self.space.n_features, self.min_gram)
        root = np.sqrt(design.weights)
        rows = np.asarray(self.space.phi(design.points), np.float64) * root[:, None]
        weighted = targets * root.reshape(-1, *[1] * (targets.ndim - 1))
        self.coef_ = _solved(rows, weighted, design.gram_min > _UNDETERMINED)
        self.gram_min_ = design.gram_min
        self.unbiased_ = design.unbiased
        return self

    def predict(self, x: ArrayLike) -> Array:
        """Return the fit at points ``x`` of the space (rows or features of an ``EmpiricalSpace``), (n,) or (n, q)."""
        if not hasattr(self, "coef_"):
            raise NotFittedError("WeightedLeastSquares is not fitted; call fit with a design and values")
        predicted: Array = self.space.phi(x) @ self.coef_
        return predicted


def _solved(rows: Array, targets: Array, determined: bool) -> Array:
    """Return the least-squares solution, the shortest where there are many."""
    if determined:
        q, r = qr(rows, mode="economic", check_finite=False)
        solved: Array = solve_triangular(r, q.T @ targets, check_finite=False)
        return solved
    cut = max(rows.shape) * np.finfo(np.float64).eps
    shortest: Array = lstsq(rows, targets, cond=cut, check_finite=False)[0]
    return shortest


def gram_min(phi: Array, weights: Array) -> float:
    """Return the least eigenvalue of G = (1/n) sum_i w_i phi_i phi_i^T; exactly 0 for fewer points than functions."""
    n, m = phi.shape
    if n < m:
        return 0.0
    rows = phi * np.sqrt(weights / n)[:, None]
    return max(float(np.linalg.eigvalsh(rows.T @ rows)[0]), 0.0)


def warn_if_ill(least: float, n: int, m: int, floor: float = LEAST_GRAM) -> None:
    """Warn if a design of ``n`` points for ``m`` functions has too small an eigenvalue to be of use."""
    if least >= floor:
        return
    why = f"{n} points for {m} functions" if n < m else f"the {n} points leave a direction of the {m} functions unseen"
    warnings.warn(
        f"the design is ill-conditioned: the least eigenvalue of its Gram matrix is {least:.1e}, so that errors may be "
        f"amplified {1 / least if least else math.inf:.0e}-fold ({why}). Draw more points, use method='volume' or "
        "'dpp_repeat', or give delta=",
        IllConditionedDesignWarning,
        stacklevel=3,
    )


def stable_sample_size(n_features: int, *, delta: float = 0.5, eta: float = 0.01) -> int:
    """Return how many independent draws from nu give |G - I| <= delta with a probability of 1 - eta.

    n >= m log(2m/eta)/((1 + delta) log(1 + delta) - delta), the matrix Chernoff bound. It is what independent sampling
    pays; designs by volume sampling need O(m log m) with small constants, often 2m.

    Examples
    --------
    >>> stable_sample_size(20)
    1534
    """
    m = check_int("n_features", n_features, low=1)
    d = check_float("delta", delta, low=0.0, high=1.0, open_low=True, open_high=True)
    e = check_float("eta", eta, low=0.0, high=1.0, open_low=True, open_high=True)
    return math.ceil(m * math.log(2 * m / e) / ((1 + d) * math.log1p(d) - d))
