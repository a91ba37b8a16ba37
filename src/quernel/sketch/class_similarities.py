"""Private sums of features by class, and what is published of them; ``PrivateSimilarityClassifier`` fits them.

One sum of features a class, all classes in one release; the score of a class is phi(y).v_c / n_c. Under "add_remove" a
record lies in one class, so that every class has the whole epsilon for itself (parallel composition): a record moves
the stacked vector by sqrt(1 + c0^2), with c0 = 0.1 what it adds to the count of its class. Exchanged, it may move to
another class: max(2, sqrt(2 (1 + c0^2))).
"""

from __future__ import annotations

import functools
import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int
from quernel.sketch._feature_maps import FeatureMap, RowMap, SpectralMap, kernel_from_json
from quernel.sketch.dp.domain import Ball, checked_rows
from quernel.sketch.dp.mechanism import Sensitivity
from quernel.sketch.dp.noise import Integers
from quernel.sketch.dp.structure import PrivateStructure, PublicRelease
from quernel.sketch.dp.terms import PrivacyTerms
from quernel.sketch.dp.vector_sum import GRAIN

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
        self.map = map_of(similarity, settings)
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


class ClassSums(PrivateStructure):
    """Feature sums and counts of every class."""

    dim: int

    def __init__(
        self, terms: PrivacyTerms, classes: NDArray[Any], similarity: str, settings: dict[str, Any], clip: bool
    ) -> None:
        super().__init__(terms)
        self.classes, self.similarity, self.settings, self.clip = classes, similarity, settings, clip
        self.dim = settings["dim"]
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
        return map_of(self.similarity, self.settings)

    def partial_fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Add rows (n, d) with their labels (n,)."""
        rows = checked_rows("X", X, self.dim)
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

    def _forget(self) -> None:
        self._totals, self._counts = np.zeros_like(self._totals), np.zeros_like(self._counts)

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


def map_of(similarity: str, settings: dict[str, Any]) -> FeatureMap:
    """Return the features that a similarity compares, from settings as a file has them."""
    dim = check_int("dim", settings["dim"], low=1)
    if similarity != "kernel":
        return RowMap(dim, settings["radius"])
    kernel = kernel_from_json(settings["kernel"])
    names = ("bandwidth", "n_features", "jl_dim", "feature_seed")
    bandwidth, n_features, jl_dim, seed = (settings[name] for name in names)
    return SpectralMap(kernel, bandwidth, n_features, dim, jl_dim, seed)
