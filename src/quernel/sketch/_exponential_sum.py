"""``ExponentialSum``: kernels sum_i c_i exp(-t_i z) of a distance z, for those that no sampler is known for.

(1 + z)^-b = 1 / Gamma(b) * integral of t^(b - 1) e^(-t) e^(-t z) dt over t > 0; with t = e^s, the trapezoidal rule in s
converges exponentially. Random features of the terms, each scaled by c_i^1/2, are features of the sum: one vector of
length f(0)^1/2 and one release, where a release a term would split the privacy budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import gammaln

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.features import spectral_directions

Floats = NDArray[np.float64]
Distance = Literal["l2sq", "l2", "l1"]
_BASE: dict[str, Any] = {"l2sq": "gaussian", "l2": "exponential", "l1": "laplacian"}
_METRIC: dict[str, Any] = {"l2sq": "sqeuclidean", "l2": "euclidean", "l1": "cityblock"}


@dataclass(frozen=True)
class ExponentialSum:
    """The kernel f(z) = sum_i weights_i exp(-rates_i z), z the distance over the bandwidth (squared for "l2sq").

    Parameters
    ----------
    distance : {"l2sq", "l2", "l1"}
    weights, rates : sequences of floats
        Positive, equally many.

    Examples
    --------
    >>> kernel = ExponentialSum.power("l2sq", 2.0)
    >>> bool(abs(kernel(np.zeros((1, 1)), np.ones((1, 1)))[0, 0] - 0.25) < 1e-3)
    True
    """

    distance: Distance
    weights: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, tuple(_BASE))
        for name in ("weights", "rates"):
            held = tuple(check_float(name, v, low=0.0, open_low=True) for v in getattr(self, name))
            object.__setattr__(self, name, held)
        if not self.weights or len(self.weights) != len(self.rates):
            raise QuernelError(f"weights and rates must be equally many; got {len(self.weights)}, {len(self.rates)}")

    @classmethod
    def power(cls, distance: Distance, exponent: float, *, tolerance: float = 1e-3) -> ExponentialSum:
        """Return an approximation of (1 + z)^-exponent, off by at most about ``tolerance`` anywhere."""
        check_float("exponent", exponent, low=0.0, open_low=True)
        check_float("tolerance", tolerance, low=1e-12, high=0.5)
        # The integrand decays like e^(b s) on the left and e^(-e^s) on the right; the step that the rule needs shrinks
        # with the logarithm of the tolerance.
        left = math.log(tolerance * exponent / 4) / exponent - 1
        right = math.log(-math.log(tolerance / 100) + exponent * 4)
        step = 2 * math.pi * (math.pi / 2) / (-math.log(tolerance / 100) + 1) / 2
        s = np.arange(left, right + step, step)
        weights = step * np.exp(exponent * s - np.exp(s) - gammaln(exponent))
        kept = weights > tolerance * 1e-3 / len(s)
        return cls(distance, tuple(weights[kept].tolist()), tuple(np.exp(s[kept]).tolist()))

    @property
    def at_zero(self) -> float:
        """f(0), the sum of the weights."""
        return math.fsum(self.weights)

    def __call__(self, x: Floats, y: Floats, *, bandwidth: float = 1.0) -> Floats:
        """Return the exact kernel between rows, shape (n, m)."""
        z = cdist(np.asarray(x, np.float64), np.asarray(y, np.float64), _METRIC[self.distance])
        z /= bandwidth**2 if self.distance == "l2sq" else bandwidth
        total = np.zeros_like(z)
        for weight, rate in zip(self.weights, self.rates, strict=True):
            total += weight * np.exp(-rate * z)
        return total

    def directions(self, n: int, dim: int, *, bandwidth: float, seed: Seed) -> tuple[Floats, Floats]:
        """Draw directions (n, dim) and their amplitudes (n,), dealt to the terms by weight; at least one each."""
        check_int("n_features", n, low=len(self.weights))
        shares = np.asarray(self.weights) / self.at_zero * (n - len(self.weights))
        counts = 1 + np.floor(shares).astype(np.int64)
        # What rounding left over goes to the largest remainders.
        counts[np.argsort(np.floor(shares) - shares, kind="stable")[: n - int(counts.sum())]] += 1
        draw = generator(seed)
        base = spectral_directions(_BASE[self.distance], n, dim, bandwidth=bandwidth, seed=draw)
        rates = np.repeat(self.rates, counts)
        amplitudes = np.repeat(np.sqrt(np.asarray(self.weights) / counts), counts)
        return base * (np.sqrt(rates) if self.distance == "l2sq" else rates)[:, None], amplitudes

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"distance": self.distance, "weights": list(self.weights), "rates": list(self.rates)}
