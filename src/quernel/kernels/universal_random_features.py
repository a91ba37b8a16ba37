"""``UniversalRandomFeatures``: f(w.x + b) from one random map of x and one of (w, b) (SNNK, arXiv 2310.13225).

The maths is in ``quernel.kernels.features.universal``; this draws frequencies and directions, chooses the damping
and refuses rows so long that the estimate would be noise. Cost: n_features / 2 times d a row, or times log d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_array, check_is_fitted

from quernel._errors import QuernelError
from quernel._random import Seed
from quernel._registry import register
from quernel._validate import check_float
from quernel.kernels._random_features import FLOATS, Floats, RandomFeatures
from quernel.kernels.features.hadamard import padded_size
from quernel.kernels.features.orthogonal import Projection
from quernel.kernels.features.universal import (
    Spectrum,
    best_damping,
    check_damping,
    check_exponents,
    log_scales,
    slopes,
    spectrum_of,
    universal_features,
    universal_weight_features,
)

_TOO_LONG = "its rows of length 4 to 140 are refused: the variance of the estimate would be beyond use"
_LONG_ROWS = (
    "check_dict_unchanged",
    "check_estimators_dtypes",
    "check_f_contiguous_array_estimator",
    "check_fit_idempotent",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
)


def _universal_example() -> dict[str, Any]:
    return {
        "make": lambda: UniversalRandomFeatures("sin", 64, random_state=0),
        "scale": 0.2,
        "expected_failures": dict.fromkeys(_LONG_ROWS, _TOO_LONG),
    }


@register(
    "snnk",
    pillar="kernels",
    contract="estimator",
    paper="2310.13225",
    status="stable",
    headline=False,
    example=_universal_example,
)
class UniversalRandomFeatures(RandomFeatures):
    """Two random maps, of inputs and of weights, whose dot product is an unbiased estimate of f(w.x + b).

    For activations with a Fourier transform that can be integrated. The variance grows like
    exp(2 pi |xi| |x + w|^2), so rows and weights should have lengths near 1: divide by the mean length first.

    Parameters
    ----------
    activation : {"cos", "sin", "gauss"} or Spectrum, default="cos"
        f; "gauss" is exp(-z^2 / 2).
    n_features : int, default=256
        Columns, an even number: real and imaginary parts.
    damping : float or "auto", default="auto"
        The paper's M >= 0, which trades the size of single terms for their spread. "auto" minimises the second
        moment of each frequency's term at the mean length of the rows seen by ``fit``.
    weight_norm : float, default=1.0
        Length of the weights that "auto" expects.
    projection : {"orthogonal", "gaussian", "hadamard"}, default="orthogonal"
        How directions are drawn.
    random_state : int, Generator or None, default=None
        What decides the draw.

    Attributes
    ----------
    frequencies_, damping_ : array, shape (n_features / 2,)
        What was drawn and chosen.

    Notes
    -----
    Each single term is exactly unbiased with Gaussian and orthogonal directions; Hadamard-structured ones are close.

    References
    ----------
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> maps = UniversalRandomFeatures("cos", 8192, random_state=0).fit(np.eye(4))
    >>> estimate = maps.transform(np.eye(4)) @ maps.transform_weights(np.eye(4), np.full(4, 0.5)).T
    >>> bool(abs(estimate - np.cos(np.eye(4) + 0.5)).max() < 0.1)
    True
    """

    _columns_a_direction: ClassVar[int] = 2
    _state: ClassVar[Mapping[str, str]] = {**RandomFeatures._state, "frequencies_": "n", "damping_": "n"}

    def __init__(
        self,
        activation: str | Spectrum = "cos",
        n_features: int = 256,
        *,
        damping: float | Literal["auto"] = "auto",
        weight_norm: float = 1.0,
        projection: Projection = "orthogonal",
        random_state: Seed = None,
    ) -> None:
        self.activation = activation
        self.n_features = n_features
        self.damping = damping
        self.weight_norm = weight_norm
        self.projection = projection
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        spectrum_of(self.activation)
        check_damping(self.damping)
        check_float("weight_norm", self.weight_norm, low=0.0)

    def transform_weights(self, weight: ArrayLike, bias: ArrayLike | None = None) -> Floats:
        """Return the features of weights.

        Parameters
        ----------
        weight : array, shape (l, d)
            Rows w.
        bias : array, shape (l,), optional
            b of f(w.x + b).

        Returns
        -------
        features : array, shape (l, n_features)
            ``transform(X) @ features.T`` estimates ``f(X @ weight.T + bias)``, shape (n, l).

        Raises
        ------
        QuernelError
            If the weights are so long that the estimate is useless, or shapes do not fit.
        """
        check_is_fitted(self)
        w = check_array(weight, dtype=FLOATS)
        if w.shape[1] != cast(Any, self).n_features_in_:
            raise QuernelError(f"weight must have {cast(Any, self).n_features_in_} columns; got shape {w.shape}")
        b = None if bias is None else check_array(bias, ensure_2d=False, dtype=w.dtype)
        if b is not None and b.shape != (w.shape[0],):
            raise QuernelError(f"bias must have shape ({w.shape[0]},); got {b.shape}")
        ratio = spectrum_of(self.activation).ratio(self.frequencies_)
        return universal_weight_features(*self._terms(w, "weight"), ratio=ratio, bias=b)

    def _prepare(self, x: Floats, draw: np.random.Generator) -> None:
        self.frequencies_ = spectrum_of(self.activation).sample(draw, self.n_features // 2)
        fixed = check_damping(self.damping)
        if fixed is None:
            squares = float(np.square(x, dtype=np.float64).sum(1).mean()) + self.weight_norm**2
            self.damping_ = best_damping(np.pi * np.abs(self.frequencies_) * squares, self._dim(x))
        else:
            self.damping_ = np.full(len(self.frequencies_), fixed)

    def _map(self, x: Floats) -> Floats:
        return universal_features(*self._terms(x, "X"))

    def _terms(self, rows: Floats, what: str) -> tuple[Floats, Floats, Floats, Floats]:
        squares = np.square(rows).sum(1, keepdims=True)
        check_exponents(squares, self.frequencies_, what)
        scales = log_scales(self._squared_lengths(), self._dim(rows), self.damping_)
        held = (slopes(self.frequencies_, self.damping_), self.frequencies_, scales)
        slope, frequencies, scale = (array.astype(rows.dtype) for array in held)
        return self._project(rows) * slope, squares, frequencies, scale

    def _dim(self, rows: Floats) -> int:
        return padded_size(rows.shape[1]) if self._structured else rows.shape[1]
