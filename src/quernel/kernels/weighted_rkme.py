"""``WeightedRKME``: the specification of a model, its reduced outputs with prompts, weighted for each query.

    a_n = beta_n softmax_n(cos(u_n, u_q) / T), normalised,
    D(S, q) = | sum_n a_n k(z_n, .) - mean_i k(x_i, .) |^2 = a^T K a - 2 sum_n a_n k(z_n, x) + k(x, x)

Only the part of the outputs that answers the user's prompt is compared; without a prompt a = beta, the plain RKME.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted, validate_data

from quernel._errors import QuernelError
from quernel._progress import Progress
from quernel._registry import register
from quernel._validate import check_finite, check_float
from quernel.kernels._mean_targets import Floats, mean_target
from quernel.kernels._random_features import FLOATS
from quernel.kernels.clustering import cluster_means, nearest
from quernel.kernels.reduced_mean_embedding import ReducedMeanEmbedding

# A mean of unit prompts this short points nowhere.
_SHORT = 1e-6


def _example() -> dict[str, Any]:
    return {"make": lambda: WeightedRKME(3, rounds=1, random_state=0)}


@register(
    "rkme-model-search",
    pillar="kernels",
    contract="estimator",
    paper="2412.12232",
    status="stable",
    headline=False,
    example=_example,
)
class WeightedRKME(ReducedMeanEmbedding):
    """Summarise a model's outputs, with the prompts that they answer, for ``quernel.search.ModelIndex``.

    Parameters
    ----------
    n_points, kernel, gamma, simplex, rounds, encoder, measure_error, random_state
        As for ``ReducedMeanEmbedding``.

    Attributes
    ----------
    u_ : array, shape (M, p), or None
        A unit prompt embedding for each point: the mean direction of the prompts whose outputs are nearest to it; also
        ``u``. None without prompts.
    z_, beta_, gamma_, error_, history_, n_rows_, epsilon_, delta_
        As for ``ReducedMeanEmbedding``.

    Notes
    -----
    Differs from the paper: (1) its weights are similarities of CLIP prompts in an unpublished form; the softmax
    is a choice. A small T looks at one prompt, a large one is plain RKME. (2) Prompts are averaged over the outputs
    nearest to the final points, not over the clusters that the points began with. (3) Prompts are a keyword of ``fit``,
    so that the rest is an estimator like any other.

    References
    ----------
    Zhou, Guo, Song, Li, "You Only Submit One Image to Find the Most Suitable Generative Model", arXiv 2412.12232, 2024.

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> topic = np.repeat([0, 1], 100)
    >>> outputs, prompts = draw.standard_normal((200, 2)) + 5 * topic[:, None], np.eye(2)[topic]
    >>> spec = WeightedRKME(10, gamma=0.1, random_state=0).fit(outputs, prompts=prompts)
    >>> asked = [[5.0, 5.0]]
    >>> bool(spec.distance(asked, [0.0, 1.0]) < spec.distance(asked) < spec.distance(asked, [1.0, 0.0]))
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**ReducedMeanEmbedding._state, "u_": "m p ?"}

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if self.u_ is not None:
            check_finite("u_", self.u_)

    @property
    def u(self) -> Floats | None:
        """The unit prompt embedding of each point, (M, p), or None."""
        check_is_fitted(self, "z_")
        return self.u_

    def fit(
        self, X: ArrayLike, y: object = None, *, prompts: ArrayLike | None = None, progress: Progress | None = None
    ) -> Self:
        """Summarise outputs and the prompts that they answer.

        Parameters
        ----------
        X : array, shape (N, d)
            Embedded outputs.
        y : ignored
        prompts : array, shape (N, p), optional
            The embedding of the prompt of each output; none is 0.
        progress : callable, optional
            ``progress(message, fraction)`` after each round.
        """
        self.check_params()
        if prompts is None and np.ndim(cast(Any, y)) == 2:
            raise QuernelError("y is not used, and has the shape of prompts; give these as prompts=")
        x = validate_data(self, X, dtype=FLOATS)
        held = None if prompts is None else _unit_prompts("prompts", prompts, len(x))
        self._reduce(x, progress)
        self.u_ = None if held is None else self._prompts_of_points(x, held).astype(x.dtype)
        return self

    def weights(self, prompt: ArrayLike | None = None, temperature: float = 0.1) -> NDArray[np.float64]:
        """Return the weight of each point for a query with this prompt, shape (M,), sum 1.

        Parameters
        ----------
        prompt : array, shape (p,), optional
            Its embedding; without one the weights are ``beta``.
        temperature : float, default=0.1
            T > 0.

        Raises
        ------
        QuernelError
            If there are no prompts here, or weights were left free of sign.
        """
        check_is_fitted(self, "z_")
        check_float("temperature", temperature, low=0.0, open_low=True)
        if prompt is None:
            return self.beta_
        if self.u_ is None:
            raise QuernelError("prompt needs a specification with prompts; give fit(X, prompts=...)")
        if (self.beta_ < 0).any():
            raise QuernelError("prompt needs weights >= 0; fit with simplex=True")
        asked = _unit_prompts("prompt", np.asarray(prompt)[None], 1)[0]
        if asked.shape != self.u_.shape[1:]:
            raise QuernelError(f"prompt must have shape {self.u_.shape[1:]}, as those of fit; got {asked.shape}")
        # Points of no weight must not decide the largest logit, or the others could all underflow.
        logits = np.where(self.beta_ > 0, self.u_ @ asked / temperature, -np.inf)
        weights = self.beta_ * np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())

    def distance(self, X: ArrayLike, prompt: ArrayLike | None = None, *, temperature: float = 0.1) -> float:
        """Return D, the squared distance of the query's mean embedding to the weighted one; never below 0.

        Parameters
        ----------
        X : array, shape (n, d)
            The embedded examples of one query.
        prompt : array, shape (p,), optional
        temperature : float, default=0.1
        """
        x: Floats = validate_data(self, X, dtype=FLOATS, reset=False)
        a = self.weights(prompt, temperature)
        points = np.concatenate((self.z_, x)).astype(np.float64)
        signed = np.concatenate((a, np.full(len(x), -1 / len(x))))
        return max(0.0, float(signed @ self._kernel(points, points) @ signed))

    def _keep(self, *state: Any) -> None:
        super()._keep(*state)
        self.u_ = None

    def _prompts_of_points(self, x: Floats, prompts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean direction of the prompts of the rows nearest to each point."""
        target = mean_target(x, self.kernel, self.gamma_)
        points, held = target.inside(self.z_)[None].to(target.rows.dtype), torch.from_numpy(prompts)
        own = nearest(target.rows[None], points)
        means = cluster_means(held[None], own, len(self.z_))[0]
        lengths = means.norm(dim=1, keepdim=True)
        # Points that are nearest to no row, or whose prompts cancel, take the prompt of the row nearest to them.
        closest = held[nearest(points, target.rows[None])[0]]
        return np.asarray(torch.where(lengths > _SHORT, means / lengths.clamp_min(_SHORT), closest).numpy())


def _unit_prompts(name: str, prompts: Any, n: int) -> NDArray[np.float64]:
    rows = np.asarray(prompts)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or len(rows) != n or not rows.shape[1]:
        raise QuernelError(f"{name} must be numbers of shape (n, p), one row an output; got {rows.dtype} {rows.shape}")
    check_finite(name, rows)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise QuernelError(f"{name} holds a row of zeros, which has no direction")
    return np.asarray(rows / lengths, np.float64)
