"""``ReducedMeanEmbedding``: a sample as a few weighted points whose mean embedding is that of all rows (RKME).

    E(beta, z) = | sum_n beta_n k(z_n, .) - (1/N) sum_j k(x_j, .) |^2,      MMD = sqrt(E)

k-means gives the first points; then weights by a quadratic programme on the simplex and points by L-BFGS take turns,
and E never rises. Cost: rounds * 10 evaluations of M N d multiply-adds, and N^2 d / 2 once for the constant of E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._progress import Progress, check_progress
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._threads import one_blas_thread
from quernel._validate import check_bool, check_finite, check_int, check_type
from quernel.kernels._mean_targets import Floats, MeanTarget, alternate, best_weights, mean_target
from quernel.kernels._random_features import FLOATS
from quernel.kernels._specification import Specification, check_kernel, check_points, check_promise
from quernel.kernels.clustering import cluster_means, kmeans
from quernel.kernels.kernel_herding import KernelHerding
from quernel.kernels.random_features import RandomFourierFeatures
from quernel.kernels.statistics.mmd import median_gamma

# Steps of Lloyd's algorithm for the first points; what it leaves, the descent does.
_LLOYD = 20

Kernel = Literal["gaussian", "cosine"]


def _example() -> dict[str, Any]:
    return {"make": lambda: ReducedMeanEmbedding(3, rounds=1, random_state=0)}


@register(
    "rkme-model-search",
    pillar="kernels",
    contract="estimator",
    paper="2412.12232",
    status="stable",
    headline=False,
    example=_example,
)
class ReducedMeanEmbedding(Specification, SavedEstimator, BaseEstimator):
    """Summarise rows by a few weighted points whose mean embedding is close to theirs.

    Parameters
    ----------
    n_points : int, default=50
        Points M; at most as many as there are rows, at most some hundreds.
    kernel : {"gaussian", "cosine"}, default="gaussian"
        exp(-gamma |x - y|^2), or the cosine of the rows, which sees nothing but their mean direction.
    gamma : float or "median", default="median"
        "median" is ``median_gamma`` of the rows. Summaries that are to be compared need one gamma: compute it once on a
        public sample and give the number.
    simplex : bool, default=True
        Weights >= 0 with sum 1. Otherwise they are free, (K + 1e-6 I)^-1 c, a little closer, but may be negative.
    rounds : int, default=20
        Of points and weights; fewer are taken where E stands still. 0 leaves k-means with the best weights.
    encoder : str, default=""
        What made the rows, e.g. by ``encoder_fingerprint``; summaries of different encoders are not compared.
    measure_error : bool, default=True
        Compute E with its constant, N^2 d / 2 multiply-adds once; without, ``error_`` is None and ``history_`` is
        shifted by it.
    random_state : int, Generator or None, default=None
        Which rows k-means starts from.

    Attributes
    ----------
    z_ : array, shape (M, d)
        The points, in the dtype of the rows; also ``z``.
    beta_ : array, shape (M,), float64
        Their weights; also ``beta``.
    gamma_ : float
    error_ : float or None
        E at the end; its root is the maximum mean discrepancy to all rows.
    history_ : array, shape (r,)
        E of the k-means centres with the shares of their clusters, with the best weights, and after each round.
    n_rows_ : int
        Rows that are summarised, 0 where that is private.
    epsilon_, delta_ : float or None
    neighbours_ : {"add_remove", "replace"} or None
        Of the release that the points were made from (``from_mean_features``).

    References
    ----------
    Wu, Xu, Liu, Zhou, "Model Reuse with Reduced Kernel Mean Embedding Specification", arXiv 2001.07135, 2020.
    Zhou, Guo, Song, Li, "You Only Submit One Image to Find the Most Suitable Generative Model", arXiv 2412.12232, 2024.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((500, 2))
    >>> spec = ReducedMeanEmbedding(20, random_state=0).fit(x)
    >>> spec.z.shape, bool(spec.error_ < spec.history_[0] / 4), round(float(spec.beta.sum()), 9)
    ((20, 2), True, 1.0)
    """

    _state: ClassVar[Mapping[str, str]] = {
        "z_": "m d",
        "beta_": "m",
        "gamma_": "float",
        "error_": "float ?",
        "history_": "r",
        "n_rows_": "int",
        "epsilon_": "float ?",
        "delta_": "float ?",
        "neighbours_": "text ?",
    }

    def __init__(
        self,
        n_points: int = 50,
        *,
        kernel: Kernel = "gaussian",
        gamma: float | Literal["median"] = "median",
        simplex: bool = True,
        rounds: int = 20,
        encoder: str = "",
        measure_error: bool = True,
        random_state: Seed = None,
    ) -> None:
        self.n_points = n_points
        self.kernel = kernel
        self.gamma = gamma
        self.simplex = simplex
        self.rounds = rounds
        self.encoder = encoder
        self.measure_error = measure_error
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_int("n_points", self.n_points, low=1)
        check_kernel(self.kernel, self.gamma)
        check_bool("simplex", self.simplex)
        check_int("rounds", self.rounds, low=0)
        check_type("encoder", self.encoder, str)
        check_bool("measure_error", self.measure_error)
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        check_points(self)
        if len(self.z_) > self.n_points or (len(self.z_) < self.n_points and self.epsilon_ is None):
            raise QuernelError(f"z_ has {len(self.z_)} points, n_points={self.n_points}")
        if self.gamma not in ("median", self.gamma_):
            raise QuernelError(f"gamma_ is {self.gamma_}, the parameter gamma {self.gamma}")

    def fit(self, X: ArrayLike, y: object = None, *, progress: Progress | None = None) -> Self:
        """Summarise the rows of ``X``, shape (N, d); ``y`` is ignored.

        Parameters
        ----------
        X : array, shape (N, d)
            float32 or float64; never changed.
        y : ignored
        progress : callable, optional
            ``progress(message, fraction)`` after each round.

        Raises
        ------
        QuernelError
            If there are fewer rows than points, a row is 0 where the kernel is the cosine, or a value not finite.
        """
        self.check_params()
        self._reduce(validate_data(self, X, dtype=FLOATS), progress)
        return self

    @classmethod
    def from_mean_features(
        cls,
        mean: ArrayLike,
        feature_map: RandomFourierFeatures,
        candidates: ArrayLike,
        *,
        privacy: Mapping[str, Any],
        n_points: int = 50,
        encoder: str = "",
    ) -> Self:
        """Make a summary from a released mean of random features, without the rows.

        Points are chosen among the candidates by herding towards the mean, weights by the simplex problem in feature
        space. Both look at nothing but the released mean and public things, so the privacy is that of the release.

        Parameters
        ----------
        mean : array, shape (n_features,)
            The released mean of ``feature_map.transform`` over the rows, with its noise.
        feature_map : RandomFourierFeatures
            Fitted without the rows, with a number as gamma, which is that of the summary too.
        candidates : array, shape (m, d)
            Public rows, m >= n_points.
        privacy : mapping
            That of the release, such as of ``quernel.sketch.dp.release_vector_sum``: "epsilon" > 0, "delta" in [0, 1)
            and "neighbours" are recorded, a "status" other than "private" is refused. It is believed.
        n_points : int, default=50
        encoder : str, default=""

        Returns
        -------
        summary : estimator, fitted
            Its ``error_`` is None: the distance to the rows is not known. Fewer than n_points points where herding
            meets fewer different candidates.

        Raises
        ------
        QuernelError
            If ``privacy`` does not say what it must, its noise was not private, the width of the kernel may come from
            the rows, or shapes do not fit.
        """
        check_type("feature_map", feature_map, RandomFourierFeatures)
        check_is_fitted(feature_map)
        terms = check_type("privacy", privacy, Mapping)
        if not {"epsilon", "delta", "neighbours", "status"} <= set(terms):
            raise QuernelError(
                f"privacy must say epsilon, delta, neighbours and status of the release; got {sorted(terms)}"
            )
        if terms["status"] != "private":
            raise QuernelError(f"privacy must be that of a private release; its status is {terms['status']!r}")
        if isinstance(feature_map.gamma, str):
            raise QuernelError(
                f"feature_map must have a number as gamma; got {feature_map.gamma!r}, which comes from the rows it was "
                "fitted to"
            )
        made = cls(n_points, gamma=float(feature_map.gamma_), encoder=encoder)
        made.check_params()
        rows = validate_data(made, candidates, dtype=FLOATS)
        features = np.asarray(feature_map.transform(rows), np.float64)
        target = np.asarray(mean, np.float64)
        if target.shape != features.shape[1:]:
            raise QuernelError(f"mean must have shape {features.shape[1:]}, as the features; got {target.shape}")
        check_finite("mean", target)
        # Some are chosen several times: a few rounds more find enough different ones.
        herding = KernelHerding(4 * n_points, feature_map="passthrough").fit(features, mean=target)
        chosen = np.array(list(dict.fromkeys(herding.indices_.tolist()))[:n_points])
        picked = torch.from_numpy(features[chosen])
        beta = best_weights(picked @ picked.T, picked @ torch.from_numpy(target), None, simplex=True)
        made._keep(rows[chosen], beta, [float((beta @ picked - torch.from_numpy(target)).square().sum())])
        made.gamma_, made.error_, made.n_rows_ = float(feature_map.gamma_), None, 0
        made.epsilon_, made.delta_, made.neighbours_ = (terms[name] for name in ("epsilon", "delta", "neighbours"))
        check_promise(made)
        return made

    def _reduce(self, x: Floats, progress: Progress | None) -> Tensor:
        """Fit, and return the cluster of each row by k-means in the order of the points."""
        check_progress(progress)
        if len(x) < self.n_points:
            raise QuernelError(f"n_points={self.n_points} needs at least as many rows; got n_samples={len(x)}")
        if self.kernel == "cosine" and not np.abs(x).max(1).all():
            raise QuernelError("X holds a row of zeros, which has no direction for the cosine")
        self.gamma_ = self._gamma(x)
        target = mean_target(x, self.kernel, self.gamma_)
        assignment, z, shares = self._start(target)
        constant = target.constant() if self.measure_error else 0.0
        told = None if progress is None else _Told(progress)
        with one_blas_thread:
            z, beta, history = alternate(
                target, z, shares, rounds=self.rounds, simplex=self.simplex, constant=constant, told=told
            )
        self._keep(target.outside(z).astype(x.dtype), beta, history)
        # Of numbers whose difference may be all rounding; a squared distance is not negative.
        self.error_ = max(0.0, history[-1]) if self.measure_error else None
        self.n_rows_, self.epsilon_, self.delta_, self.neighbours_ = len(x), None, None, None
        return assignment

    def _keep(self, z: Floats, beta: Tensor, history: list[float]) -> None:
        self.z_, self.beta_ = z, np.array(beta.numpy(), np.float64)
        self.history_ = np.array(history)

    def _gamma(self, x: Floats) -> float:
        if self.gamma != "median":
            return float(self.gamma)
        return median_gamma(x, random_state=0) if self.kernel == "gaussian" and len(x) > 1 else 1.0

    def _start(self, target: MeanTarget) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cluster of each row, the means and the shares of the clusters."""
        rows, m = target.rows, self.n_points
        order = torch.from_numpy(generator(self.random_state, "random_state").permutation(len(rows)))
        # Seeds are rows at even distances in their order, which is a random one here.
        found = kmeans(rows[order][None], m, iterations=_LLOYD, start="spaced")
        assignment = torch.empty_like(order)
        assignment[order] = found.assignment[0]
        z = cluster_means(rows[None], assignment[None], m)[0].double()
        counts = found.counts[0].double()
        # With fewer different rows than points some clusters are empty: any row will do, with no weight yet.
        empty = counts == 0
        z[empty] = rows[order[: int(empty.sum())]].double()
        # Directions that cancel leave no mean direction.
        flat = z.norm(dim=1) == 0 if self.kernel == "cosine" else torch.zeros(m, dtype=torch.bool)
        z[flat] = rows[order[: int(flat.sum())]].double()
        return assignment, z, counts / len(rows)


class _Told:
    """Passes rounds on as messages and fractions."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __call__(self, done: int, rounds: int) -> None:
        self.progress(f"round {done} of {rounds}", done / rounds)
