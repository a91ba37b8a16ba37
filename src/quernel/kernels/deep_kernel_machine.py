"""``DeepKernelRegressor``, ``DeepKernelClassifier``: kernels learned layer by layer, without features (2108.13097).

The bound maximised over Gram matrices G_l of P inducing points, inducing inputs, outputs and noise is

    E_q[log p(Y | f)] - sum_l nu_l KL(N(0, G_l) || N(0, K(G_{l-1}))) - KL(q(u) || N(0, K(G_L))).

A large nu keeps the fixed kernel of an infinitely wide network; a small one lets hidden kernels fit the targets.
Training costs n / B times L (P^3 + B P^2) an epoch, memory P^2 L + B P L: nothing is n x n.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._progress import Progress, check_progress
from quernel._random import Seed
from quernel._registry import register
from quernel._validate import check_bool, check_float, check_int
from quernel.kernels._deep_kernel_estimator import DTYPES, DeepKernel, Weights
from quernel.kernels._deep_kernel_network import CategoricalLikelihood, GaussianLikelihood, class_probabilities
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.deep_kernel_layers import Divergence, GramNoise

# Of standardised targets, before it is learned.
_FIRST_NOISE = 0.1


def _example_with(cls: type[DeepKernel]) -> dict[str, Any]:
    return {"make": lambda: cls(1, n_inducing=None, max_epochs=12, lr=0.1, random_state=0)}


@register(
    "deep-kernel-machines",
    pillar="kernels",
    contract="estimator",
    paper="2108.13097",
    status="stable",
    example=lambda: _example_with(DeepKernelRegressor),
)
class DeepKernelRegressor(RegressorMixin, DeepKernel):
    """Gaussian-process regression whose kernel is learned layer by layer, with predictive variances.

    Parameters
    ----------
    n_layers : int, default=2
        Gram layers L; 0 is a sparse Gaussian process with one fixed kernel.
    n_inducing : int or None, default=None
        Inducing points P; None is a quarter of the rows, 256 at most.
    kernel : {"arccos", "rbf"}, default="arccos"
        First-order arc-cosine kernel (a wide ReLU layer), or squared exponential.
    nu : float or array of L floats, default=1.0
        Weight of each layer's divergence from the kernel below, > 0, beside the log-likelihood of all rows.
        ``inf`` leaves the Gram layer out: the fixed kernel of an infinitely wide network (NNGP). A few hundred noisy
        rows are overfitted with 1: choose it by cross-validation.
    noise : "learn" or float, default="learn"
        Variance of the noise, in squared units of y.
    learn_inducing, learn_scales : bool, default=True
        Whether inducing inputs, and a scale in front of every kernel, are learned.
    fit_intercept : bool, default=True
        Whether a column of ones joins the input; False is the paper's input, whose arc-cosine kernel knows directions
        from the mean of the rows only.
    max_epochs, batch_size, lr
        Of Adam, whose step is ten times smaller after two thirds and after five sixths of the epochs. Count steps:
        a thousand or more are usually needed.
    kl : {"exact", "taylor", "taylor_frobenius"}, default="exact"
        See ``gram_kl``; the expansions resist large Gram matrices more, small ones much more.
    gram_noise : {"wishart", None}, default=None
        Stochastic kernel regularisation, see ``GramLayer``.
    jitter : float, default=1e-4
        White noise in every kernel, see ``apply_kernel``.
    random_state : int, Generator or None, default=None
    dtype : {"float64", "float32"}, default="float64"
        What is computed in. Predictions have the precision of X.

    Attributes
    ----------
    grams_ : array, shape (L, P, P)
        Learned Gram matrices of the inducing points.
    alignment_ : array, shape (L + 1,)
        Centred kernel alignment with the targets, of the input and of each layer.
    elbo_ : float
        The bound on the log-density of all targets, in nats.
    history_ : array, shape (max_epochs,)
        Mean bound of each epoch's batches; standardised targets.
    inducing_ : array, shape (P, c)
        Inducing inputs, in scaled columns.
    noise_ : array, shape (q,)
        Variances of the noise, in squared units of y.

    Notes
    -----
    Columns are centred and divided by one common scale; columns of different units should be standardised first. q(u)
    is set to its optimum in one pass before and after training, then learned noise too. Differs from the reference
    code: rows as first inducing inputs, running means in the scale layers, one and the same jitter for inducing points
    and batch, see also ``GramLayer``.

    References
    ----------
    Yang et al., "A Theory of Representation Learning Gives a Deep Generalisation of Kernel Methods", arXiv 2108.13097,
    2021.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 200)[:, None]
    >>> model = DeepKernelRegressor(1, n_inducing=20, max_epochs=50, random_state=0).fit(x, np.abs(x[:, 0]))
    >>> mean, std = model.predict(x, return_std=True)
    >>> model.score(x, np.abs(x[:, 0])) > 0.98
    True
    """

    _state: ClassVar[Mapping[str, str]] = {
        **DeepKernel._state,
        "noise_": "q",
        "target_center_": "q",
        "target_scale_": "q",
        "single_target_": "flag",
    }

    def __init__(
        self,
        n_layers: int = 2,
        *,
        n_inducing: int | None = None,
        kernel: Literal["arccos", "rbf"] = "arccos",
        nu: Weights = 1.0,
        noise: Literal["learn"] | float = "learn",
        learn_inducing: bool = True,
        learn_scales: bool = True,
        fit_intercept: bool = True,
        max_epochs: int = 200,
        batch_size: int = 512,
        lr: float = 1e-2,
        kl: Divergence = "exact",
        gram_noise: GramNoise | None = None,
        jitter: float = 1e-4,
        random_state: Seed = None,
        dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        super().__init__(
            n_layers,
            n_inducing=n_inducing,
            kernel=kernel,
            nu=nu,
            learn_inducing=learn_inducing,
            learn_scales=learn_scales,
            fit_intercept=fit_intercept,
            max_epochs=max_epochs,
            batch_size=batch_size,
            lr=lr,
            kl=kl,
            gram_noise=gram_noise,
            jitter=jitter,
            random_state=random_state,
            dtype=dtype,
        )
        self.noise = noise

    def __sklearn_tags__(self) -> Any:
        tags: Any = cast(Any, super()).__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        if self.noise != "learn":
            check_float("noise", self.noise, low=0.0, open_low=True)

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if not (self.noise_ > 0).all() or not (self.target_scale_ > 0).all():
            raise QuernelError("noise_ and target_scale_ must be positive")

    def fit(self, X: ArrayLike, y: ArrayLike, *, progress: Progress | None = None) -> Self:
        """Fit rows ``X``, shape (n, d), to targets ``y``, shape (n,) or (n, q).

        ``progress(message, fraction)`` is called after every epoch.
        """
        self.check_params()
        check_progress(progress)
        x, given = validate_data(
            self, X, y, dtype=FLOATS, y_numeric=True, multi_output=True, ensure_min_samples=2, reset=True
        )
        self.single_target_ = given.ndim == 1
        targets = given.reshape(len(given), -1).astype(np.float64)
        self.target_center_ = targets.mean(0)
        with np.errstate(over="ignore"):
            spread = targets.std(0)
        if not np.isfinite(spread).all():
            raise QuernelError("y must be smaller: the squares of its values are not finite")
        # Rounding of the mean leaves a constant column a little spread.
        self.target_scale_ = np.where(spread > 1e-12 * np.abs(self.target_center_), spread, 1.0)
        y_scaled = torch.from_numpy((targets - self.target_center_) / self.target_scale_).to(DTYPES[self.dtype])
        learned = self.noise == "learn"
        first = np.full(targets.shape[1], _FIRST_NOISE) if learned else self.noise / np.square(self.target_scale_)
        likelihood = GaussianLikelihood(torch.from_numpy(first).to(y_scaled.dtype), learned)
        self._train(x, y_scaled, y_scaled, likelihood, progress)
        # Densities of y, not of y in units of its scale.
        self.elbo_ -= len(x) * float(np.log(self.target_scale_).sum())
        self.noise_ = likelihood.noise.detach().double().numpy() * np.square(self.target_scale_)
        return self

    def predict(self, X: ArrayLike, return_std: bool = False) -> Floats | tuple[Floats, Floats]:
        """Return predictions for rows ``X``, shape (n, d).

        Parameters
        ----------
        X : array, shape (n, d)
        return_std : bool, default=False
            Whether to return the standard deviation of a new observation too, noise included.

        Returns
        -------
        mean : array, shape (n,) or (n, q)
        std : array, same shape
            Only with ``return_std``.
        """
        x = self._rows(X)
        mean, variance = (part.double().numpy() for part in self._outputs(x))
        columns = 0 if self.single_target_ else slice(None)
        center = (mean * self.target_scale_ + self.target_center_)[:, columns].astype(x.dtype)
        if not return_std:
            return cast(Floats, center)
        spread = np.sqrt(variance[:, None] * np.square(self.target_scale_) + self.noise_)
        return cast(Floats, center), cast(Floats, spread[:, columns].astype(x.dtype))


@register(
    "deep-kernel-machines",
    pillar="kernels",
    contract="estimator",
    paper="2108.13097",
    status="stable",
    headline=False,
    example=lambda: _example_with(DeepKernelClassifier),
)
class DeepKernelClassifier(ClassifierMixin, DeepKernel):
    """Gaussian-process classification whose kernel is learned layer by layer, with probabilities.

    Parameters
    ----------
    n_layers, n_inducing, kernel, nu, learn_inducing, learn_scales, fit_intercept, max_epochs, batch_size, lr, kl,
    gram_noise, jitter, random_state, dtype
        As for ``DeepKernelRegressor``.
    n_samples : int, default=100
        Draws of the outputs a step; probabilities are means over 512.
    tempered : bool, default=False
        Whether to divide the divergence of the outputs by the number of classes.

    Attributes
    ----------
    classes_ : array, shape (k,)
    grams_, alignment_, elbo_, history_, inducing_
        As for ``DeepKernelRegressor``.

    References
    ----------
    Yang et al., arXiv 2108.13097, 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> DeepKernelClassifier(1, max_epochs=60, lr=0.05, random_state=0).fit(x, y).score(x, y) > 0.93
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**DeepKernel._state, "classes_": "labels q"}

    def __init__(
        self,
        n_layers: int = 2,
        *,
        n_inducing: int | None = None,
        kernel: Literal["arccos", "rbf"] = "arccos",
        nu: Weights = 1.0,
        learn_inducing: bool = True,
        learn_scales: bool = True,
        fit_intercept: bool = True,
        max_epochs: int = 200,
        batch_size: int = 512,
        lr: float = 1e-2,
        kl: Divergence = "exact",
        gram_noise: GramNoise | None = None,
        n_samples: int = 100,
        tempered: bool = False,
        jitter: float = 1e-4,
        random_state: Seed = None,
        dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        super().__init__(
            n_layers,
            n_inducing=n_inducing,
            kernel=kernel,
            nu=nu,
            learn_inducing=learn_inducing,
            learn_scales=learn_scales,
            fit_intercept=fit_intercept,
            max_epochs=max_epochs,
            batch_size=batch_size,
            lr=lr,
            kl=kl,
            gram_noise=gram_noise,
            jitter=jitter,
            random_state=random_state,
            dtype=dtype,
        )
        self.n_samples = n_samples
        self.tempered = tempered

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        check_int("n_samples", self.n_samples, low=1)
        check_bool("tempered", self.tempered)

    def fit(self, X: ArrayLike, y: ArrayLike, *, progress: Progress | None = None) -> Self:
        """Fit rows ``X``, shape (n, d), to labels ``y``, shape (n,).

        ``progress(message, fraction)`` is called after every epoch.
        """
        self.check_params()
        check_progress(progress)
        x, labels = validate_data(self, X, y, dtype=FLOATS, ensure_min_samples=2)
        check_classification_targets(labels)
        self.classes_, places = np.unique(column_or_1d(labels, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise QuernelError(f"y must hold at least two classes; got 1 class, {self.classes_.tolist()[0]!r}")
        numbers = torch.from_numpy(places.astype(np.int64))
        indicators = F.one_hot(numbers, len(self.classes_)).to(DTYPES[self.dtype])
        self._train(x, numbers, indicators, CategoricalLikelihood(self.n_samples), progress)
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most probable class, shape (n,)."""
        places = self.predict_proba(X).argmax(1)
        return self.classes_[places]

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return probabilities of the classes, shape (n, k)."""
        x = self._rows(X)
        return cast(Floats, class_probabilities(*self._outputs(x)).numpy().astype(x.dtype))
