"""What the random-feature transformers share: drawing directions, projecting on them, and the checks around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed, generator
from quernel._validate import check_choice, check_int
from quernel.kernels.features.hadamard import hadamard_directions, hadamard_projection, padded_size
from quernel.kernels.features.orthogonal import PROJECTIONS, Projection, gaussian_directions, orthogonal_directions

Floats = NDArray[np.floating[Any]]
FLOATS = (np.float64, np.float32)


class RandomFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, SavedEstimator, BaseEstimator):
    """What the transformers share: drawing directions, projecting, and the checks around it."""

    n_features: int
    projection: Projection
    random_state: Seed

    # Rows of directions a column: a cosine and a sine share one.
    _columns_a_direction: ClassVar[int] = 1
    _state: ClassVar[Mapping[str, str]] = {"directions_": "n d ?", "signs_": "blocks 3 padded ?", "lengths_": "n ?"}

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_int("n_features", self.n_features, low=1)
        if self.n_features % self._columns_a_direction:
            raise QuernelError(f"n_features must be even, for pairs of columns; got {self.n_features}")
        check_choice("projection", self.projection, PROJECTIONS)
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        rows = self.n_features // self._columns_a_direction
        if self._structured:
            size = padded_size(cast(Any, self).n_features_in_)
            wanted: tuple[int, ...] = (-(-rows // size), 3, size)
            if self.signs_.shape != wanted or self.lengths_.shape != (rows,):
                raise QuernelError(f"signs_ must have shape {wanted} and lengths_ {rows} numbers")
        elif self.directions_.shape[0] != rows:
            raise QuernelError(f"directions_ must have {rows} rows for n_features={self.n_features}")

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Draw the random directions for rows like those of ``X``, shape (n, d); ``y`` is ignored."""
        self.check_params()
        x = validate_data(self, X, dtype=FLOATS)
        draw = generator(self.random_state, "random_state")
        self._prepare(x, draw)
        rows, dim = self.n_features // self._columns_a_direction, x.shape[1]
        if self._structured:
            drawn = hadamard_directions(rows, dim, draw)
            self.signs_, self.lengths_ = drawn.signs, drawn.lengths.astype(x.dtype)
        else:
            maker = orthogonal_directions if self.projection == "orthogonal" else gaussian_directions
            self.directions_ = maker(rows, dim, draw).astype(x.dtype)
        self._finish(x)
        return self

    def transform(self, X: ArrayLike) -> Floats:
        """Return the features of the rows of ``X``, shape (n, n_features); float32 stays float32."""
        check_is_fitted(self)
        return self._map(validate_data(self, X, dtype=FLOATS, reset=False))

    def _prepare(self, x: Floats, draw: np.random.Generator) -> None:
        """Learn or draw what comes before the directions."""

    def _finish(self, x: Floats) -> None:
        """Learn what needs the directions."""

    def _map(self, x: Floats) -> Floats:
        raise TypeError(f"{type(self).__name__} must define _map()")

    @property
    def _structured(self) -> bool:
        return self.projection == "hadamard"

    @property
    def _n_features_out(self) -> int:
        return self.n_features

    def _project(self, x: Floats) -> Floats:
        if self._structured:
            # torch takes writable memory only; a copy is small beside the transform.
            return hadamard_projection(x if x.flags.writeable else x.copy(), self.signs_, self.lengths_)
        return x @ self.directions_.astype(x.dtype, copy=False).T

    def _squared_lengths(self) -> NDArray[np.float64]:
        held = self.lengths_**2 if self._structured else np.square(self.directions_, dtype=np.float64).sum(1)
        return held.astype(np.float64)
