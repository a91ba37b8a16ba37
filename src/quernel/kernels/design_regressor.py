"""``DesignRegressor``: choose which rows of a pool to label, label those, fit.

Leverage scores of the pool's features decide which rows are drawn (projection processes, volume-rescaled or independent
sampling), weights undo what the choice does to the mean (arXiv 2312.14057). With the whole pool labelled the same model
is linear regression, or ridge regression, on the features; as much of it as a design can know comes from 2m labels.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import assert_all_finite, check_array, check_is_fitted, validate_data

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.empirical_space import EmpiricalSpace
from quernel.kernels.volume_sampling import METHODS, VolumeSampler
from quernel.kernels.weighted_least_squares import Design, WeightedLeastSquares


def _example() -> dict[str, Any]:
    return {"make": lambda: DesignRegressor(random_state=0)}


@register(
    "volume-sampling-least-squares",
    pillar="kernels",
    contract="estimator",
    paper="2312.14057",
    status="stable",
    example=_example,
)
class DesignRegressor(RegressorMixin, SavedEstimator, BaseEstimator):
    """Choose the rows to label by determinantal sampling, and fit a linear model to their labels.

    ``query(X)`` says which rows of the pool to label, ``fit(X, labels)`` fits. Any scikit-learn transformer gives the
    features, e.g. ``RandomFourierFeatures`` for a kernel model.

    Parameters
    ----------
    base_features : transformer, optional
        Fitted to the pool; default is the columns as they are. What should be saved needs a transformer of Quernel;
        others can be pickled.
    budget : int or float, default=2.0
        Points to draw; a float is a multiple of m, the number of linearly independent features. A row that is drawn
        twice needs one label.
    method : {"dpp_repeat", "volume", "iid"}, default="dpp_repeat"
        See ``VolumeSampler``; "dpp_repeat" is the most accurate, "volume" is unbiased.
    delta : float, optional
        Draw again until the least eigenvalue of the Gram matrix is at least 1 - delta.
    alpha : float, default=0.0
        Ridge penalty of the whole pool's problem, |A c - y|^2 + alpha |c|^2; the penalty's rows are part of the
        population that is drawn from, and need no label.
    fit_intercept : bool, default=True
        Add a constant feature, which is not penalised.
    random_state : int, Generator or None, default=None
        What decides the draw.

    Attributes
    ----------
    indices_ : array of int, shape (s,)
        Rows whose labels were used, ascending.
    coef_ : array, shape (q, M)
        Of the features.
    intercept_ : array, shape (q,)
    rank_ : int
        m.
    gram_min_ : float
        Least eigenvalue of the design's Gram matrix; errors are amplified by 1/gram_min_ at worst.
    unbiased_ : bool
        Whether the mean of the coefficients over all draws is the whole pool's solution.
    features_ : transformer or None

    Notes
    -----
    Time O(N m^2) for the pool's QR factorisation, O(m^3 log m) for a design. Labels are no part of the choice, so all
    can be asked for at once, by many people in parallel.

    References
    ----------
    Nouy and Michel, "Weighted least-squares approximation with determinantal point processes and generalized volume
    sampling", arXiv 2312.14057, 2023.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> pool, disease = load_diabetes(return_X_y=True)
    >>> model = DesignRegressor(budget=66, random_state=0)
    >>> rows = model.query(pool)
    >>> len(rows) <= 66, model.fit(pool, disease[rows]).score(pool, disease) > 0.35
    (True, True)
    """

    _state: ClassVar[Mapping[str, str]] = {
        "features_": "estimator ?",
        "indices_": "s",
        "coef_": "q m",
        "intercept_": "q",
        "rank_": "int",
        "gram_min_": "float",
        "unbiased_": "flag",
        "single_target_": "flag",
    }

    def __init__(
        self,
        base_features: Any = None,
        budget: float = 2.0,
        method: Literal["dpp_repeat", "volume", "iid"] = "dpp_repeat",
        *,
        delta: float | None = None,
        alpha: float = 0.0,
        fit_intercept: bool = True,
        random_state: Seed = None,
    ) -> None:
        self.base_features = base_features
        self.budget = budget
        self.method = method
        self.delta = delta
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags: Any = cast(Any, super()).__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _give_state(self) -> dict[str, Any]:
        # Of a query alone there is nothing to keep: an integer random_state names the same rows again.
        return super()._give_state() if hasattr(self, "coef_") else {}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder that ``quernel.load`` reads, fitted or not.

        Raises
        ------
        QuernelError
            If a parameter cannot be written down, or rows that ``query`` drew by chance would be forgotten.
        """
        drawn = [name for name, value in self.get_params().items() if _is_seed(name) and value is None]
        if self._waits() and drawn:
            raise QuernelError(
                f"{drawn[-1]} must be an integer to be saved between query and fit: the rows that were drawn by chance "
                "could not be named again. Query with one, fit first, or pickle"
            )
        return super().save(path)

    def __getstate__(self) -> Any:
        # The basis of the pool is as large as its features; a copy that waits for no labels needs none.
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_queried" or self._waits()}

    def _waits(self) -> bool:
        """Say whether rows were named whose labels have not come."""
        held: _Query | None = getattr(self, "_queried", None)
        return held is not None and not held.answered

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        made = not isinstance(self.base_features, type)
        if self.base_features is not None and not (made and hasattr(self.base_features, "transform")):
            raise QuernelError(f"base_features must be a transformer or None; got {self.base_features!r}")
        if isinstance(self.budget, int | np.integer):
            check_int("budget", self.budget, low=1)
        else:
            check_float("budget", self.budget, low=0.0, open_low=True)
        check_choice("method", self.method, METHODS)
        if self.delta is not None:
            check_float("delta", self.delta, low=0.0, high=1.0, open_low=True, open_high=True)
        check_float("alpha", self.alpha, low=0.0)
        check_bool("fit_intercept", self.fit_intercept)
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        columns = getattr(self.features_, "n_features", None) if self.features_ is not None else self.n_features_in_
        if columns is not None and self.coef_.shape[1] != columns:
            raise QuernelError(f"coef_ has {self.coef_.shape[1]} columns for {columns} features")
        if self.indices_.dtype != np.int64 or (self.indices_.size and self.indices_.min() < 0):
            raise QuernelError("indices_ must be row numbers")
        if self.single_target_ and len(self.coef_) != 1:
            raise QuernelError(f"coef_ must have one row for a single target; got {len(self.coef_)}")

    def query(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the rows of the pool to label, different and ascending.

        A later ``fit`` with the same pool goes on with this draw.

        Parameters
        ----------
        X : array, shape (N, d)
            The pool.

        Raises
        ------
        QuernelError
            If the pool has fewer rows than features without a penalty, or the budget is below their number.
        """
        self.check_params()
        # A model that is fitted stays what it is until labels come.
        return self._drawn(check_array(X, dtype=FLOATS, ensure_min_samples=2, estimator=self)).design.rows

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to the labels of the rows that ``query`` names.

        Parameters
        ----------
        X : array, shape (N, d)
            The whole pool. If ``query`` was not asked, rows are drawn now.
        y : array, shape (s,), (s, q), (N,) or (N, q)
            A label for each row of ``query(X)``, in its order; or for every row of X, of which only those are read: the
            others may be NaN.

        Raises
        ------
        QuernelError
            If the labels are those of another pool's rows, as far as that can be seen, or one is missing.
        """
        self.check_params()
        if y is None:
            raise QuernelError("DesignRegressor requires y to be passed, but the target y is None")
        x = check_array(X, dtype=FLOATS, ensure_min_samples=2, estimator=self)
        labels = check_array(y, ensure_2d=False, ensure_all_finite=False, dtype=FLOATS, input_name="y")
        whole = len(labels) == len(x)
        drawn = self._drawn(x, fresh=whole)
        rows = drawn.design.rows
        if whole:
            labels = labels[rows]
        elif len(labels) != len(rows):
            raise QuernelError(
                f"y must hold a label for each of the {len(rows)} rows that query(X) names, or for all {len(x)} rows "
                f"of X; got {len(labels)}: inconsistent numbers of samples"
            )
        try:
            assert_all_finite(labels, input_name="y")
        except ValueError as error:
            bad = rows[~np.isfinite(labels).reshape(len(rows), -1).all(1)].tolist()
            raise QuernelError(
                f"{error}\nLabels are needed for the {len(rows)} rows that query(X) names; {len(bad)} have none, "
                f"row {bad[0]} first"
            ) from error
        fitted = WeightedLeastSquares(drawn.space).fit(drawn.design, drawn.design.spread(labels))
        validate_data(self, X, skip_check_array=True)  # keeps names and number of columns
        self.features_ = drawn.features
        self._take_fit(x.dtype, labels.ndim == 1, drawn.space, drawn.design, fitted.coef_)
        self._queried = drawn._replace(answered=True)
        return self

    def predict(self, X: ArrayLike) -> Floats:
        """Return predictions, shape (n,) or (n, q)."""
        check_is_fitted(self, "coef_")
        x = validate_data(self, X, dtype=FLOATS, reset=False)
        features = x if self.features_ is None else np.asarray(self.features_.transform(x))
        scores: Floats = (features @ self.coef_.T.astype(x.dtype) + self.intercept_.astype(x.dtype)).astype(x.dtype)
        return scores[:, 0] if self.single_target_ else scores

    def _drawn(self, x: Floats, *, fresh: bool = True) -> _Query:
        """Return the space of the pool and a design: that of the last query where the pool is the same."""
        digest = _digest(x) + repr(sorted(self.get_params().items(), key=lambda item: item[0]))
        held: _Query | None = getattr(self, "_queried", None)
        if held is not None and held.pool == digest:
            return held
        if held is not None and (not fresh or held.rows == _digest(x)):
            raise QuernelError(
                "X must be the whole pool that query was asked for, in its order and dtype, with the same parameters: "
                "labels belong to its rows. Call query(X) again for another pool"
            )
        if not fresh and not isinstance(self.random_state, int | np.integer):
            raise QuernelError(
                "y has labels of chosen rows, but query(X) was not asked for this X, so that which rows they are is "
                "not known. Label the rows that query(X) names now, or give the integer random_state that named them"
            )
        fitted = None if self.base_features is None else clone(self.base_features).fit(x)
        features = x if fitted is None else np.asarray(fitted.transform(x))
        if self.fit_intercept:
            features = np.column_stack((features, np.ones(len(x), features.dtype)))
        if self.alpha == 0 and len(x) < features.shape[1]:
            raise QuernelError(
                f"X must have at least as many rows as features, {features.shape[1]} with the constant one; got "
                f"{len(x)}. Give more rows, fewer features or alpha > 0"
            )
        penalty = np.full(features.shape[1], float(self.alpha))
        penalty[-1] *= not self.fit_intercept
        space = EmpiricalSpace(features, ridge=penalty)
        n = math.ceil(self.budget * space.n_features) if isinstance(self.budget, float) else int(self.budget)
        if n < space.n_features:
            raise QuernelError(
                f"budget must come to at least {space.n_features} labels, one a feature; budget={self.budget!r} comes "
                f"to {n}"
            )
        sampler = VolumeSampler(space, self.method, n=n, delta=self.delta)
        design = sampler.sample(self.random_state)
        # What fit goes on with; no part of the fitted model, so it is not saved.
        self._queried = _Query(digest, _digest(x[design.rows]), fitted, space, design)
        return self._queried

    def _take_fit(self, dtype: Any, single: bool, space: EmpiricalSpace, design: Design, coef: Floats) -> None:
        raw = space.feature_coefficients(coef.reshape(len(coef), -1)).T.astype(dtype)  # (q, M)
        last = raw.shape[1] - 1 if self.fit_intercept else raw.shape[1]
        self.coef_ = np.ascontiguousarray(raw[:, :last])
        self.intercept_ = raw[:, last].copy() if self.fit_intercept else np.zeros(len(raw), dtype)
        self.indices_ = design.rows
        self.rank_ = space.n_features
        self.gram_min_ = float(design.gram_min)
        self.unbiased_ = design.unbiased
        self.single_target_ = single


def _is_seed(name: str) -> bool:
    return name.rpartition("__")[2] == "random_state"


class _Query(NamedTuple):
    """What a query drew: digests of pool with parameters and of the rows alone, features, space and design."""

    pool: str
    rows: str
    features: Any
    space: EmpiricalSpace
    design: Design
    # Whether a model was fitted to its labels.
    answered: bool = False


def _digest(x: Floats) -> str:
    return hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).hexdigest() + repr((x.shape, str(x.dtype)))
