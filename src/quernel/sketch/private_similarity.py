"""``PrivateSimilarityClassifier``: classify by average similarity to the private rows of each class (arXiv 2403.08917).

One pass over the data, no gradient steps; the sums and their sensitivity are those of ``class_similarities``.

A scikit-learn classifier but for two things: labels are public knowledge that must be given, not found in the data, and
a second ``fit`` is a second release that must be paid. Given both, it passes scikit-learn's checks.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from quernel._errors import PrivacyError, QuernelError
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_float, check_type
from quernel.kernels._random_features import FLOATS
from quernel.sketch._feature_maps import check_bandwidth, kernel_to_json
from quernel.sketch.class_similarities import SIMILARITIES, ClassSums
from quernel.sketch.dp.ledger import PrivacyLedger
from quernel.sketch.dp.mechanism import Neighbours
from quernel.sketch.dp.terms import PrivacyTerms
from quernel.sketch.dp.vector_sum import count_steps
from quernel.sketch.private_kde import MOST_FEATURES, chosen_features

Floats = NDArray[np.float64]


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
    ledger_ : PrivacyLedger or None
        Where it was paid; None in a copy (pickle, ``copy.deepcopy``), which predicts but has no budget of its own.

    Notes
    -----
    Each ``fit`` is a release. Without a ledger the first one spends a budget of exactly epsilon and delta, and a second
    one raises ``BudgetExceeded``. Another ledger means another data set: nothing here could know that both fits saw the
    same rows. Clones, as grid searches make them, start afresh, so choose settings on public data.

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> y = np.arange(4000) % 2
    >>> x = draw.standard_normal((4000, 2)) + 2 * y[:, None]
    >>> model = PrivateSimilarityClassifier([0, 1], n_features=256, insecure_noise_seed=0)  # no seed to be private
    >>> bool(model.fit(x, y).score(x, y) > 0.85)
    True
    """

    ledger_: PrivacyLedger | None

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

    def __getstate__(self) -> Any:
        # A budget that is copied would exist twice.
        state: Any = super().__getstate__()
        return state | {"ledger_": None} if "ledger_" in state else state

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
        try:
            return self.partial_fit(X, y, classes).release(ledger)
        finally:
            # Rows of a fit that was refused must not enter the next one.
            self.__dict__.pop("_collected", None)

    def partial_fit(self, X: ArrayLike, y: Any, classes: Any = None) -> Self:
        """Add rows to the sums of their classes; nothing is released before ``release``.

        Settings and classes stay those of the first rows until then.
        """
        first = "_collected" not in self.__dict__
        x, labels = validate_data(self, X, y, dtype=FLOATS, reset=first)
        check_classification_targets(labels)
        labels = column_or_1d(labels, warn=True)
        if first:
            self._collected = self._empty(x.shape[1], classes)
        else:
            self._check_unchanged(classes)
        self._collected.partial_fit(x, labels)
        return self

    def merge(self, other: Self) -> Self:
        """Take over the rows that another unreleased classifier of the same settings has collected.

        The parts must be of different records. ``other`` has no rows afterwards, so that they are paid for once; either
        may have none before.
        """
        check_type("other", other, type(self))
        for each in (self, other):
            each._check_unchanged()
        if "_collected" in vars(other):
            theirs = other._collected
            mine = vars(self).get("_collected")
            if mine is None:
                mine = self._empty(theirs.dim, None if self.classes is not None else theirs.classes)
            mine.merge(theirs)
            self._collected, self.n_features_in_ = mine, theirs.dim
            del other._collected
        return self

    def release(
        self,
        ledger: PrivacyLedger | None = None,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        mechanism: str | None = None,
        label: str | None = None,
    ) -> Self:
        """Spend budget, add noise, and become able to predict; the exact sums are forgotten.

        Parameters
        ----------
        ledger : PrivacyLedger, optional
            The budget of the data set.
        epsilon, delta, mechanism : optional
            Other terms for this release than the parameters; what is not named stays.
        label : str, optional
            What the ledger calls it; default is the class's name.
        """
        if "_collected" not in self.__dict__:
            raise QuernelError("nothing was collected since the last release; give rows to partial_fit")
        self._check_unchanged()
        if ledger is None and "ledger_" in self.__dict__:
            ledger = self.ledger_
            if ledger is None:
                raise PrivacyError(
                    "this is a copy of a classifier that was released; the ledger stayed with the original. Give the "
                    "data set's ledger, fit(X, y, ledger=ledger)"
                )
        own = PrivacyLedger(self.epsilon, self.delta, neighbours=self.neighbours) if ledger is None else ledger
        self.public_ = self._collected.release(
            own,
            epsilon=epsilon,
            delta=delta,
            mechanism=mechanism,
            label=type(self).__name__ if label is None else label,
        )
        self.ledger_ = own
        self.classes_ = self.public_.classes
        self.n_features_in_ = self.public_.settings["dim"]
        del self._collected
        return self

    def decision_function(self, X: ArrayLike) -> Floats:
        """Return the scores (n, C), or for two classes the second minus the first (n,)."""
        self._check_released()
        scores = self.public_.query(validate_data(self, X, dtype=FLOATS, reset=False))
        return np.asarray(scores[:, 1] - scores[:, 0]) if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most similar class of each row."""
        self._check_released()
        return self.public_.predict(validate_data(self, X, dtype=FLOATS, reset=False))

    def _check_released(self) -> None:
        if "_collected" in self.__dict__ and "public_" not in self.__dict__:
            raise NotFittedError("rows were collected, but nothing is released yet; call release()")
        check_is_fitted(self, "public_")

    def _check_unchanged(self, classes: Any = None) -> None:
        """Raise if parameters or classes are others than when the first rows were collected."""
        held: ClassSums | None = vars(self).get("_collected")
        if held is None:
            return
        known = held.classes if self.classes is None else None
        terms, labels, similarity, settings, clip = self._arguments(held.dim, known if classes is None else classes)
        now = {"classes": labels.tolist(), "similarity": similarity, "clip": clip} | settings | terms.to_json()
        apart = [name for name, value in held.config().items() if now.get(name) != value]
        if apart:
            raise QuernelError(
                f"{', '.join(apart)} changed since rows were collected; set it back, or start again with fit. "
                "release() takes other privacy terms"
            )

    def _empty(self, dim: int, classes: Any) -> ClassSums:
        return ClassSums(*self._arguments(dim, classes))

    def _arguments(self, dim: int, classes: Any) -> tuple[PrivacyTerms, NDArray[Any], str, dict[str, Any], bool]:
        """Return what the sums are made with, checked."""
        if self.classes is not None:
            if classes is not None and np.asarray(classes).tolist() != np.asarray(self.classes).tolist():
                raise QuernelError(f"classes must be those of the constructor, {self.classes!r}; got {classes!r}")
            classes = self.classes
        if classes is None:
            raise QuernelError(
                "classes must be given, here or to the constructor: the set of labels is part of what is published, "
                "and reading it off private data would leak"
            )
        known = np.asarray(np.asarray(classes).tolist())  # text as such, also out of an array of objects
        if known.ndim != 1 or len(known) < 2 or len(np.unique(known)) != len(known) or known.dtype.kind not in "iuUb":
            raise QuernelError(
                f"classes must be two or more different integers or strings; got {known.size} "
                f"class{'es' * (known.size != 1)}, {known.tolist()!r}"
            )
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
        return terms, known, self.similarity, settings, check_bool("clip", self.clip)
