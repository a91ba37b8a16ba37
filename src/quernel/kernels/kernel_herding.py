"""``KernelHerding``: a few rows whose mean in feature space is that of all of them (Welling, 2009; Chen et al., 2010).

    w_0 = mu (or 0),   x_{t+1} = argmax_x <w_t, Phi(x)>,   w_{t+1} = w_t + mu - Phi(x_{t+1}),

with mu the mean of Phi over the rows. Then w_t = w_0 + t (mu - mean of the chosen), so a bounded w is an error of
O(1/t) in every moment that Phi sees. From w_0 = 0 it is Frank-Wolfe on |z - mu|^2 / 2 with step 1 / (t + 1). The argmax
is an inner-product search, which an index answers in sub-linear time (arXiv 2111.15139).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import validate_data

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int
from quernel.kernels._frank_wolfe_steps import Atoms
from quernel.kernels._lazy_oracle import Lookup, nearest
from quernel.kernels._random_features import FLOATS
from quernel.kernels.frank_wolfe import check_lookup, filled
from quernel.kernels.random_features import RandomFourierFeatures

INITS = ("mu", "zero")


def _example() -> dict[str, Any]:
    return {"make": lambda: KernelHerding(8, random_state=0)}


@register(
    "lsh-frank-wolfe",
    pillar="kernels",
    contract="estimator",
    paper="2111.15139",
    status="stable",
    headline=False,
    example=_example,
)
class KernelHerding(SavedEstimator, BaseEstimator):
    """Choose rows whose mean embedding is close to that of all rows: a coreset, in order of importance.

    Every beginning of the sequence is a coreset of its own. A row may be chosen more than once.

    Parameters
    ----------
    n_samples : int, default=200
        Rows to choose.
    feature_map : transformer, optional
        Default is ``RandomFourierFeatures(512)``, the Gaussian kernel. "passthrough" takes the rows as they are.
    lmo : {"exact"} or index, default="exact"
        "exact" compares all rows in every step. An index of as many dimensions as there are features is asked
        instead, e.g. ``quernel.search.MaxIPIndex(512)``; an empty one is copied and filled.
    init : {"mu", "zero"}, default="mu"
        Where w begins.
    random_state : int, Generator or None, default=None
        For the default feature map.

    Attributes
    ----------
    indices_ : array, shape (n_samples,)
        Row numbers in the order they were chosen.
    discrepancy_ : float
        Length of mu minus the mean of the chosen: the maximum mean discrepancy between them and all rows.
    n_exact_scans_ : int
        Steps in which all rows were compared.
    feature_map_ : transformer or None
        The fitted map.
    index_ : index or None
        The index that answered.

    Notes
    -----
    An answer of an index is taken if <w, Phi(x) - mu> >= 0, which is what keeps w bounded; else all rows are compared.

    References
    ----------
    Chen, Welling, Smola, "Super-Samples from Kernel Herding", arXiv 1203.3472, 2010.
    Xu, Song, Shrivastava, "Breaking the Linear Iteration Cost Barrier for Some Well-known Conditional Gradient Methods
    Using MaxIP Data-structures", arXiv 2111.15139, 2021.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((500, 2))
    >>> herding = KernelHerding(20, random_state=0).fit(x)
    >>> herding.indices_.shape, bool(np.abs(x[herding.indices_].mean(0)).max() < 0.3)
    ((20,), True)
    """

    _state: ClassVar[Mapping[str, str]] = {
        "feature_map_": "estimator ?",
        "indices_": "s",
        "discrepancy_": "float",
        "n_exact_scans_": "int",
    }

    def __init__(
        self,
        n_samples: int = 200,
        *,
        feature_map: Any = None,
        lmo: Literal["exact"] | Lookup | Any = "exact",
        init: Literal["mu", "zero"] = "mu",
        random_state: Seed = None,
    ) -> None:
        self.n_samples = n_samples
        self.feature_map = feature_map
        self.lmo = lmo
        self.init = init
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_int("n_samples", self.n_samples, low=1)
        check_lookup("lmo", self.lmo)
        check_choice("init", self.init, INITS)
        generator(self.random_state, "random_state")
        known = self.feature_map in (None, "passthrough") if isinstance(self.feature_map, str | None) else True
        if not known or (not isinstance(self.feature_map, str | None) and not hasattr(self.feature_map, "fit")):
            raise QuernelError(f'feature_map must be a transformer, "passthrough" or None; got {self.feature_map!r}')

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if self.indices_.shape != (self.n_samples,) or self.indices_.dtype != np.int64 or self.indices_.min() < 0:
            raise QuernelError(f"indices_ must be {self.n_samples} row numbers")

    def fit(self, X: ArrayLike, y: object = None, *, mean: ArrayLike | None = None) -> Self:
        """Choose among the rows of ``X``, shape (n, d); ``y`` is ignored.

        Parameters
        ----------
        X : array, shape (n, d)
        y : ignored
        mean : array, shape (n_features,), optional
            Mu, in feature space; default is the mean over the rows. Another one, e.g. of rows that are not at hand,
            is approached as far as the rows' hull allows.
        """
        self.check_params()
        x = validate_data(self, X, dtype=FLOATS)
        chooser = self.feature_map
        if chooser is None:
            chooser = RandomFourierFeatures(512, random_state=self.random_state)
        self.feature_map_ = None if isinstance(chooser, str) else clone(chooser).fit(x)
        features = Atoms(x if self.feature_map_ is None else self.feature_map_.transform(x))
        self.index_ = None if isinstance(self.lmo, str) else filled("lmo", self.lmo, features)
        self._choose(features, features.mean if mean is None else _checked_mean(mean, features.dim))
        return self

    def _choose(self, features: Atoms, mu: np.ndarray) -> None:
        w = mu.copy() if self.init == "mu" else np.zeros_like(mu)
        chosen = np.zeros(self.n_samples, np.int64)
        total = np.zeros_like(mu)
        self.n_exact_scans_ = 0
        for t in range(self.n_samples):
            # From w_0 = 0 the first atom is the one closest in direction to mu, as w is about to be.
            query = w if t or self.init == "mu" else mu
            chosen[t], row = self._next(features, query, mu)
            total += row
            w += mu - row
        self.indices_ = chosen
        self.discrepancy_ = float(np.linalg.norm(mu - total / self.n_samples))

    def _next(self, features: Atoms, query: np.ndarray, mu: np.ndarray) -> tuple[int, np.ndarray]:
        if self.index_ is not None:
            i = nearest(self.index_, query)
            if 0 <= i < features.n:
                row = features.row(i)
                if query @ (row - mu) >= 0:
                    return i, row
        self.n_exact_scans_ += 1
        i = features.scan(-query)[0]
        return i, features.row(i)


def _checked_mean(mean: ArrayLike, dim: int) -> np.ndarray:
    held = np.asarray(mean, np.float64)
    if held.shape != (dim,):
        raise QuernelError(f"mean must have shape ({dim},), one number a feature; got {held.shape}")
    check_finite("mean", held)
    return held
