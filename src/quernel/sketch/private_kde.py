"""``PrivateKDE``: kernel sums over private rows, released once, asked any number of times (arXiv 2403.08917).

Random features of unit length, phi(x).phi(y) = k(x, y) in the mean, turn sum_i k(x_i, y) into phi(y).v with v the sum
of phi(x_i). One record moves v by 1 in L2 and sqrt(2 J) in L1, so v is released with noise on an integer lattice; since
|phi(y)| = 1, Gaussian noise of standard deviation sigma moves every answer by sigma, whatever J is. Smooth kernels such
as 1 / (1 + |x - y|^2) are mixtures of exponential ones and sampled as such: one release, no split of the budget.
Cost: d J multiply-adds a row or query (k J after a public projection to k coordinates), 8 J bytes published.
"""

from __future__ import annotations

import functools
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_bool, check_finite, check_float, check_int
from quernel.kernels.features import ShiftInvariant
from quernel.sketch._exponential_sum import ExponentialSum
from quernel.sketch._feature_maps import SpectralMap, check_bandwidth, kernel_from_json, kernel_to_json
from quernel.sketch.dp.domain import Domain, checked_rows, domain_from_json
from quernel.sketch.dp.mechanism import Neighbours, Sensitivity
from quernel.sketch.dp.noise import Integers
from quernel.sketch.dp.structure import PrivateStructure, PublicRelease
from quernel.sketch.dp.terms import PrivacyTerms
from quernel.sketch.dp.vector_sum import GRAIN, count_steps

# Gaussian noise is the same for any number of frequencies, so there are many; pure noise grows with them.
MOST_FEATURES, LEAST_FEATURES = 4096, 64


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable", headline=False)
class PublicKDE(PublicRelease):
    """A private kernel sum that may be published; ``PrivateKDE.release`` makes it.

    Attributes
    ----------
    n_rows : float or None
        Number of private rows: exact where it is public ("replace"), noisy where it was counted, else None.
    privacy : dict
        Epsilon, delta, neighbours, mechanism, sensitivity, scale, number of released coordinates.
    noise_std : float
        Standard deviation of the noise in every answer.
    """

    def __init__(
        self,
        kernel: Any,
        bandwidth: float,
        n_features: int,
        dim: int,
        jl_dim: int | None,
        feature_seed: int,
        n_rows: float | None,
        privacy: dict[str, Any],
    ) -> None:
        self.map = SpectralMap(kernel_from_json(kernel), bandwidth, n_features, dim, jl_dim, feature_seed)
        self.n_rows = None if n_rows is None else check_float("n_rows", n_rows)
        self.privacy = privacy
        self.values = np.zeros(2 * n_features, np.float32)

    def query(self, y: ArrayLike, *, mean: bool = False, clip: bool = False) -> NDArray[np.float64]:
        """Return kernel sums over the private rows; costs no privacy.

        Parameters
        ----------
        y : array, shape (n, dim)
            Queries; float32 is computed in float32.
        mean : bool, default=False
            Divide by the number of rows, at least 1.
        clip : bool, default=False
            Raise negative answers to 0. What is left is biased upwards.

        Returns
        -------
        sums : array, shape (n,), float64
            Unbiased, over feature directions and noise.
        """
        rows = checked_rows("y", y, self.map.dim)
        check_bool("mean", mean)
        answers = self.map.dots(rows, self.values[None].astype(np.float64))[:, 0]
        if mean:
            if self.n_rows is None:
                raise QuernelError("the number of rows was not released; give PrivateKDE a count_weight > 0")
            answers = answers / max(self.n_rows, 1.0)
        return np.maximum(answers, 0.0) if check_bool("clip", clip) else answers

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        m = self.map
        return {
            "kernel": kernel_to_json(m.kernel),
            "bandwidth": m.bandwidth,
            "n_features": m.n_features,
            "dim": m.dim,
            "jl_dim": m.jl_dim,
            "feature_seed": m.seed,
            "n_rows": self.n_rows,
            "privacy": self.privacy,
        }

    def _arrays(self) -> Arrays:
        return {"values": self.values}

    def _restore(self, arrays: Arrays) -> None:
        self.values = take(arrays, "values", np.float32, (2 * self.map.n_features,))
        check_finite("array 'values'", self.values)


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable")
class PrivateKDE(PrivateStructure):
    """Publish a kernel density of private rows with differential privacy, to be queried for ever.

    Parameters
    ----------
    kernel : str or ExponentialSum, default="gaussian"
        "gaussian" exp(-|x-y|^2/s^2), "laplacian" exp(-|x-y|_1/s), "exponential" exp(-|x-y|/s), "inverse-square"
        1/(1+|x-y|^2/s^2), "inverse-l2" 1/(1+|x-y|/s), "inverse-l1" 1/(1+|x-y|_1/s), with s the bandwidth; or a sum of
        exponentials of a distance.
    bandwidth : float, default=1.0
        A number known without looking at the rows; rules such as "median" are refused.
    epsilon : float, default=1.0
    delta : float, default=1e-6
    neighbours : {"add_remove", "replace"}, default="add_remove"
    mechanism : {"auto", "gaussian", "laplace", "l2gamma"}, default="auto"
        See ``quernel.sketch.dp.calibrate``.
    n_features : int or None, default=4096
        Frequencies J: an answer is off by about n / sqrt(2 J) from its features. None: 4096 with delta > 0; with
        delta = 0, where noise grows like sqrt(J), ``expected_rows * epsilon / 2`` within 64 and 4096.
    expected_rows : int, optional
        A public guess, for ``n_features=None``; the true number would be a leak.
    jl_dim : int, optional
        Project rows and queries to so many coordinates first, by a public random map: for Euclidean kernels and more
        than some 256 columns, answers change by about n / sqrt(jl_dim) / e and cost less.
    domain : Ball, Box or None, default=None
        Where rows may lie. The guarantee does not need it: features have length 1 anywhere.
    clip : bool, default=False
        Move rows outside the domain into it instead of refusing them.
    count_weight : float, default=0.1
        What a row adds to a coordinate that counts rows, for means; costs half a percent of noise. 0 leaves it out.
    feature_seed : int, default=0
        Of the random features; public, saved with the release.
    dim : int, optional
        Columns; learnt from the first rows (it is public), needed for releasing without any.
    unsafe_float, insecure_noise_seed
        See ``quernel.sketch.dp.PrivacyTerms``.

    References
    ----------
    Backurs, Lin, Mahabadi, Silwal, Tarnawski, "Efficiently Computing Similarities to Private Datasets",
    arXiv 2403.08917, 2024; Wagner, Naaman, Mishra, "Fast Private Kernel Density Estimation via Locality Sensitive
    Quantization", arXiv 2307.01877, 2023.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((5000, 2))
    >>> kde = PrivateKDE(epsilon=1.0, n_features=512, insecure_noise_seed=0)  # leave the seed out to be private
    >>> release = kde.partial_fit(x).release()
    >>> near, far = release.query([[0.0, 0.0], [9.0, 9.0]], mean=True)
    >>> bool(near > 0.15), bool(abs(far) < 0.05), release.privacy["neighbours"]
    (True, True, 'add_remove')
    """

    def __init__(
        self,
        kernel: ShiftInvariant | ExponentialSum = "gaussian",
        *,
        bandwidth: float = 1.0,
        epsilon: float = 1.0,
        delta: float = 1e-6,
        neighbours: Neighbours = "add_remove",
        mechanism: str = "auto",
        n_features: int | None = MOST_FEATURES,
        expected_rows: int | None = None,
        jl_dim: int | None = None,
        domain: Domain | None = None,
        clip: bool = False,
        count_weight: float = 0.1,
        feature_seed: int = 0,
        dim: int | None = None,
        unsafe_float: bool = False,
        insecure_noise_seed: int | None = None,
    ) -> None:
        super().__init__(PrivacyTerms(epsilon, delta, neighbours, mechanism, unsafe_float, insecure_noise_seed))
        self.kernel, self.bandwidth = kernel, check_bandwidth(bandwidth)
        self.n_features = chosen_features(n_features, expected_rows, epsilon, delta)
        self.jl_dim, self.feature_seed = jl_dim, feature_seed
        self.domain, self.clip = domain_from_json(domain), check_bool("clip", clip)
        if clip and domain is None:
            raise QuernelError("clip=True needs a domain to move rows into, e.g. domain=Ball(1.0)")
        self.count_weight = count_weight
        # Under "replace" everybody knows how many rows there are.
        self._count_steps = 0 if neighbours == "replace" else count_steps(count_weight)
        self.dim = None if dim is None else check_int("dim", dim, low=1)
        self._total = np.zeros((1, 2 * self.n_features), np.int64)
        self._rows = 0
        # Bad settings should fail here, not at the first row.
        SpectralMap(kernel, bandwidth, self.n_features, self.dim or 1, jl_dim, feature_seed)

    @property
    def grain(self) -> float:
        """What one step of the sums stands for."""
        return GRAIN

    def partial_fit(self, X: ArrayLike, y: object = None) -> Self:
        """Add rows (n, dim); ``y`` is ignored. If anything is wrong with one, none is added."""
        rows = checked_rows("X", X, self.dim)
        if self.domain is not None:
            rows = self.domain.applied("X", rows, clip=self.clip)
        self.dim = rows.shape[1]
        self._map.add(rows, np.zeros(len(rows), np.int64), self._total)
        self._rows += len(rows)
        return self

    def sensitivity(self) -> Sensitivity:
        """Return how far the sums move between neighbours."""
        count = self._count_steps * GRAIN
        twice = 1 + (self.terms.neighbours == "replace")
        return Sensitivity.on_lattice(
            twice * self._map.l1 + count,
            float(np.hypot(twice * self._map.l2, count)),
            n_coords=self._map.n_coords + (self._count_steps > 0),
            grain=GRAIN,
            neighbours=self.terms.neighbours,
        )

    def config(self) -> dict[str, Any]:
        """Return what two structures must agree on to be merged."""
        return {
            "kernel": kernel_to_json(self.kernel),
            "bandwidth": self.bandwidth,
            "n_features": self.n_features,
            "jl_dim": self.jl_dim,
            "domain": None if self.domain is None else self.domain.to_json(),
            "clip": self.clip,
            "count_weight": self.count_weight,
            "feature_seed": self.feature_seed,
            "dim": self.dim,
            **self.terms.to_json(),
        }

    @functools.cached_property
    def _map(self) -> SpectralMap:
        if self.dim is None:
            raise QuernelError("dim is unknown: give rows to partial_fit first, or dim= to the constructor")
        return SpectralMap(self.kernel, self.bandwidth, self.n_features, self.dim, self.jl_dim, self.feature_seed)

    def _sums(self) -> Integers:
        count = [self._rows * self._count_steps] if self._count_steps else []
        return np.concatenate((self._total[0], np.array(count, np.int64)))

    def _add(self, other: Self) -> None:
        self._total += other._total
        self._rows += other._rows

    def _forget(self) -> None:
        self._total, self._rows = np.zeros_like(self._total), 0

    def _published(self, values: NDArray[np.float64], privacy: dict[str, Any]) -> PublicKDE:
        n_rows = None
        if self.terms.neighbours == "replace":
            n_rows = float(self._rows)
        elif self._count_steps:
            n_rows = float(values[-1]) / (self._count_steps * GRAIN)
        settings = {
            k: v for k, v in self.config().items() if k in ("kernel", "bandwidth", "n_features", "dim", "jl_dim")
        }
        made = PublicKDE(**settings, feature_seed=self.feature_seed, n_rows=n_rows, privacy=privacy)
        # Rounding to float32 comes after the noise, and halves what is published.
        made.values = values[: self._map.n_coords].astype(np.float32)
        return made


def chosen_features(n_features: int | None, expected_rows: int | None, epsilon: float, delta: float) -> int:
    """Return a number of frequencies that follows from public numbers alone."""
    if expected_rows is not None:
        check_int("expected_rows", expected_rows, low=1)
    if n_features is not None:
        return check_int("n_features", n_features, low=1)
    if delta > 0:
        return MOST_FEATURES
    if expected_rows is None:
        raise QuernelError(
            "n_features=None with delta=0 needs expected_rows, a public guess of how many rows there will be: "
            "noise grows with the number of features, and the best one is about expected_rows * epsilon / 2"
        )
    best = round(expected_rows * epsilon / 2)
    return min(max(best, LEAST_FEATURES), MOST_FEATURES)
