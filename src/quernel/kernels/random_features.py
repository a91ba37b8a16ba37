"""scikit-learn transformers whose columns' dot products estimate a kernel.

``RandomFourierFeatures``: the Gaussian kernel. ``ArcCosineFeatures``: the kernel of a wide random ReLU layer.
Both draw their directions in ``fit`` (Gaussian, block-orthogonal, or Hadamard-structured: 3 signs a column instead
of d numbers a row) and keep the input's precision. Cost of a transform: n_features d a row, or n_features log d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from quernel._errors import QuernelError
from quernel._random import Seed
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_float
from quernel.kernels._random_features import Floats, RandomFeatures
from quernel.kernels.features.arc_cosine import ORDERS, arc_cosine_features
from quernel.kernels.features.fourier import fourier_features
from quernel.kernels.features.orthogonal import Projection


def _fourier_example() -> dict[str, Any]:
    return {"make": lambda: RandomFourierFeatures(64, gamma=0.1, random_state=0)}


@register(
    "random-fourier-features",
    pillar="kernels",
    contract="estimator",
    paper=None,
    status="stable",
    example=_fourier_example,
)
class RandomFourierFeatures(RandomFeatures):
    """Paired cosines and sines whose dot products estimate the Gaussian kernel exp(-gamma |x - y|^2).

    ``sklearn.kernel_approximation.RBFSampler`` uses cosines with random offsets instead; pairs have a lower
    variance at as many columns, and orthogonal directions lower it further.

    Parameters
    ----------
    n_features : int, default=256
        Columns, an even number.
    gamma : float or "scale", default="scale"
        "scale" is 1 / (d * variance of all entries of X), as in scikit-learn.
    projection : {"orthogonal", "gaussian", "hadamard"}, default="orthogonal"
        How directions are drawn.
    random_state : int, Generator or None, default=None
        What decides the draw.

    Attributes
    ----------
    gamma_ : float
        The gamma used.

    References
    ----------
    Sutherland and Schneider, "On the Error of Random Fourier Features", arXiv 1506.02785, 2015.
    Yu et al., "Orthogonal Random Features", arXiv 1610.09072, 2016.

    Examples
    --------
    >>> x = np.array([[0.0, 0.0], [0.5, 0.5]])
    >>> z = RandomFourierFeatures(4096, gamma=1.0, random_state=0).fit_transform(x)
    >>> print(f"{z[0] @ z[0]:.3f} {abs(z[0] @ z[1] - np.exp(-0.5)) < 0.03}")
    1.000 True
    """

    _columns_a_direction: ClassVar[int] = 2
    _state: ClassVar[Mapping[str, str]] = {**RandomFeatures._state, "gamma_": "float"}

    def __init__(
        self,
        n_features: int = 256,
        *,
        gamma: float | Literal["scale"] = "scale",
        projection: Projection = "orthogonal",
        random_state: Seed = None,
    ) -> None:
        self.n_features = n_features
        self.gamma = gamma
        self.projection = projection
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        if self.gamma != "scale":
            if isinstance(self.gamma, str):
                raise QuernelError(f'gamma must be "scale" or a number > 0; got {self.gamma!r}')
            check_float("gamma", self.gamma, low=0.0, open_low=True)

    def _prepare(self, x: Floats, draw: np.random.Generator) -> None:
        variance = float(x.var(dtype=np.float64))
        # All entries equal: any gamma gives the same kernel on them.
        self.gamma_ = (1 / (x.shape[1] * variance) if variance > 0 else 1.0) if self.gamma == "scale" else self.gamma

    def _map(self, x: Floats) -> Floats:
        return fourier_features(self._project(x) * x.dtype.type(np.sqrt(2 * self.gamma_)))


def _arc_cosine_example() -> dict[str, Any]:
    return {"make": lambda: ArcCosineFeatures(64, projection="hadamard", random_state=0)}


@register(
    "snnk",
    pillar="kernels",
    contract="estimator",
    paper="2310.13225",
    status="stable",
    headline=False,
    example=_arc_cosine_example,
)
class ArcCosineFeatures(RandomFeatures):
    """Random ReLU features, whose dot products estimate the arc-cosine kernel.

    Columns are sqrt(2 / n) max(G x, 0): a random ReLU layer that is never trained. A linear model on them is what
    ``BundledRegressor`` and ``BundledClassifier`` fit in closed form.

    Parameters
    ----------
    n_features : int, default=256
        Columns.
    order : {0, 1, 2}, default=1
        0 is a step, 1 a ReLU, 2 a squared ReLU.
    threshold : float, default=0.0
        With order 1: max(G x, threshold); other values than 0 leave the arc-cosine kernel.
    center : bool or array of shape (d,), default=True
        What is subtracted from every row first: the mean of the rows given to ``fit``, nothing, or this. ReLU
        features of rows far from the origin are nearly linear, so centring matters.
    projection : {"orthogonal", "gaussian", "hadamard"}, default="orthogonal"
        How directions are drawn.
    random_state : int, Generator or None, default=None
        What decides the draw.

    Attributes
    ----------
    center_ : array, shape (d,)
        What is subtracted.

    References
    ----------
    Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009.
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> features = ArcCosineFeatures(4096, center=False, random_state=0).fit_transform(np.eye(3))
    >>> bool(abs(features[0] @ features[1] - 1 / np.pi) < 0.03)
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**RandomFeatures._state, "center_": "d"}

    def __init__(
        self,
        n_features: int = 256,
        *,
        order: Literal[0, 1, 2] = 1,
        threshold: float = 0.0,
        center: bool | ArrayLike = True,
        projection: Projection = "orthogonal",
        random_state: Seed = None,
    ) -> None:
        self.n_features = n_features
        self.order = order
        self.threshold = threshold
        self.center = center
        self.projection = projection
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        check_choice("order", self.order, ORDERS)
        check_float("threshold", self.threshold)
        if self.threshold and self.order != 1:
            raise QuernelError(f"threshold needs order=1; got threshold={self.threshold} with order={self.order}")
        if not isinstance(self.center, bool):
            checked_center(self.center)

    def _prepare(self, x: Floats, draw: np.random.Generator) -> None:
        self.center_ = center_of(self.center, x)

    def _map(self, x: Floats) -> Floats:
        projections = self._project(x - self.center_.astype(x.dtype, copy=False))
        return arc_cosine_features(projections, self.order, self.threshold)


def center_of(center: bool | ArrayLike, x: Floats) -> Floats:
    """Return what ``center`` means for rows x, shape (d,)."""
    if isinstance(center, bool):
        mean = x.mean(0, dtype=np.float64) if center else np.zeros(x.shape[1])
        return mean.astype(x.dtype)
    given = checked_center(center)
    if given.shape != (x.shape[1],):
        raise QuernelError(f"center must have shape ({x.shape[1]},) to match the columns; got {given.shape}")
    return given.astype(x.dtype)


def checked_center(center: ArrayLike) -> Floats:
    """Return ``center`` as an array, or raise a ``QuernelError``."""
    try:
        given = np.asarray(center, np.float64)
    except (TypeError, ValueError) as error:
        raise QuernelError(f"center must be True, False or an array of numbers; got {center!r}") from error
    if given.ndim != 1:
        raise QuernelError(f"center must be True, False or an array of shape (d,); got shape {given.shape}")
    check_finite("center", given)
    return given
