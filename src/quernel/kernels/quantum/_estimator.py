"""What both quantum classifiers share: the parameters of their map, columns scaled to angles, labels checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed, generator
from quernel._validate import check_bool, check_int
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.quantum.feature_map import MOST_QUBITS, QuantumFeatureMap

Labels = NDArray[Any]
# New rows may lie a little outside of the training rows' range, by which columns are scaled.
_OVERSHOOT = 0.25


class QuantumClassifier(ClassifierMixin, SavedEstimator, BaseEstimator):
    """Scaling, labels and the feature map."""

    reps: int
    entanglement: Any
    interactions: Any
    scale: float
    rescale: bool
    shots: int | None
    random_state: Seed

    low_: NDArray[np.float64]
    span_: NDArray[np.float64]
    classes_: Labels

    _state: ClassVar[Mapping[str, str]] = {"low_": "d", "span_": "d", "classes_": "labels k"}

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_bool("rescale", self.rescale)
        if self.shots is not None:
            check_int("shots", self.shots, low=1)
        generator(self.random_state, "random_state")
        self._map("complex128")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if not (self.span_ > 0).all():
            raise QuernelError("span_ must be positive")

    @property
    def _pairs(self) -> int:
        """Binary problems that the labels make one against another."""
        k = len(self.classes_)
        return k * (k - 1) // 2

    def _map(self, dtype: Any) -> QuantumFeatureMap:
        held = QuantumFeatureMap(None, self.reps, self.entanglement, self.interactions, self.scale, dtype)
        return replace(held, margin=_OVERSHOOT) if self.rescale else held

    def _training_rows(self, X: ArrayLike, y: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
        """Learn the scaling; return angles and class numbers."""
        self.check_params()
        x, labels = validate_data(self, X, y, dtype=FLOATS)
        check_classification_targets(labels)
        if x.shape[1] > MOST_QUBITS:
            raise QuernelError(
                f"X must have at most {MOST_QUBITS} columns, one qubit each; got {x.shape[1]}. "
                "Reduce them first, e.g. by sklearn.decomposition.PCA"
            )
        self.classes_, places = np.unique(column_or_1d(labels, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise QuernelError(f"y must hold at least two classes; got 1 class, {self.classes_.tolist()[0]!r}")
        wide = x.astype(np.float64)
        if self.rescale:
            self.low_ = wide.min(0)
            reach = wide.max(0) - self.low_
            self.span_ = np.where(reach > 0, reach, 1.0)
        else:
            self.low_, self.span_ = np.zeros(x.shape[1]), np.full(x.shape[1], 2 * math.pi)
        return self._angles(x), places.astype(np.int64)

    def _rows(self, X: ArrayLike) -> tuple[Floats, np.dtype[Any]]:
        """Return angles of new rows, and the dtype that answers are to have."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=FLOATS, reset=False)
        return self._angles(x), x.dtype

    def _seed_of_new_rows(self) -> Seed:
        """Return a seed for predictions: other shots than those of the training, the same in every call."""
        seed = self.random_state
        return np.random.SeedSequence([int(seed), 1]) if isinstance(seed, int | np.integer) else seed

    def _angles(self, x: Floats) -> Floats:
        return cast(Floats, (x.astype(np.float64) - self.low_) * (2 * math.pi / self.span_)).astype(x.dtype)


def difference_or_scores(scores: Floats) -> Floats:
    """Return scores (n, q) as ``decision_function`` gives them: one column as a vector."""
    return scores[:, 0] if scores.shape[1] == 1 else scores
