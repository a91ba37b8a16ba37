"""``NTKRegressor``: an infinite ensemble of infinitely wide networks, trained for any time, as an estimator.

Kernel regression with the NTK gives the mean of the ensemble, the NNGP kernel beside it how far its members are apart.
Cost of a fit: n^2 kernel entries and n^3 / 3 operations, some n^3 for a finite time; 16 n^2 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._progress import Progress, check_progress
from quernel._registry import register
from quernel._validate import check_type
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.ntk.dynamics import check_schedule, ensemble_covariance, ensemble_variance, training_gain
from quernel.kernels.ntk.kernel import NTKernel


@register(
    "ntk-permutations",
    pillar="kernels",
    contract="estimator",
    paper="2502.16763",
    status="stable",
    headline=False,
    example=lambda: {"make": lambda: NTKRegressor(NTKernel(sigma_b=0.3), ridge=1e-3)},
)
class NTKRegressor(RegressorMixin, SavedEstimator, BaseEstimator):
    """Regression by an infinite ensemble of infinitely wide networks, with the spread of its members.

    Parameters
    ----------
    kernel : NTKernel or None, default=None
        The network; None is ``NTKernel()``, one hidden layer of ReLUs without biases.
    t : float, default=inf
        Time of gradient flow; a finite one is early stopping.
    lr : float, default=1.0
        Learning rate.
    steps : int or None, default=None
        Steps of gradient descent instead of a time.
    ridge : float, default=0.0
        Weight decay towards the initial weights, for noisy targets.

    Attributes
    ----------
    X_fit_ : array, shape (n, d)
    dual_coef_ : array, shape (n, q)
        Predictions are ``kernel.ntk(Z, X_fit_) @ dual_coef_``.
    gain_ : array, shape (n, n)
        What maps targets to ``dual_coef_``; the covariance needs it.

    Notes
    -----
    Nothing is centred or scaled: the untrained ensemble has mean 0 and the kernel's variance, which a target far from 0
    or a column of large numbers does not fit. Standardise both. Bands show how members of the ensemble differ, not the
    noise of the targets.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> model = NTKRegressor().fit(x, [1.0, -1.0])
    >>> mean, std = model.predict(np.array([[1.0, 0.0], [3.0, 3.0]]), return_std=True)
    >>> (mean + 0.0).round(6).tolist(), std.round(2).tolist()
    ([1.0, 0.0], [0.0, 0.78])
    """

    _state: ClassVar[Mapping[str, str]] = {
        "X_fit_": "n d",
        "dual_coef_": "n q",
        "gain_": "n n",
        "single_target_": "flag",
    }

    def __init__(
        self,
        kernel: NTKernel | None = None,
        *,
        t: float = math.inf,
        lr: float = 1.0,
        steps: int | None = None,
        ridge: float = 0.0,
    ) -> None:
        self.kernel = kernel
        self.t = t
        self.lr = lr
        self.steps = steps
        self.ridge = ridge

    def __sklearn_tags__(self) -> Any:
        tags: Any = cast(Any, super()).__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        if self.kernel is not None:
            check_type("kernel", self.kernel, NTKernel)
            self.kernel.check_params()
        check_schedule(t=self.t, lr=self.lr, steps=self.steps, ridge=self.ridge)

    def fit(self, X: ArrayLike, y: ArrayLike, *, progress: Progress | None = None) -> Self:
        """Train on rows ``X``, shape (n, d), with targets ``y``, shape (n,) or (n, q).

        ``progress(message, fraction)`` is called as the kernel grows, as by ``NTKernel.ntk``.
        """
        self.check_params()
        check_progress(progress)
        x, targets = validate_data(self, X, y, dtype=FLOATS, y_numeric=True, multi_output=True)
        self.single_target_ = targets.ndim == 1
        self.X_fit_ = np.array(x, order="C")
        ntk = self._kernel().ntk(_double(self.X_fit_), progress=progress)
        if not bool(ntk.diagonal().any()):
            raise QuernelError("X has rows of zeros only, where the kernel is 0; give the kernel biases, sigma_b > 0")
        gain = training_gain(ntk, t=self.t, lr=self.lr, steps=self.steps, ridge=self.ridge)
        self.gain_ = gain.numpy()
        self.dual_coef_ = (gain @ _double(targets.reshape(len(targets), -1))).numpy()
        return self

    def predict(self, X: ArrayLike, *, return_std: bool = False, return_cov: bool = False) -> Any:
        """Return the mean of the ensemble, and on request how its members differ.

        Parameters
        ----------
        X : array, shape (m, d)
        return_std : bool, default=False
            Also return the standard deviation of one member's output.
        return_cov : bool, default=False
            Also return the covariance of one member's outputs at the rows; the same for each of q outputs, which are
            independent.

        Returns
        -------
        mean : array, shape (m,) or (m, q)
        std or cov : array, shape (m,) or (m, m)
            Where asked for.
        """
        if return_std and return_cov:
            raise QuernelError("return_std and return_cov exclude each other; the covariance has the variances too")
        check_is_fitted(self)
        z = validate_data(self, X, dtype=FLOATS, reset=False)
        kernel, rows, train = self._kernel(), _double(z), _double(self.X_fit_)
        if not (return_std or return_cov):
            return self._finished(kernel.ntk(rows, train), z)
        cross, nngp = kernel.both(rows, train), kernel.nngp(train)
        a = cross.ntk @ torch.from_numpy(self.gain_)
        if return_std:
            spread = ensemble_variance(a, nngp, cross.nngp, kernel.nngp_diag(rows)).sqrt()
        else:
            spread = ensemble_covariance(a, nngp, cross.nngp, kernel.nngp(rows))
        return self._finished(cross.ntk, z), spread.numpy().astype(z.dtype, copy=False)

    def _kernel(self) -> NTKernel:
        return NTKernel() if self.kernel is None else self.kernel

    def _finished(self, ntk: Tensor, z: Floats) -> Floats:
        mean: Floats = (ntk @ torch.from_numpy(self.dual_coef_)).numpy().astype(z.dtype, copy=False)
        return mean[:, 0] if self.single_target_ else mean


def _double(x: Floats) -> Tensor:
    # A copy, so that read-only memory is none of torch's concern.
    return torch.from_numpy(np.array(x, dtype=np.float64, order="C"))
