"""Fully bundled SNNK models: a linear model on random features, fitted in closed form (arXiv 2310.13225).

A network whose layers are all replaced by kernel features and multiplied together is Y = Theta Phi(x). Theta is
ridge regression on Phi: one pass, no gradient step, exact over batches (``partial_fit``) and workers (``merge``).
Cost: n (m d + m^2) multiply-adds and one m x m Cholesky factorisation for m features; stored are m (d + q) numbers,
or m q and some signs with Hadamard-structured directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from quernel._errors import QuernelError
from quernel._random import Seed
from quernel._registry import register
from quernel._validate import check_choice, check_float
from quernel.kernels._bundled import Bundled
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.features.orthogonal import Projection
from quernel.kernels.features.universal import Spectrum


def _example_with(cls: type[Bundled]) -> dict[str, Any]:
    def make(**options: Any) -> Bundled:
        return cls(64, **{"random_state": 0, **options})

    return {"make": make, "streaming": lambda columns: make(center=np.full(columns, 0.1))}


@register(
    "snnk",
    pillar="kernels",
    contract="estimator",
    paper="2310.13225",
    status="stable",
    headline=False,
    example=lambda: _example_with(BundledRegressor),
)
class BundledRegressor(RegressorMixin, Bundled):
    """Ridge regression on random features in one pass: a two-layer network without a gradient step.

    Parameters
    ----------
    n_features : int, default=2048
        Random features m.
    kind : {"relu", "urf"}, default="relu"
        ``ArcCosineFeatures``, or ``UniversalRandomFeatures`` for rows of length near 1.
    alpha : float, default=1e-3
        Regularisation relative to the mean variance of the features.
    activation : str or Spectrum, default="cos"
        For ``kind="urf"``.
    damping : float or "auto", default="auto"
        For ``kind="urf"``: M >= 0 of the features; "auto" suits the lengths of the first rows.
    center : bool or array of shape (d,), default=True
        For ``kind="relu"``: what is subtracted from every row first; True is the mean of the rows of ``fit``, or of
        the first ``partial_fit``.
    projection : {"orthogonal", "gaussian", "hadamard"}, default="orthogonal"
        How the directions of the features are drawn.
    random_state : int, Generator or None, default=None
        What decides the draw.

    Attributes
    ----------
    features_ : ArcCosineFeatures or UniversalRandomFeatures
    coef_, intercept_ : array, shapes (q, m) and (q,)
        Of the linear model on the features.
    sums_ : NormalEquations or None
        What ``partial_fit`` and ``merge`` go on with; ``forget`` drops it.

    Notes
    -----
    Columns of very different scales should be standardised first (``sklearn.preprocessing.StandardScaler``).

    References
    ----------
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 200)[:, None]
    >>> model = BundledRegressor(64, alpha=1e-6, random_state=0).fit(x, np.abs(x[:, 0]))
    >>> round(model.score(x, np.abs(x[:, 0])), 3)
    1.0
    """

    _state: ClassVar[Mapping[str, str]] = {**Bundled._state, "single_target_": "flag"}

    def __sklearn_tags__(self) -> Any:
        tags: Any = cast(Any, super()).__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit rows ``X``, shape (n, d), to targets ``y``, shape (n,) or (n, q)."""
        self.check_params()
        x, targets = self._checked(X, y, reset=True)
        self._take(x, targets, fresh=True)
        return self

    def predict(self, X: ArrayLike) -> Floats:
        """Return predictions, shape (n,) or (n, q)."""
        scores = self._scores(X)
        return scores[:, 0] if self.single_target_ else scores

    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> tuple[Floats, Floats]:
        x, targets = validate_data(self, X, y, dtype=FLOATS, y_numeric=True, multi_output=True, reset=reset)
        if reset:
            self.single_target_ = targets.ndim == 1
        targets = targets.reshape(len(targets), -1).astype(x.dtype)
        if not reset and targets.shape[1] != self.coef_.shape[0]:
            raise QuernelError(f"y must have {self.coef_.shape[0]} columns as before; got {targets.shape[1]}")
        return x, targets


def _has_probabilities(model: BundledClassifier) -> bool:
    if model.loss != "logistic":
        raise AttributeError("predict_proba needs loss='logistic'; the squared loss gives scores, not probabilities")
    return True


@register(
    "snnk",
    pillar="kernels",
    contract="estimator",
    paper="2310.13225",
    status="stable",
    headline=False,
    example=lambda: _example_with(BundledClassifier),
)
class BundledClassifier(ClassifierMixin, Bundled):
    """Classification by ridge regression, or logistic regression, on random features.

    With the squared loss this is scikit-learn's ``RidgeClassifier`` on the features: targets are -1 and 1, the class
    of the largest score wins.

    Parameters
    ----------
    n_features, kind, alpha, activation, damping, center, projection, random_state
        As for ``BundledRegressor``.
    loss : {"squared", "logistic"}, default="squared"
        "squared" is one pass in closed form; "logistic" holds all features in memory, runs a convex solver and
        gives probabilities, but cannot be continued or merged.

    Attributes
    ----------
    classes_ : array, shape (k,)
    features_, coef_, intercept_, sums_
        As for ``BundledRegressor``.

    References
    ----------
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> x, y = load_digits(return_X_y=True)
    >>> BundledClassifier(512, random_state=0).fit(x[:1000], y[:1000]).score(x[1000:], y[1000:]) > 0.93
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**Bundled._state, "classes_": "labels k"}

    def __init__(
        self,
        n_features: int = 2048,
        *,
        kind: Literal["relu", "urf"] = "relu",
        alpha: float = 1e-3,
        loss: Literal["squared", "logistic"] = "squared",
        activation: str | Spectrum = "cos",
        damping: float | Literal["auto"] = "auto",
        center: bool | ArrayLike = True,
        projection: Projection = "orthogonal",
        random_state: Seed = None,
    ) -> None:
        super().__init__(
            n_features,
            kind=kind,
            alpha=alpha,
            activation=activation,
            damping=damping,
            center=center,
            projection=projection,
            random_state=random_state,
        )
        self.loss = loss

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        check_choice("loss", self.loss, ("squared", "logistic"))
        if self.loss == "logistic":
            check_float("alpha", self.alpha, low=0.0, open_low=True)

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if self.coef_.shape[0] != _columns_for(len(self.classes_)):
            raise QuernelError(f"coef_ has {self.coef_.shape[0]} rows, which do not fit {len(self.classes_)} classes")

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit rows ``X``, shape (n, d), to labels ``y``, shape (n,)."""
        self.check_params()
        x, labels = self._rows(X, y, reset=True)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise QuernelError(f"y must hold at least two classes; got 1 class, {self.classes_[0]!r}")
        if self.loss == "logistic":
            self._fit_logistic(x, labels)
        else:
            self._take(x, self._targets(labels, x.dtype), fresh=True)
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Take in more rows and solve again; see ``BundledRegressor.partial_fit``.

        Parameters
        ----------
        X : array, shape (n, d)
        y : array, shape (n,)
        classes : array, shape (k,), optional
            All labels there will ever be; needed by the first call.
        """
        if self.loss != "squared":
            raise QuernelError(f"partial_fit needs loss='squared', whose sums can be continued; got {self.loss!r}")
        first = not hasattr(self, "features_")
        if first:
            if classes is None:
                raise QuernelError("classes must be given to the first partial_fit: all labels there will be")
            found = np.unique(np.asarray(classes))
            if len(found) < 2:
                raise QuernelError(f"classes must hold at least two classes; got {len(found)} class")
            self.classes_ = found
        elif classes is not None and not np.array_equal(np.unique(np.asarray(classes)), self.classes_):
            raise QuernelError(f"classes must be those of the first partial_fit, {self.classes_}; got {classes!r}")
        return super().partial_fit(X, y)

    def decision_function(self, X: ArrayLike) -> Floats:
        """Return scores, shape (n,) for two classes, else (n, k)."""
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the class of the largest score, shape (n,)."""
        scores = self.decision_function(X)
        return self.classes_[scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)]

    @available_if(_has_probabilities)
    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return probabilities of the classes, shape (n, k); with ``loss="logistic"`` only."""
        scores = torch.from_numpy(self._scores(X))
        both = scores if scores.shape[1] > 1 else torch.cat((torch.zeros_like(scores), scores), dim=1)
        return both.softmax(1).numpy()

    def _checked(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> tuple[Floats, Floats]:
        x, labels = self._rows(X, y, reset=reset)
        return x, self._targets(labels, x.dtype)

    def _check_same(self, other: Self) -> None:
        if not np.array_equal(self.classes_, other.classes_):
            raise QuernelError(f"merge needs the same classes: {self.classes_} here, {other.classes_} in other")
        super()._check_same(other)

    def _rows(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> tuple[Floats, NDArray[Any]]:
        x, labels = validate_data(self, X, y, dtype=FLOATS, reset=reset)
        check_classification_targets(labels)
        return x, column_or_1d(labels, warn=True)

    def _targets(self, labels: NDArray[Any], dtype: Any) -> Floats:
        place = np.searchsorted(self.classes_, labels)
        known = self.classes_[np.minimum(place, len(self.classes_) - 1)] == labels
        if not known.all():
            raise QuernelError(f"y holds {labels[~known][0]!r}, which is not one of the classes {self.classes_}")
        targets = np.full((len(labels), _columns_for(len(self.classes_))), -1, dtype)
        if targets.shape[1] == 1:
            targets[place == 1] = 1
        else:
            targets[np.arange(len(labels)), place] = 1
        return targets

    def _fit_logistic(self, x: Floats, labels: NDArray[Any]) -> None:
        self.features_ = self._map().fit(x)
        self.sums_ = None
        phi = np.concatenate([block for _, block in self._blocks(x)])
        # The same scale as in closed form, where alpha multiplies the mean diagonal of the centred X^T X.
        diagonal = float(phi.var(0, dtype=np.float64).mean()) * len(phi)
        solved = LogisticRegression(C=1 / (self.alpha * max(diagonal, 1e-300)), max_iter=1000).fit(phi, labels)
        self.coef_, self.intercept_ = solved.coef_.astype(x.dtype), solved.intercept_.astype(x.dtype)


def _columns_for(classes: int) -> int:
    return 1 if classes == 2 else classes
