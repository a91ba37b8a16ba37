"""What bundled regressors and classifiers share: random features, their normal equations, and how these go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed
from quernel._validate import check_choice, check_float, check_type
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.features.orthogonal import Projection
from quernel.kernels.features.universal import Spectrum
from quernel.kernels.normal_equations import NormalEquations
from quernel.kernels.random_features import ArcCosineFeatures
from quernel.kernels.universal_random_features import UniversalRandomFeatures

# Rows whose features are held at once: 4,096 rows of 2,048 float32 features are 32 MB.
_BLOCK_ROWS = 4096
_SUMS = {"x": "m ?", "y": "q ?", "xx": "m m ?", "xy": "m q ?", "yy": "q ?"}


class Bundled(SavedEstimator, BaseEstimator):
    """Random features, normal equations, and what is common to both kinds of target."""

    features_: ArcCosineFeatures | UniversalRandomFeatures
    sums_: NormalEquations | None

    _state: ClassVar[Mapping[str, str]] = {
        "features_": "estimator",
        "coef_": "q m",
        "intercept_": "q",
        "sums_count": "int ?",
        **{f"sums_{name}": description for name, description in _SUMS.items()},
    }

    def __init__(
        self,
        n_features: int = 2048,
        *,
        kind: Literal["relu", "urf"] = "relu",
        alpha: float = 1e-3,
        activation: str | Spectrum = "cos",
        damping: float | Literal["auto"] = "auto",
        center: bool | ArrayLike = True,
        projection: Projection = "orthogonal",
        random_state: Seed = None,
    ) -> None:
        self.n_features = n_features
        self.kind = kind
        self.alpha = alpha
        self.activation = activation
        self.damping = damping
        self.center = center
        self.projection = projection
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_choice("kind", self.kind, ("relu", "urf"))
        check_float("alpha", self.alpha, low=0.0)
        self._map().check_params()

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        held = (type(self.features_), self.features_.n_features, self.features_.n_features_in_)
        if held != (type(self._map()), self.coef_.shape[1], cast(Any, self).n_features_in_):
            raise QuernelError("features_ does not fit kind, coef_ or n_features_in_")

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Take in more rows and solve again; the first call draws the features and learns the centre from its rows.

        With ``center`` an array (or ``kind="urf"`` and ``damping`` a number) the order and the split of the rows do
        not matter: the result is that of one ``fit``.
        """
        first = not hasattr(self, "features_")
        if first:
            self.check_params()
        x, targets = self._checked(X, y, reset=first)
        self._take(x, targets, fresh=first)
        return self

    def merge(self, other: Self) -> Self:
        """Take in everything that ``other`` saw, as if its rows had been fitted here.

        Parameters
        ----------
        other : same class
            Fitted with the same parameters, an integer ``random_state`` and a ``center`` (``kind="urf"``: a
            ``damping``) that was given, or a copy of this estimator that saw other rows since.

        Raises
        ------
        QuernelError
            If the two do not have the same features or targets, or one of them has no sums any more.
        """
        check_type("other", other, type(self))
        check_is_fitted(self)
        check_is_fitted(other)
        self._check_same(other)
        if self.sums_ is None or other.sums_ is None:
            raise QuernelError("merge needs the sums of both; forget() was called, or the loss is not the squared one")
        self.sums_.merge(other.sums_)
        self._solve(self.coef_.dtype)
        return self

    def forget(self) -> Self:
        """Drop the m x m sums: as good for predicting, smaller in memory and on disk, but not to be continued."""
        check_is_fitted(self)
        self.sums_ = None
        return self

    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> tuple[Floats, Floats]:
        raise TypeError(f"{type(self).__name__} must define _checked()")

    def _check_same(self, other: Self) -> None:
        mine, theirs = self.features_.arrays(), other.features_.arrays()
        same = self.coef_.shape == other.coef_.shape and mine.keys() == theirs.keys()
        if not same or not all(np.array_equal(array, theirs[name]) for name, array in mine.items()):
            raise QuernelError(
                "merge needs the same random features: fit both with the same parameters, an integer random_state, "
                "and center= an array instead of True (kind='urf': damping= a number)"
            )

    def _map(self) -> ArcCosineFeatures | UniversalRandomFeatures:
        common: dict[str, Any] = {"projection": self.projection, "random_state": self.random_state}
        if self.kind == "relu":
            return ArcCosineFeatures(self.n_features, center=self.center, **common)
        return UniversalRandomFeatures(self.activation, self.n_features, damping=self.damping, **common)

    def _take(self, x: Floats, targets: Floats, *, fresh: bool) -> None:
        if fresh:
            self.features_ = self._map().fit(x)
            self.sums_ = NormalEquations(self.n_features, targets.shape[1])
        if self.sums_ is None:
            raise QuernelError("partial_fit needs the sums of earlier rows; forget() was called. Fit again")
        for block, phi in self._blocks(x):
            self.sums_.update(torch.from_numpy(phi), torch.from_numpy(targets[block]))
        self._solve(x.dtype)

    def _solve(self, dtype: np.dtype[Any]) -> None:
        found = cast(NormalEquations, self.sums_).solve(self.alpha)
        self.coef_, self.intercept_ = (t.numpy().astype(dtype) for t in (found.weight, found.intercept))

    def _blocks(self, x: Floats) -> Iterator[tuple[slice, Floats]]:
        for start in range(0, len(x), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            yield block, self.features_.transform(x[block])

    def _scores(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=FLOATS, reset=False)
        coef, intercept = (a.astype(x.dtype, copy=False) for a in (self.coef_, self.intercept_))
        return np.concatenate([phi @ coef.T + intercept for _, phi in self._blocks(x)])

    def _give_state(self) -> dict[str, Any]:
        sums = getattr(self, "sums_", None)
        held = {} if sums is None else {f"sums_{k}": t.numpy() for k, t in sums.state().items()}
        if held:
            held["sums_count"] = int(held["sums_count"])
        return super()._give_state() | held

    def _take_state(self, state: Mapping[str, Any]) -> None:
        sums = {k.removeprefix("sums_"): torch.as_tensor(v) for k, v in state.items() if k.startswith("sums_")}
        self.sums_ = NormalEquations.from_state(sums) if sums else None
        super()._take_state({k: v for k, v in state.items() if not k.startswith("sums_")})
