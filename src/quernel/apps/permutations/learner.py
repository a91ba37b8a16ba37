"""``PermutationLearner``: any permutation of k bits from its k basis vectors, exact on all 2^k - 1 inputs.

Two-layer ReLU networks are trained on e_i -> P e_i only; their average at x / |x| is rounded to bits. In closed form
(``mode="kernel"``) that average is A(x) Y with A = Th(x, X) Th(X, X)^-1, and the inverse is the identity plus a matrix
of rank one, so that nothing is solved: k^2 multiply-adds an input. ``mode="ensemble"`` trains as many networks as
``EnsemblePlan`` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._progress import Progress, check_progress
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.apps.permutations.networks import Networks, average_outputs, draw_networks, train_networks
from quernel.kernels import EnsemblePlan
from quernel.kernels.ntk import permutation_moments
from quernel.kernels.ntk.moments import APART, basis_kernels
from quernel.kernels.ntk.plan import Rounding, Scope, thresholds

Doubles = NDArray[np.float64]
# The mean of a coordinate that should be 0 is 0 itself at training vectors; rounding leaves about 1e-16 of k terms.
_ZERO = 1e-9
# Rows at a time: temporaries stay in the cache.
_ROWS = 1024


@register("ntk-permutations", pillar="apps", contract="application", paper="2502.16763", status="stable")
class PermutationLearner(SavedEstimator, BaseEstimator):
    """Learn a permutation of k bits from k examples and apply it exactly to all inputs but 0.

    Parameters
    ----------
    rounding : {"midpoint", "sign"}, default="midpoint"
        Where outputs are cut: halfway between the means of ones and zeros, which follow from the number of ones of the
        input, or at 0 as in the paper. The midpoint needs fewer networks, some 50 times for 10 bits.
    mode : {"kernel", "ensemble"}, default="kernel"
        An infinite ensemble in closed form, or trained networks.
    width : int, default=2048
        Hidden units of a network.
    n_models : int or "plan", default="plan"
        Networks to train; "plan" asks ``EnsemblePlan`` for ``delta`` and ``scope``.
    delta : float, default=0.01
        Probability of an error that is planned for, in (0, 1).
    scope : {"all", "input"}, default="all"
        An error on any input, or on the worst one.
    lr, n_steps, tol
        Of gradient descent: rate (1.0), most steps (2000), loss at which a network is done (1e-10).
    random_state : int, Generator or None, default=None
        Of the initial weights.

    Attributes
    ----------
    targets_ : array of shape (k, k)
        Row i is what basis vector i is mapped to.
    n_models_ : int or None
        Networks trained; None for ``mode="kernel"``.
    loss_ : float or None
        Largest training loss.

    Notes
    -----
    Nothing is read off the training pairs but through the kernel or the networks. A linear model fitted to the pairs
    would apply the permutation too: the point is that networks which are not linear do.

    References
    ----------
    "Exact learning of permutations for nonzero binary inputs with logarithmic training size and quadratic
    ensemble complexity", arXiv 2502.16763, 2025.

    Examples
    --------
    >>> learner = PermutationLearner().fit([2, 0, 1])
    >>> learner.predict([[1, 1, 0], [1, 0, 1]]).tolist()
    [[1, 0, 1], [0, 1, 1]]
    """

    _state: ClassVar[Mapping[str, str]] = {
        "targets_": "d d",
        "n_models_": "int ?",
        "loss_": "float ?",
        "hidden_": "m w d ?",
        "output_": "m d w ?",
    }

    def __init__(
        self,
        rounding: Rounding = "midpoint",
        mode: Literal["kernel", "ensemble"] = "kernel",
        width: int = 2048,
        n_models: int | Literal["plan"] = "plan",
        *,
        delta: float = 0.01,
        scope: Scope = "all",
        lr: float = 1.0,
        n_steps: int = 2000,
        tol: float = 1e-10,
        random_state: Seed = None,
    ) -> None:
        self.rounding = rounding
        self.mode = mode
        self.width = width
        self.n_models = n_models
        self.delta = delta
        self.scope = scope
        self.lr = lr
        self.n_steps = n_steps
        self.tol = tol
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_choice("mode", self.mode, ("kernel", "ensemble"))
        check_int("width", self.width, low=1)
        if self.n_models != "plan":
            check_int("n_models", self.n_models, low=1)
        # Checks rounding, delta and scope.
        EnsemblePlan(2, self.delta, self.scope, self.rounding)
        check_float("lr", self.lr, low=0.0, open_low=True)
        check_int("n_steps", self.n_steps, low=1)
        check_float("tol", self.tol, low=0.0, open_low=True)
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        _check_permutation("targets_", self.targets_)
        held = getattr(self, "hidden_", None)
        if (held is not None) != (self.mode == "ensemble") or (held is not None and len(held) != self.n_models_):
            raise QuernelError("hidden_ must hold n_models_ networks with mode='ensemble', and nothing otherwise")

    def fit(self, X: ArrayLike, Y: ArrayLike | None = None, *, progress: Progress | None = None) -> Self:
        """Train on the k basis vectors and their images.

        Parameters
        ----------
        X : array, shape (k,) or (k, k)
            Alone: the permutation, as places (bit i goes to place ``X[i]``) or as a matrix P (bit i goes to the row of
            the 1 in column i). With ``Y``: the k basis vectors as rows, in any order.
        Y : array, shape (k, k), optional
            The image of every row of ``X``.
        progress : callable, optional
            Called as ``progress(message, fraction)`` while networks are trained.
        """
        self.check_params()
        check_progress(progress)
        targets = _targets_of(X, Y)
        k = len(targets)
        self.n_features_in_ = k
        self.targets_ = targets
        self.n_models_ = self.loss_ = None
        for name in {"hidden_", "output_"} & set(vars(self)):
            delattr(self, name)
        if self.mode == "ensemble":
            plan = EnsemblePlan(k, self.delta, self.scope, self.rounding)
            self.n_models_ = plan.n_models if self.n_models == "plan" else self.n_models
            drawn = draw_networks(self.n_models_, self.width, k, k, seed=self.random_state)
            rows, images = torch.eye(k, dtype=torch.float64), torch.from_numpy(targets)
            trained, losses = train_networks(
                drawn, rows, images, lr=self.lr, n_steps=self.n_steps, tol=self.tol, progress=progress
            )
            self.loss_ = float(losses.max())
            self.hidden_, self.output_ = trained.hidden.numpy(), trained.output.numpy()
        return self

    def decision_function(self, X: ArrayLike) -> Doubles:
        """Return the average outputs before rounding, shape (n, k), of binary rows X (n, k), none of them 0."""
        check_is_fitted(self)
        return self._average(self._bits(X))

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the permuted bits of binary rows X, shape (n, k), none of them 0.

        Raises
        ------
        QuernelError
            If a row is 0 or holds anything but 0 and 1.
        """
        check_is_fitted(self)
        bits = self._bits(X)
        ones = bits.sum(1).astype(np.int64)
        scores, k = self._average(bits), self.n_features_in_
        if self.rounding == "sign":
            # Training leaves residuals of at most sqrt(2 loss) where the mean is 0.
            cut = _ZERO if self.loss_ is None else max(_ZERO, math.sqrt(2 * self.loss_))
            return (scores > cut).astype(np.int64)
        moments = permutation_moments(k, ones) if len(ones) else permutation_moments(k)
        cuts = thresholds(moments.mean_on, moments.mean_off, "midpoint")[: len(ones), None]
        # Where every bit is set, no coordinate should be 0 and there is nothing to tell apart.
        return ((scores > cuts) | (ones == k)[:, None]).astype(np.int64)

    def _average(self, bits: Doubles) -> Doubles:
        if self.mode == "ensemble":
            networks = Networks(torch.from_numpy(self.hidden_), torch.from_numpy(self.output_))
            lengths = np.sqrt(bits.sum(1, keepdims=True))
            return average_outputs(networks, torch.from_numpy(bits / lengths)).numpy()
        scores = np.empty_like(bits)
        for rows in (slice(i, i + _ROWS) for i in range(0, len(bits), _ROWS)):
            scores[rows] = self._regressed(bits[rows])
        return scores

    def _regressed(self, bits: Doubles) -> Doubles:
        """Return kernel regression at the normalised rows: Th(x, X) Th(X, X)^-1 Y."""
        kernels = basis_kernels(bits.sum(1, keepdims=True), "ntk")
        ntk = np.where(bits == 1, kernels.inside, APART)  # (n, k), times k
        # The inverse is [I - b / (own + (k - 1) b) 11^T] / (own - b).
        rest = ntk.sum(1, keepdims=True) * APART / (kernels.own + (bits.shape[1] - 1) * APART)
        result: Doubles = ((ntk - rest) / (kernels.own - APART)) @ self.targets_
        return result

    def _bits(self, X: ArrayLike) -> Doubles:
        bits = np.asarray(X)
        k = self.n_features_in_
        if bits.ndim != 2 or bits.shape[1] != k or bits.dtype.kind not in "biuf":
            raise QuernelError(
                f"X must have shape (n, {k}) as the permutation has {k} bits; got {bits.shape}, {bits.dtype}"
            )
        if not ((bits == 0) | (bits == 1)).all():
            raise QuernelError("X must hold 0 and 1 only")
        empty = np.flatnonzero(~(bits != 0).any(1))
        if len(empty):
            raise QuernelError(f"row {empty[0]} of X is zero, which has no direction; leave it out (its image is zero)")
        return bits.astype(np.float64)


def _targets_of(X: ArrayLike, Y: ArrayLike | None) -> Doubles:
    """Return the images of the basis vectors, (k, k)."""
    given = np.asarray(X)
    if Y is None and given.ndim == 1:
        k = len(given)
        if given.dtype.kind not in "iu" or not np.array_equal(np.sort(given), np.arange(k)):
            raise QuernelError(f"places must be 0 to k - 1 in some order; got {X!r}")
        targets = np.zeros((k, k))
        targets[np.arange(k), given] = 1
    elif Y is None:
        targets = _check_permutation("the permutation matrix", given).T.copy()
    else:
        rows, images = _check_permutation("X", given), _check_permutation("Y", np.asarray(Y))
        if rows.shape != images.shape:
            raise QuernelError(f"X and Y must have one shape; got {rows.shape} and {images.shape}")
        targets = rows.T @ images
    if len(targets) < 2:
        raise QuernelError(f"a permutation needs k >= 2 bits; got {len(targets)}")
    return targets


def _check_permutation(name: str, matrix: NDArray[Any]) -> Doubles:
    """Return a matrix as float64 if it has one 1 in every row and column and is 0 elsewhere."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.dtype.kind in "biuf"
    if not (square and np.isin(matrix, (0, 1)).all() and (matrix.sum(0) == 1).all() and (matrix.sum(1) == 1).all()):
        raise QuernelError(f"{name} must be of shape (k, k) with a single 1 in every row and column; got {matrix!r}")
    return matrix.astype(np.float64)
