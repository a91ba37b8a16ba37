"""``LSHKernelMachine``: a regressor b + sum_i alpha_i k(A x, z_i)^K with trained A, z and alpha (arXiv 2106.11426).

Its kernel is the collision probability of a hash, so a sketch of counts answers f with a few look-ups, whatever the
number of anchors: ``quernel.sketch.RepresenterRegressor`` and ``quernel.compress.RepresenterSketch`` do that. Fitted
to the outputs of another model it is that model's student. ``LSHKernelClassifier`` is the same for labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed, generator
from quernel._registry import register
from quernel.kernels._machine_training import Loss, Machine, Settings, train_machine
from quernel.kernels._random_features import FLOATS, Floats


def _example_with(cls: type[_LSHMachine]) -> dict[str, Any]:
    return {"make": lambda: cls(40, proj_dim=6, n_steps=150, learning_rate=2e-2, random_state=0)}


class _LSHMachine(SavedEstimator, BaseEstimator):
    """Parameters, training and similarities: what both kinds of target share."""

    projection_: Floats
    shift_: Floats
    anchors_: Floats
    weights_: Floats
    intercept_: Floats

    _state: ClassVar[Mapping[str, str]] = {
        "projection_": "p d",
        "shift_": "p",
        "anchors_": "m p",
        "weights_": "m q",
        "intercept_": "q",
    }

    def __init__(
        self,
        n_anchors: int = 500,
        *,
        proj_dim: int = 16,
        kernel: Literal["l2", "l1", "angular"] = "l2",
        width: float = 4.0,
        n_concat: int = 2,
        l1: float = 1e-4,
        n_steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 5e-3,
        random_state: Seed = None,
    ) -> None:
        self.n_anchors = n_anchors
        self.proj_dim = proj_dim
        self.kernel = kernel
        self.width = width
        self.n_concat = n_concat
        self.l1 = l1
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    @property
    def settings(self) -> Settings:
        """The parameters of the machine and its training, checked."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @property
    def machine(self) -> Machine:
        """The fitted arrays as tensors."""
        held = (self.projection_, self.shift_, self.anchors_, self.weights_, self.intercept_)
        return Machine(*map(torch.from_numpy, held))

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        _ = self.settings
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if self.anchors_.shape != (self.n_anchors, self.proj_dim):
            raise QuernelError(f"anchors_ must have shape ({self.n_anchors}, {self.proj_dim})")

    def sketch_noise(self, X: ArrayLike) -> Floats:
        """Return sum_i |alpha_i| sqrt(k_i) of each row and output, shape (n, q).

        A sketch of L rows answers with a standard error of at most about this over sqrt(L): where it is much larger
        than what is to be told apart, take a larger ``l1`` or ``width``, or a smaller ``n_concat``.
        """
        check_is_fitted(self)
        x = validate_data(self, X, dtype=FLOATS, reset=False)
        machine = self.machine
        k = machine.similarity(_tensor(x, machine.projection.dtype), self.kernel, self.width, self.n_concat)
        return cast(Floats, (k.sqrt() @ machine.weights.abs()).numpy())

    def _train(self, x: Floats, y: NDArray[Any], loss: Loss) -> None:
        targets = torch.from_numpy(np.ascontiguousarray(y))
        machine = train_machine(_tensor(x), targets, self.settings, generator(self.random_state, "random_state"), loss)
        for name, value in vars(machine).items():
            setattr(self, f"{name}_", value.numpy())

    def _scores(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=FLOATS, reset=False)
        scores = self.machine(_tensor(x, torch.from_numpy(self.shift_).dtype), self.kernel, self.width, self.n_concat)
        return cast(Floats, scores.numpy().astype(x.dtype, copy=False))


class ScoreRegressor(RegressorMixin):
    """Regression by scores: a subclass trains on targets (n, q) in ``_train`` and gives scores in ``_scores``."""

    single_target_: bool

    def __sklearn_tags__(self) -> Any:
        tags: Any = cast(Any, super()).__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit rows ``X``, shape (n, d), to targets ``y``, shape (n,) or (n, q), e.g. the logits of a teacher."""
        self.check_params()
        x, targets = validate_data(self, X, y, dtype=FLOATS, y_numeric=True, multi_output=True)
        self.single_target_ = targets.ndim == 1
        self._train(x, targets.reshape(len(targets), -1).astype(x.dtype), "squared")
        return self

    def predict(self, X: ArrayLike) -> Floats:
        """Return predictions, shape (n,) or (n, q)."""
        scores = self._scores(X)
        return scores[:, 0] if self.single_target_ else scores


class ScoreClassifier(ClassifierMixin):
    """Classification by scores: a subclass trains on class numbers in ``_train`` and gives scores in ``_scores``."""

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit rows ``X``, shape (n, d), to labels ``y``, shape (n,)."""
        self.check_params()
        x, labels = validate_data(self, X, y, dtype=FLOATS)
        check_classification_targets(labels)
        self.classes_, places = np.unique(column_or_1d(labels, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise QuernelError(f"y must hold at least two classes; got 1 class, {self.classes_[0]!r}")
        self._train(x, places.astype(np.int64), "logistic")
        return self

    def decision_function(self, X: ArrayLike) -> Floats:
        """Return scores, shape (n,) for two classes, else (n, k)."""
        return difference_of_two(self._scores(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the class of the largest score, shape (n,)."""
        places = self._scores(X).argmax(1)
        return self.classes_[places]

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return probabilities of the classes, shape (n, k)."""
        return cast(Floats, torch.from_numpy(self._scores(X)).softmax(1).numpy())


@register(
    "representer-sketch",
    pillar="kernels",
    contract="estimator",
    paper="2106.11426",
    status="stable",
    headline=False,
    example=lambda: _example_with(LSHKernelMachine),
)
class LSHKernelMachine(ScoreRegressor, _LSHMachine):
    """Regression by trained anchors under an LSH kernel: what a count sketch can stand in for.

    Parameters
    ----------
    n_anchors : int, default=500
        Anchors M. A sketch of the machine costs the same for any number of them.
    proj_dim : int, default=16
        Rows p of the trained projection A.
    kernel : {"l2", "l1", "angular"}, default="l2"
        See ``LSHKernel``.
    width : float, default=4.0
        Width of a cell, in units of projected rows (about sqrt(2 p) apart before training).
    n_concat : int, default=2
        Power K of the kernel.
    l1 : float, default=1e-4
        Weight of sum |alpha|: the noise of a sketch grows with it, see ``sketch_noise``.
    n_steps, batch_size, learning_rate
        Of Adam with cosine decay; the weights of the anchors learn four times faster than the anchors.
    random_state : int, Generator or None, default=None

    Attributes
    ----------
    projection_, shift_ : array, shapes (p, d) and (p,)
        The hidden vector is projection_ x + shift_; the columns' means and scales are part of them.
    anchors_, weights_ : array, shapes (M, p) and (M, q)
    intercept_ : array, shape (q,)

    References
    ----------
    Coleman et al., "Efficient Inference via Universal LSH Kernel", arXiv 2106.11426, 2021.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 400)[:, None]
    >>> model = LSHKernelMachine(50, proj_dim=2, n_steps=300, learning_rate=0.02, random_state=0)
    >>> model.fit(x, np.abs(x[:, 0])).score(x, np.abs(x[:, 0])) > 0.95
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**_LSHMachine._state, "single_target_": "flag"}


@register(
    "representer-sketch",
    pillar="kernels",
    contract="estimator",
    paper="2106.11426",
    status="stable",
    headline=False,
    example=lambda: _example_with(LSHKernelClassifier),
)
class LSHKernelClassifier(ScoreClassifier, _LSHMachine):
    """Classification by trained anchors under an LSH kernel, one score a class, cross-entropy loss.

    Parameters
    ----------
    n_anchors, proj_dim, kernel, width, n_concat, l1, n_steps, batch_size, learning_rate, random_state
        As for ``LSHKernelMachine``.

    Attributes
    ----------
    classes_ : array, shape (k,)
    projection_, shift_, anchors_, weights_, intercept_
        As for ``LSHKernelMachine``, with q = k.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> LSHKernelClassifier(40, proj_dim=4, n_steps=300, random_state=0).fit(x, y).score(x, y) > 0.93
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**_LSHMachine._state, "classes_": "labels q"}


def difference_of_two(scores: Floats) -> Floats:
    """Return scores as ``decision_function`` gives them: one column for two classes."""
    return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores


def _tensor(x: Floats, dtype: torch.dtype | None = None) -> Tensor:
    # torch takes writable memory only.
    tensor = torch.from_numpy(np.ascontiguousarray(x) if x.flags.writeable else np.array(x, order="C"))
    return tensor if dtype is None else tensor.to(dtype)
