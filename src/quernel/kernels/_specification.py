"""What every small summary of a sample by weighted points answers: its mean embedding, distances, samples, identity.

A specification may only be compared with one of the same kernel, gamma and encoder; everything here checks that first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted, validate_data

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int
from quernel.kernels._mean_targets import KERNELS, Floats, kernel_matrix
from quernel.kernels._random_features import FLOATS

NEIGHBOURS = ("add_remove", "replace")
# Two gammas within this share of each other are one: they may have gone through a file as text.
_SAME_GAMMA = 1e-9


class Specification:
    """Points z_, weights beta_ and the kernel that they are to be read with."""

    kernel: str
    encoder: str
    gamma_: float
    z_: Floats
    beta_: NDArray[np.float64]
    error_: float | None
    epsilon_: float | None
    neighbours_: str | None
    delta_: float | None
    n_features_in_: int

    @property
    def z(self) -> Floats:
        """The points, shape (M, d)."""
        check_is_fitted(self, "z_")
        return self.z_

    @property
    def beta(self) -> NDArray[np.float64]:
        """Their weights, shape (M,)."""
        check_is_fitted(self, "z_")
        return self.beta_

    @property
    def privacy(self) -> dict[str, float | str | None] | None:
        """What the released mean that the points were made from promises; None if they were made from the rows."""
        check_is_fitted(self, "z_")
        if self.epsilon_ is None:
            return None
        return {"epsilon": self.epsilon_, "delta": self.delta_, "neighbours": self.neighbours_}

    def score_samples(self, X: ArrayLike) -> Floats:
        """Return the mean embedding at rows: sum_n beta_n k(z_n, x).

        Parameters
        ----------
        X : array, shape (n, d)

        Returns
        -------
        values : array, shape (n,)
            In the dtype of X; larger where the sample is denser.
        """
        check_is_fitted(self, "z_")
        x: Floats = validate_data(self, X, dtype=FLOATS, reset=False)
        return (self._kernel(x, self.z_) @ self.beta_).astype(x.dtype)

    def mmd2(self, other: Specification) -> float:
        """Return the squared distance of two mean embeddings, never below 0.

        Parameters
        ----------
        other : ReducedMeanEmbedding or WeightedRKME

        Raises
        ------
        QuernelError
            If kernel, gamma, encoder or the number of columns differ.
        """
        check_comparable("other", other, self.kernel, self.gamma_, self.encoder, self.n_features_in_)
        # One signed measure on both sets of points, so that equal ones cancel before they are squared.
        points = np.concatenate((self.z_, other.z_)).astype(np.float64)
        weights = np.concatenate((self.beta_, -other.beta_))
        return max(0.0, float(weights @ self._kernel(points, points) @ weights))

    def herd(self, n: int, candidates: ArrayLike | None = None) -> Floats:
        """Return representative rows, in order of importance, without the data: kernel herding.

        Parameters
        ----------
        n : int
            Rows to choose; one may be chosen more than once.
        candidates : array, shape (m, d), optional
            What to choose from; default the points themselves.

        Returns
        -------
        chosen : array, shape (n, d)

        Notes
        -----
        x_{t+1} = argmax of mu(x) - sum_s k(x, x_s) / (t + 1). The error of the mean of the first t falls like 1 / t
        where the candidates' hull reaches mu. ``KernelHerding`` does the same in a space of features, where an index
        can find the next one.
        """
        check_is_fitted(self, "z_")
        count = check_int("n", n, low=1)
        rows: Floats = self.z_ if candidates is None else validate_data(self, candidates, dtype=FLOATS, reset=False)
        mu, near = self._kernel(rows, self.z_) @ self.beta_, np.zeros(len(rows))
        chosen = np.empty(count, np.int64)
        for t in range(count):
            chosen[t] = int((mu - near / (t + 1)).argmax())
            near += self._kernel(rows, rows[chosen[t], None])[:, 0]
        return rows[chosen]

    def _kernel(self, y: Floats, z: Floats) -> Floats:
        return kernel_matrix(y, z, self.kernel, self.gamma_)


def encoder_fingerprint(state: Mapping[str, Any]) -> str:
    """Return a short text that is the same for the same weights of an encoder, for ``encoder=``.

    Parameters
    ----------
    state : mapping of str to arrays or tensors
        Such as a ``state_dict()``, or ``{"components": pca.components_, "mean": pca.mean_}``.

    Returns
    -------
    fingerprint : str
        16 hexadecimal digits of a sha256 over names, dtypes, shapes and bytes.

    Examples
    --------
    >>> encoder_fingerprint({"w": np.eye(2)}) == encoder_fingerprint({"w": np.eye(2) + 1e-12})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        array = torch.as_tensor(np.array(value) if not hasattr(value, "detach") else value).detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)} ".encode())
        # As bytes in torch, which knows bfloat16.
        digest.update(array.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_comparable(name: str, spec: Any, kernel: str, gamma: float, encoder: str, dim: int) -> None:
    """Raise unless a fitted specification is to be read with this kernel, gamma and encoder."""
    if not isinstance(spec, Specification):
        raise QuernelError(f"{name} must be a ReducedMeanEmbedding or WeightedRKME; got {type(spec).__name__}")
    if not hasattr(spec, "z_"):
        raise QuernelError(f"{name} is not fitted; call fit first")
    same_gamma = kernel != "gaussian" or math.isclose(spec.gamma_, gamma, rel_tol=_SAME_GAMMA)
    for what, got, wanted, same in (
        ("encoder", spec.encoder, encoder, spec.encoder == encoder),
        ("kernel", spec.kernel, kernel, spec.kernel == kernel),
        ("gamma", spec.gamma_, gamma, same_gamma),
        ("number of columns", spec.n_features_in_, dim, spec.n_features_in_ == dim),
    ):
        if not same:
            raise QuernelError(
                f"{name} has {what} {got!r}, where {wanted!r} is needed: distances between the two mean nothing. "
                f"Make all specifications with one {what}"
            )


def check_kernel(kernel: Any, gamma: Any) -> None:
    """Raise unless the kernel is known and gamma a positive number or "median"."""
    check_choice("kernel", kernel, KERNELS)
    if gamma != "median":
        if isinstance(gamma, str):
            raise QuernelError(f'gamma must be "median" or a number > 0; got {gamma!r}')
        check_float("gamma", gamma, low=0.0, open_low=True)


def check_points(spec: Specification) -> None:
    """Raise unless the numbers of a specification make sense together, whatever file they came from."""
    for name, values in (("z_", spec.z_), ("beta_", spec.beta_)):
        check_finite(name, values)
    check_float("gamma_", spec.gamma_, low=0.0, open_low=True)
    if spec.beta_.dtype != np.float64 or abs(spec.beta_).sum() <= 0:
        raise QuernelError("beta_ must be float64 weights, not all 0")
    if len({held is None for held in (spec.epsilon_, spec.delta_, spec.neighbours_)}) > 1:
        raise QuernelError("epsilon_, delta_ and neighbours_ must all be there, or none")
    if spec.epsilon_ is not None:
        check_promise(spec)


def check_promise(spec: Specification) -> None:
    """Raise unless what a private specification promises is a promise."""
    check_float("epsilon", spec.epsilon_, low=0.0, open_low=True)
    check_float("delta", spec.delta_, low=0.0, high=1.0, open_high=True)
    check_choice("neighbours", spec.neighbours_, NEIGHBOURS)
