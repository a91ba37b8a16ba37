"""``PrivateSimilarityClassifier``: classify by average similarity to the private rows of each class (arXiv 2403.08917).

One sum of features a class, all classes in one release; the score of a class is phi(y).v_c / n_c. One pass over the
data, no gradient steps. Under "add_remove" a record lies in one class, so that every class has the whole epsilon for
itself (parallel composition): a record moves the stacked vector by sqrt(1 + c0^2), with c0 = 0.1 what it adds to the
count of its class. Exchanged, it may move to another class: max(2, sqrt(2 (1 + c0^2))).

A scikit-learn classifier but for two things, because of which it is not run through the estimator checks: labels are
public knowledge that must be given, not found in the data, and a second ``fit`` is a second release that must be paid.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from quernel._array_folder import Arrays, take
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_finite, check_float, check_int
from quernel.sketch._feature_maps import (
    FeatureMap,
    RowMap,
    SpectralMap,
    check_bandwidth,
    kernel_from_json,
    kernel_to_json,
)
from quernel.sketch.dp.domain import Ball, checked_rows
from quernel.sketch.dp.ledger import PrivacyLedger
from quernel.sketch.dp.mechanism import Neighbours, Sensitivity
from quernel.sketch.dp.noise import Integers
from quernel.sketch.dp.structure import PrivateStructure, PublicRelease
from quernel.sketch.dp.terms import PrivacyTerms
from quernel.sketch.dp.vector_sum import GRAIN, count_steps
from quernel.sketch.private_kde import MOST_FEATURES, chosen_features

Floats = NDArray[np.float64]
SIMILARITIES = ("kernel", "dot", "l2sq")


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable", headline=False)
class PublicSimilarities(PublicRelease):
    """Private class sums that may be published; what ``PrivateSimilarityClassifier`` predicts from.

    Attributes
    ----------
    classes : array, shape (C,)
    class_rows : array, shape (C,)
        Noisy numbers of rows.
    privacy : dict
        Epsilon, delta, neighbours, mechanism, sensitivity, scale, number of released coordinates.
    """

    def __init__(self, classes: Any, similarity: str, settings: dict[str, Any], privacy: dict[str, Any]) -> None:
        self.classes = np.asarray(classes)
        self.similarity = check_choice("similarity", similarity, SIMILARITIES)
        self.settings = settings
        self.privacy = privacy
        self.map = _map_of(similarity, settings)
        self.values = np.zeros((len(self.classes), self.map.n_coords), np.float32)
        self.class_rows = np.zeros(len(self.classes))

    def query(self, y: ArrayLike) -> Floats:
        """Return the score (n, C) of every class: larger is more similar; costs no privacy.

        Mean kernel or dot product with the rows of the class; for "l2sq" minus the squared distance to their mean.
        """
        rows = checked_rows("y", y, self.settings["dim"])
        # Fewer rows than the noise of their number would blow the scores up.
        counts = np.maximum(self.class_rows, max(1.0, self.noise_std / self.settings["count_weight"]))
        dots = self.map.dots(rows, self.values.astype(np.float64)) / counts
        if self.similarity == "kernel":
            return dots
        radius = self.settings["radius"]
        if self.similarity == "dot":
            return dots * radius**2
        means = self.values.astype(np.float64) / counts[:, None]
        # The noise makes every mean longer, by a known amount.
        lengths = (means**2).sum(1) - means.shape[1] * (self.noise_std / counts) ** 2
        squares = (rows.astype(np.float64) ** 2).sum(1, keepdims=True)
        return np.asarray(radius**2 * (2 * dots - lengths) - squares, np.float64)

    def predict(self, y: ArrayLike) -> NDArray[Any]:
        """Return the most similar class of each row (n, dim)."""
        return np.asarray(self.classes[self.query(y).argmax(1)])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "classes": self.classes.tolist(),
            "similarity": self.similarity,
            "settings": self.settings,
            "privacy": self.privacy,
        }

    def _arrays(self) -> Arrays:
        return {"values": self.values, "class_rows": self.class_rows}

    def _restore(self, arrays: Arrays) -> None:
        self.values = take(arrays, "values", np.float32, self.values.shape)
        self.class_rows = take(arrays, "class_rows", np.float64, self.class_rows.shape)
        for name in ("values", "class_rows"):
            check_finite(f"array {name!r}", getattr(self, name))


class _ClassSums(PrivateStructure):
    """Feature sums and counts of every class."""

    def __init__(
        self, terms: PrivacyTerms, classes: NDArray[Any], similarity: str, settings: dict[str, Any], clip: bool
    ) -> None:
        super().__init__(terms)
        self.classes, self.similarity, self.settings, self.clip = classes, similarity, settings, clip
        self._order = np.argsort(classes, kind="stable")
        self._steps = round(settings["count_weight"] / GRAIN)
        self._totals = np.zeros((len(classes), self._map.n_coords), np.int64)
        self._counts = np.zeros(len(classes), np.int64)

    @property
    def grain(self) -> float:
        """What one step of the sums stands for."""
        return GRAIN

    @functools.cached_property
    def _map(self) -> FeatureMap:
        return _map_of(self.similarity, self.settings)

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Add rows (n, d) with their labels (n,)."""
        rows = checked_rows("X", X, self.settings["dim"])
        labels = self._numbered(y, len(rows))
        if self.similarity != "kernel":
            rows = Ball(self.settings["radius"]).applied("X", rows, clip=self.clip)
        self._map.add(rows, labels, self._totals)
        self._counts += np.bincount(labels, minlength=len(self.classes))
        return self

    def sensitivity(self) -> Sensitivity:
        """Return how far the sums move between neighbours."""
        count, length, side = self._steps * GRAIN, self._map.l2, self._map.l1
        if self.terms.neighbours == "add_remove":
            l1, l2 = side + count, math.hypot(length, count)
        else:  # within its class, or to another one
            l1, l2 = 2 * (side + count), max(2 * length, math.sqrt(2.0) * math.hypot(length, count))
        return Sensitivity.on_lattice(
            l1,
            l2,
            n_coords=self._totals.size + len(self.classes),
            grain=GRAIN,
            neighbours=self.terms.neighbours,
            touched=self._map.n_coords + 1,
        )

    def config(self) -> dict[str, Any]:
        """Return what two structures must agree on to be merged."""
        held = {"classes": self.classes.tolist(), "similarity": self.similarity, "clip": self.clip}
        return held | self.settings | self.terms.to_json()

    def _sums(self) -> Integers:
        return np.concatenate((self._totals.ravel(), self._counts * self._steps))

    def _add(self, other: Self) -> None:
        self._totals += other._totals
        self._counts += other._counts

    def _published(self, values: Floats, privacy: dict[str, Any]) -> PublicSimilarities:
        made = PublicSimilarities(self.classes.tolist(), self.similarity, self.settings, privacy)
        made.values = values[: self._totals.size].reshape(self._totals.shape).astype(np.float32)
        made.class_rows = values[self._totals.size :] / (self._steps * GRAIN)
        return made

    def _numbered(self, y: Any, n: int) -> Integers:
        labels = np.asarray(y)
        if labels.shape != (n,):
            raise QuernelError(f"y must hold one label a row, shape ({n},); got shape {labels.shape}")
        ranked = self.classes[self._order]
        places = np.minimum(np.searchsorted(ranked, labels), len(ranked) - 1)
        unknown = ranked[places] != labels
        if unknown.any():
            raise QuernelError(
                f"y has labels that are not among classes={self.classes.tolist()}, the first in row "
                f"{int(np.argmax(unknown))}. Classes are public: list all that may occur"
            )
        return self._order[places].astype(np.int64)


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable", headline=False)
class PrivateSimilarityClassifier(ClassifierMixin, BaseEstimator):
    """Classify by average similarity to private rows, with differential privacy in one pass.

    Parameters
    ----------
    classes : sequence of labels, optional
        All labels that may occur: public, never read off the data. Here or in ``fit``.
    similarity : {"kernel", "dot", "l2sq"}, default="kernel"
        Mean kernel, mean dot product, or minus the squared distance to the class mean. The last two are for rows of
        bounded length, such as embeddings from a public model.
    kernel, bandwidth, n_features, expected_rows, jl_dim, feature_seed
        For "kernel", see ``PrivateKDE``.
    radius : float, default=1.0
        For "dot" and "l2sq": the largest length of a row, known without looking.
    clip : bool, default=False
        Shorten longer rows instead of refusing them.
    epsilon, delta, neighbours, mechanism, unsafe_float, insecure_noise_seed
        See ``quernel.sketch.dp.PrivacyTerms``.
    count_weight : float, default=0.1
        What a row adds to the coordinate that counts its class.

    Attributes
    ----------
    classes_ : array, shape (C,)
    public_ : PublicSimilarities
        What was released: publish, save and query this.
    ledger_ : PrivacyLedger
        Where it was paid.

    Notes
    -----
    Each ``fit`` is a release. Without a ledger the first one spends a budget of exactly epsilon and delta, and a second
    one raises ``BudgetExceeded``; clones, as grid searches make them, start afresh, so choose settings on public data.

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> y = np.arange(4000) % 2
    >>> x = draw.standard_normal((4000, 2)) + 2 * y[:, None]
    >>> model = PrivateSimilarityClassifier([0, 1], n_features=256, insecure_noise_seed=0)  # no seed to be private
    >>> bool(model.fit(x, y).score(x, y) > 0.85)
    True
    """

    def __init__(
        self,
        classes: Any = None,
        *,
        similarity: Literal["kernel", "dot", "l2sq"] = "kernel",
        kernel: Any = "gaussian",
        bandwidth: float = 1.0,
        n_features: int | None = MOST_FEATURES,
        expected_rows: int | None = None,
        jl_dim: int | None = None,
        feature_seed: int = 0,
        radius: float = 1.0,
        clip: bool = False,
        epsilon: float = 1.0,
        delta: float = 1e-6,
        neighbours: Neighbours = "add_remove",
        mechanism: str = "auto",
        count_weight: float = 0.1,
        unsafe_float: bool = False,
        insecure_noise_seed: int | None = None,
    ) -> None:
        self.classes = classes
        self.similarity = similarity
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.n_features = n_features
        self.expected_rows = expected_rows
        self.jl_dim = jl_dim
        self.feature_seed = feature_seed
        self.radius = radius
        self.clip = clip
        self.epsilon = epsilon
        self.delta = delta
        self.neighbours = neighbours
        self.mechanism = mechanism
        self.count_weight = count_weight
        self.unsafe_float = unsafe_float
        self.insecure_noise_seed = insecure_noise_seed

    def fit(self, X: ArrayLike, y: Any, classes: Any = None, *, ledger: PrivacyLedger | None = None) -> Self:
        """Sum up the rows of every class, and release the sums.

        Parameters
        ----------
        X : array, shape (n, d)
        y : array, shape (n,)
        classes : sequence, optional
            All labels, if the constructor was not given them.
        ledger : PrivacyLedger, optional
            The budget of the data set.

        Raises
        ------
        BudgetExceeded
            If the ledger does not reach.
        """
        self.__dict__.pop("_collected", None)
        return self.partial_fit(X, y, classes).release(ledger)

    def partial_fit(self, X: ArrayLike, y: Any, classes: Any = None) -> Self:
        """Add rows to the sums of their classes; nothing is released before ``release``."""
        if "_collected" not in self.__dict__:
            dim = np.shape(X)[1] if np.ndim(X) == 2 else checked_rows("X", X, None).shape[1]
            self._collected = self._empty(dim, self.classes if classes is None else classes)
        self._collected.partial_fit(X, y)
        return self

    def merge(self, other: Self) -> Self:
        """Take over the rows that another unreleased classifier of the same settings has collected.

        The parts must be of different records. ``other`` has no rows afterwards, so that they are paid for once.
        """
        for each, name in ((self, "self"), (other, "other")):
            if "_collected" not in vars(each):
                raise QuernelError(f"{name} has collected no rows; give it some with partial_fit")
        self._collected.merge(other._collected)
        del other._collected
        return self

    def release(self, ledger: PrivacyLedger | None = None) -> Self:
        """Spend budget, add noise, and become able to predict; the exact sums are forgotten."""
        if "_collected" not in self.__dict__:
            raise QuernelError("nothing was collected since the last release; give rows to partial_fit")
        if ledger is None:
            ledger = getattr(self, "ledger_", None)
        self.ledger_ = PrivacyLedger(self.epsilon, self.delta, neighbours=self.neighbours) if ledger is None else ledger
        self.public_ = self._collected.release(self.ledger_, label=type(self).__name__)
        self.classes_ = self.public_.classes
        self.n_features_in_ = self.public_.settings["dim"]
        del self._collected
        return self

    def decision_function(self, X: ArrayLike) -> Floats:
        """Return the scores (n, C), or for two classes the second minus the first (n,)."""
        check_is_fitted(self, "public_")
        scores = self.public_.query(X)
        return np.asarray(scores[:, 1] - scores[:, 0]) if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most similar class of each row."""
        check_is_fitted(self, "public_")
        return self.public_.predict(X)

    def _empty(self, dim: int, classes: Any) -> _ClassSums:
        if classes is None:
            raise QuernelError(
                "classes must be given, here or to the constructor: the set of labels is part of what is published, "
                "and reading it off private data would leak"
            )
        known = np.asarray(classes)
        if known.ndim != 1 or len(known) < 2 or len(np.unique(known)) != len(known) or known.dtype.kind not in "iuUb":
            raise QuernelError(f"classes must be two or more different integers or strings; got {classes!r}")
        check_choice("similarity", self.similarity, SIMILARITIES)
        terms = PrivacyTerms(
            self.epsilon, self.delta, self.neighbours, self.mechanism, self.unsafe_float, self.insecure_noise_seed
        )
        settings: dict[str, Any] = {"dim": dim, "count_weight": self.count_weight}
        if not count_steps(self.count_weight):
            raise QuernelError(f"count_weight must be positive: scores are means; got {self.count_weight}")
        if self.similarity == "kernel":
            settings |= {
                "kernel": kernel_to_json(self.kernel),
                "bandwidth": check_bandwidth(self.bandwidth),
                "n_features": chosen_features(self.n_features, self.expected_rows, self.epsilon, self.delta),
                "jl_dim": self.jl_dim,
                "feature_seed": self.feature_seed,
            }
        else:
            settings["radius"] = check_float("radius", self.radius, low=0.0, open_low=True)
        return _ClassSums(terms, known, self.similarity, settings, check_bool("clip", self.clip))


def _map_of(similarity: str, settings: dict[str, Any]) -> FeatureMap:
    dim = check_int("dim", settings["dim"], low=1)
    if similarity != "kernel":
        return RowMap(dim, settings["radius"])
    kernel = kernel_from_json(settings["kernel"])
    names = ("bandwidth", "n_features", "jl_dim", "feature_seed")
    bandwidth, n_features, jl_dim, seed = (settings[name] for name in names)
    return SpectralMap(kernel, bandwidth, n_features, dim, jl_dim, seed)
