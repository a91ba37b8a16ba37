"""``EnsemblePlan``: how many networks an average needs, so that rounding it applies a permutation without an error.

The average of N networks is Gaussian with the mean of ``permutation_moments`` and a variance of v_m / N; a coordinate
is wrong where it falls on the other side of a threshold tau_m, and all inputs are right with probability 1 - delta if

    sum_m C(k, m) [ m Q((on_m - tau_m) sqrt(N / v_m)) + (k - m) Q((tau_m - off_m) sqrt(N / v_m)) ] <= delta

with Q the Gaussian tail. tau = 0 is the paper's rounding by sign, tau_m = (on_m + off_m) / 2 ours: m is known from the
input. In logarithms, since C(k, m) is beyond floating point; a plan for k = 10,000 takes milliseconds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import gammaln, log_ndtr, logsumexp

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.ntk.kernel import PARAMETRIZATIONS, Parametrization
from quernel.kernels.ntk.moments import Doubles, permutation_moments

Scope = Literal["all", "input"]
Rounding = Literal["midpoint", "sign"]
Bound = Literal["exact", "union"]


@dataclass(frozen=True)
class EnsemblePlan:
    """The number of networks to average for a given probability of error.

    Parameters
    ----------
    k : int
        Bits, >= 2.
    delta : float, default=0.01
        Probability of an error, in (0, 1).
    scope : {"all", "input"}, default="all"
        An error on any of the 2^k - 1 inputs, or on one input, the worst.
    rounding : {"midpoint", "sign"}, default="midpoint"
        "midpoint" cuts halfway between the two means for the input's number of ones, "sign" at 0.
    bound : {"exact", "union"}, default="exact"
        "exact" sums the Gaussian tails of all coordinates; "union" is the paper's, 2 v / g^2 log(coordinates / delta)
        with the smallest margin g of any input: quadratic in k for all inputs, and loose.
    parametrization : {"ntk", "standard"}, default="ntk"
        See ``NTKernel``.
    ones : int, optional
        Plan for inputs with so many ones only, 2 to k.

    Raises
    ------
    QuernelError
        If a parameter is no good.

    Notes
    -----
    Training vectors, m = 1, are known exactly and left out. So is m = k with ``rounding="midpoint"``: no coordinate
    should be 0 there, the answer is all ones. The networks are taken as infinitely wide and fully trained.

    References
    ----------
    "Exact learning of permutations for nonzero binary inputs", arXiv 2502.16763, 2025. The midpoint and the
    exact sum are additions.

    Examples
    --------
    >>> EnsemblePlan(10, rounding="sign").n_models > 20 * EnsemblePlan(10).n_models
    True
    """

    k: int
    delta: float = 0.01
    scope: Scope = "all"
    rounding: Rounding = "midpoint"
    bound: Bound = "exact"
    parametrization: Parametrization = "ntk"
    ones: int | None = None

    def __post_init__(self) -> None:
        check_int("k", self.k, low=2)
        check_float("delta", self.delta, low=0.0, high=1.0, open_low=True, open_high=True)
        check_choice("scope", self.scope, ("all", "input"))
        check_choice("rounding", self.rounding, ("midpoint", "sign"))
        check_choice("bound", self.bound, ("exact", "union"))
        check_choice("parametrization", self.parametrization, PARAMETRIZATIONS)
        if self.ones is not None:
            check_int("ones", self.ones, low=2, high=self.k)

    @functools.cached_property
    def n_models(self) -> int:
        """The least number of models that keeps the probability of an error at or below ``delta``."""
        signals = self._signals
        if signals is None:
            return 1
        if self.bound == "union":
            inputs = self._log_inputs if self.scope == "all" else 0.0
            log_events = math.log(self.k) + inputs - math.log(self.delta)
            return max(1, math.ceil(2 * log_events / float(signals.worst.min()) ** 2))
        low, high = 0, 1
        while self.log_failure(high) > math.log(self.delta):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.log_failure(middle) > math.log(self.delta) else (low, middle)
        return high

    def log_failure(self, n_models: int) -> float:
        """Return the logarithm of the expected number of wrong coordinates, which bounds the probability of an error.

        Over all inputs, or of the worst one, as ``scope`` says; ``bound`` makes no difference.

        Examples
        --------
        >>> plan = EnsemblePlan(10)
        >>> plan.log_failure(plan.n_models) <= math.log(plan.delta) < plan.log_failure(plan.n_models - 1)
        True
        """
        signals = self._signals
        check_int("n_models", n_models, low=1)
        if signals is None:
            return -math.inf
        root = math.sqrt(n_models)
        with np.errstate(divide="ignore"):  # no coordinate is off where all bits are set
            wrong = np.logaddexp(
                np.log(signals.ones) + log_ndtr(-root * signals.on),
                np.log(self.k - signals.ones) + log_ndtr(-root * signals.off),
            )
        return float(wrong.max() if self.scope == "input" else logsumexp(wrong + self._log_counts(signals.ones)))

    @functools.cached_property
    def _signals(self) -> _Signals | None:
        """Return margins over one network's standard deviation, or None where no input is left to plan for."""
        last = self.k if self.rounding == "sign" else self.k - 1
        ones = np.arange(2, last + 1) if self.ones is None else np.array([self.ones])
        ones = ones[ones <= last]
        if not len(ones):
            return None
        moments = permutation_moments(self.k, ones, parametrization=self.parametrization)
        cut = thresholds(moments.mean_on, moments.mean_off, self.rounding)
        spread = np.sqrt(moments.variance)
        return _Signals(ones.astype(np.float64), (moments.mean_on - cut) / spread, (cut - moments.mean_off) / spread)

    @property
    def _log_inputs(self) -> float:
        """Return the logarithm of the number of inputs planned for; the paper counts all 2^k."""
        if self.ones is None:
            return self.k * math.log(2)
        return float(self._log_counts(np.array([float(self.ones)]))[0])

    def _log_counts(self, ones: Doubles) -> Doubles:
        """Return log C(k, m)."""
        counts: Doubles = gammaln(self.k + 1) - gammaln(ones + 1) - gammaln(self.k - ones + 1)
        return counts


@dataclass(frozen=True)
class _Signals:
    """Numbers of ones, and the margins of coordinates that should be 1 and 0, in standard deviations of a network."""

    ones: Doubles
    on: Doubles
    off: Doubles

    @property
    def worst(self) -> Doubles:
        """The smaller margin of each number of ones."""
        return np.minimum(self.on, self.off)


def thresholds(mean_on: Doubles, mean_off: Doubles, rounding: Rounding) -> Doubles:
    """Return where to cut the outputs: halfway, or at 0."""
    if rounding not in ("midpoint", "sign"):
        raise QuernelError(f"rounding must be 'midpoint' or 'sign'; got {rounding!r}")
    return (mean_on + mean_off) / 2 if rounding == "midpoint" else np.zeros_like(mean_on)
