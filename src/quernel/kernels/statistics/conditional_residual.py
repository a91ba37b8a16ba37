"""``ConditionalResidual``: take what a paired text predicts out of an embedding, or keep only that (arXiv 2412.18645).

    r(x, t) = phi_X(x) - G phi_T(t),   G = C_XT (C_TT + eta I)^-1,   (1/n) sum r phi_T^T = eta G

With the cosine kernel r lies in the space of the embeddings themselves. Cost of a fit: n (D_T + D_X)^2 multiply-adds
and a factorisation of C_TT, a block of rows at a time; of a transform, D_T D_X a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from quernel._array_folder import ArrayFolder, Arrays, take
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_float, check_int
from quernel.kernels.moments import Gram
from quernel.kernels.statistics._pair_maps import BLOCK, Kernel, KernelChoice, KernelMap, dims
from quernel.kernels.statistics.schur import PairSample, best_eta, ridge_weights, split_of_covariances
from quernel.kernels.statistics.schur_entropy import checked_eta


@dataclass(frozen=True, eq=False)
class ResidualMode:
    """One direction of what is left.

    Attributes
    ----------
    weight : float
        Eigenvalue of Lam_I: the share of the second moments that lies in this direction.
    direction : array, shape (D_X,), float64
        Unit length, in the feature space of X.
    pairs : array of int, shape (n_pairs,)
        The pairs whose residuals reach furthest in this direction, furthest first.
    """

    weight: float
    direction: np.ndarray
    pairs: np.ndarray


@register("schur-entropy", pillar="kernels", contract="diagnostic", paper="2412.18645", status="stable", headline=False)
class ConditionalResidual(ArrayFolder):
    """Remove from embeddings what their prompts predict linearly ("defocus"), or keep only that ("focus").

    Parameters
    ----------
    kernel : {"cosine", "gaussian"}, default="cosine"
        "cosine": residuals are vectors of the embedding's own space; rows are divided by their lengths first.
    eta : float or "loo", default=1e-3
        Ridge; what stays correlated with the prompts is eta times the regression's weights.
    bandwidth, n_features, shared_space, random_state
        Of the Gaussian kernel, as in ``SchurEntropy``; it needs random features here.

    Attributes
    ----------
    weights_ : array, shape (D_T, D_X)
        G transposed.
    eta_ : float
        The ridge that was used.

    Notes
    -----
    Only what is linear in phi_T is removed, and nothing is centred: give T a constant coordinate, or prompts as one-hot
    codes, if means are to go too.

    References
    ----------
    Ospanov, Jalali, Farnia, "Dissecting CLIP: Decomposition with a Schur Complement-based Approach",
    arXiv 2412.18645, 2024.

    Examples
    --------
    >>> prompts = np.eye(3).repeat(20, axis=0)
    >>> images = prompts @ np.eye(3, 8) + 0.3 * np.random.default_rng(0).standard_normal((60, 8))
    >>> left = ConditionalResidual(eta=0.0).fit(prompts, images).transform(prompts, images)
    >>> left.shape, bool(np.abs(prompts.T @ left).max() < 1e-10)
    ((60, 8), True)
    """

    kind = "statistic"

    def __init__(
        self,
        kernel: Kernel = "cosine",
        *,
        eta: float | Literal["loo"] = 1e-3,
        bandwidth: float | Sequence[float] | None = None,
        n_features: int = 0,
        shared_space: bool = False,
        random_state: int = 0,
    ) -> None:
        self.choice = KernelChoice(kernel, bandwidth, n_features, shared_space, random_state)
        if kernel != "cosine" and not n_features:
            raise QuernelError('residuals need features: take kernel="cosine", or "gaussian" with n_features > 0')
        self.eta = checked_eta(eta)
        self._widths: tuple[int, int] | None = None

    def fit(self, T: Any, X: Any) -> Self:
        """Fit the regression of X on T; at least 2 pairs, shapes (n, d_text) and (n, d_image).

        Raises
        ------
        QuernelError
            If rows do not pair up, are too few, not finite or, for the cosine kernel, zero.
        """
        t, x = self.choice.rows(T, X)
        if len(t) < 2:
            raise QuernelError(f"a fit needs at least 2 pairs; got {len(t)}")
        widths = t.shape[1], x.shape[1]
        maps = self.choice.maps(widths)
        sizes = dims(maps) or widths
        self.eta_ = best_eta(PairSample.of(maps, t, x)) if self.eta == "loo" else float(self.eta)
        sums = Gram(sum(sizes), compute_dtype=torch.float64)
        for rows_t, rows_x in zip(t.split(BLOCK), x.split(BLOCK), strict=True):
            sums.update(torch.cat((maps[0].features(rows_t), maps[1].features(rows_x)), 1))
        (c_tt, c_tx), (_, c_xx) = (part.split(sizes, 1) for part in sums.mean().split(sizes))
        self.weights_ = np.ascontiguousarray(ridge_weights(c_tt, c_tx, self.eta_).numpy())
        self._covariance = split_of_covariances(c_tt, c_tx, c_xx, self.eta_).residual.contiguous().numpy()
        self._widths = widths
        return self

    def transform(self, T: Any, X: Any = None, *, keep: Literal["residual", "explained"] = "residual") -> Any:
        """Return what the prompts do not predict of X, or what they do.

        Parameters
        ----------
        T, X : arrays or Tensors, shapes (n, d_text) and (n, d_image)
            As wide as in ``fit``. ``keep="explained"`` needs no X.
        keep : {"residual", "explained"}, default="residual"

        Returns
        -------
        vectors : same kind and precision as X (or T without one), shape (n, D_X)
        """
        check_choice("keep", keep, ("residual", "explained"))
        maps, widths = self._fitted()
        if X is None:
            if keep == "residual":
                raise QuernelError('X is what the residual is of; leave it out with keep="explained" only')
            t, model = self.choice.side("T", T), T
        else:
            (t, x), model = self.choice.rows(T, X), X
            if x.shape[1] != widths[1]:
                raise QuernelError(f"X must have {widths[1]} columns as in fit; got {x.shape[1]}")
        if t.shape[1] != widths[0]:
            raise QuernelError(f"T must have {widths[0]} columns as in fit; got {t.shape[1]}")
        found = maps[0].features(t) @ torch.from_numpy(self.weights_)
        found = found if keep == "explained" else maps[1].features(x) - found
        return _as(found, model)

    def fit_transform(self, T: Any, X: Any, *, keep: Literal["residual", "explained"] = "residual") -> Any:
        """Fit and transform the same pairs."""
        return self.fit(T, X).transform(T, X, keep=keep)

    def modes(self, T: Any, X: Any, k: int = 5, *, n_pairs: int = 8) -> list[ResidualMode]:
        """Return the directions in which most is left, each with the pairs that reach furthest in it.

        Parameters
        ----------
        T, X : arrays or Tensors, shapes (n, d_text) and (n, d_image)
            The pairs to choose among; those of ``fit`` or others.
        k : int, default=5
            Directions, of largest eigenvalue of Lam_I first.
        n_pairs : int, default=8
            Pairs a direction; an eigenvector has no sign, so it is turned to where the furthest pair lies.
        """
        check_int("k", k, low=1)
        check_int("n_pairs", n_pairs, low=1)
        left = torch.as_tensor(self.transform(T, X)).double()
        values, vectors = torch.linalg.eigh(torch.from_numpy(self._covariance))
        found = []
        for i in range(len(values) - 1, max(len(values) - 1 - k, -1), -1):
            reach = left @ vectors[:, i]
            sign = 1.0 if float(reach.max()) >= -float(reach.min()) else -1.0
            order = (sign * reach).argsort(descending=True, stable=True)[:n_pairs]
            direction = (sign * vectors[:, i]).numpy()
            found.append(ResidualMode(max(float(values[i]), 0.0), direction, order.numpy()))
        return found

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self.choice.config() | {"eta": self.eta}

    def __repr__(self) -> str:
        return f"ConditionalResidual({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"

    def _fitted(self) -> tuple[tuple[KernelMap, KernelMap], tuple[int, int]]:
        if self._widths is None:
            raise QuernelError("this ConditionalResidual is not fitted; call fit(T, X) first")
        return self.choice.maps(self._widths), self._widths

    def _arrays(self) -> Arrays:
        if self._widths is None:
            return {}
        return {
            "widths": np.array(self._widths, np.int64),
            "eta": np.array([self.eta_]),
            "weights": self.weights_,
            "covariance": self._covariance,
        }

    def _restore(self, arrays: Arrays) -> None:
        if not arrays:
            return
        first, second = (check_int("widths", int(width), low=1) for width in take(arrays, "widths", np.int64, (2,)))
        sizes = dims(self.choice.maps((first, second))) or (0, 0)
        self.eta_ = check_float("eta", float(take(arrays, "eta", np.float64, (1,))[0]), low=0.0)
        self.weights_ = take(arrays, "weights", np.float64, sizes)
        self._covariance = take(arrays, "covariance", np.float64, (sizes[1], sizes[1]))
        for name, array in (("weights", self.weights_), ("covariance", self._covariance)):
            check_finite(f"array {name!r}", array)
        self._widths = first, second


def _as(found: Tensor, model: Any) -> Any:
    """Return vectors in the kind and precision of what they were made from."""
    if isinstance(model, Tensor):
        return found.to(model.device, model.dtype if model.is_floating_point() else found.dtype)
    dtype = np.asarray(model).dtype
    return found.numpy().astype(dtype if dtype in (np.float32, np.float16) else np.float64)
