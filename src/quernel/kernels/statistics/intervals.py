"""Confidence intervals for what reports claim: metric differences, proportions, rank correlations.

Scores of two models on the same samples are compared by a paired bootstrap, which resamples the samples
(not the scores), so that whatever both find hard cancels. Proportions have an exact interval
(Clopper-Pearson: never below its level) and a shorter one (Wilson: right on average). Everything is
deterministic for a given seed. Cost of a bootstrap: ``resamples`` evaluations of the metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int

# Rows of resampled indices made at once: bounds the memory of a bootstrap over a large sample.
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    level: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A difference with its interval, and the two-sided p-value of no difference."""

    p_value: float


def paired_bootstrap(
    a: Any,
    b: Any | None = None,
    *,
    metric: Callable[..., float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Return how much better ``a`` is than ``b`` on the same samples, with a bootstrap interval.

    Parameters
    ----------
    a, b : array, shape (n,) or (n, ...)
        Outcomes of two models, row i of both from sample i. Without ``b``, ``a`` holds differences.
    metric : callable, optional
        ``metric(rows) -> float`` over resampled rows of ``a`` and of ``b``, for metrics that are no mean
        (rank correlation, F1): pass what it needs, e.g. predictions and labels side by side. Default:
        the mean of the rows.
    level : float, default=0.95
        Confidence, in (0, 1).
    resamples : int, default=2000
        Number of bootstrap samples, at least 100.
    seed : int, default=0
        Of the resampling.

    Returns
    -------
    difference : PairedDifference
        ``metric(a) - metric(b)``; percentile interval; p-value with the observed sample counted in.

    Raises
    ------
    QuernelError
        If the two have different lengths or fewer than 2 rows, or hold NaN or infinity.

    References
    ----------
    Efron, Tibshirani, "An introduction to the bootstrap", 1993, chapter 13 and 16.

    Examples
    --------
    >>> correct_a, correct_b = np.array([1, 1, 1, 0] * 50), np.array([1, 0, 1, 0] * 50)
    >>> result = paired_bootstrap(correct_a, correct_b)
    >>> result.estimate, result.low > 0
    (0.25, True)
    """
    check_float("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
    check_int("resamples", resamples, low=100)
    first = _sample("a", a)
    second = None if b is None else _sample("b", b)
    if second is not None and len(second) != len(first):
        raise QuernelError(f"a and b must describe the same samples; got {len(first)} and {len(second)} rows")
    if metric is None:
        rows = first if second is None else first - second
        if rows.ndim != 1:
            raise QuernelError(f"without metric= the rows must be numbers, shape (n,); got {rows.shape}")
        estimate = float(rows.mean())
        draws = _bootstrap(len(rows), resamples, seed, lambda index: rows[index].mean(1))
    else:
        difference = _difference(metric, first, second)
        estimate = difference(np.arange(len(first)))
        draws = _bootstrap(len(first), resamples, seed, lambda index: np.array([difference(row) for row in index]))
    if not math.isfinite(estimate) or not np.isfinite(draws).all():
        raise QuernelError("metric must be finite on every resample; got NaN or infinity (a constant sample?)")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # Zero's place among the draws; the observed sample counts as one more, so that p is never 0.
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p_value = min(1.0, 2.0 * (1 + int(tail)) / (1 + resamples))
    return PairedDifference(estimate, float(low), float(high), level, p_value)


def clopper_pearson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Return the exact interval of a proportion; its coverage is never below ``level``.

    Parameters
    ----------
    successes, trials : int
        Counts, ``0 <= successes <= trials``, ``trials >= 1``.
    level : float, default=0.95
        Confidence, in (0, 1).

    Returns
    -------
    interval : Interval
        Of the probability of success, within [0, 1].

    References
    ----------
    Clopper, Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.

    Examples
    --------
    >>> interval = clopper_pearson(0, 10)
    >>> interval.low, round(interval.high, 4)
    (0.0, 0.3085)
    """
    from scipy.special import betaincinv

    k, n, tail = _counts(successes, trials, level)
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return Interval(k / n, low, high, level)


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a proportion; shorter than the exact one, right on average.

    Parameters
    ----------
    successes, trials, level
        As in ``clopper_pearson``.

    Returns
    -------
    interval : Interval
        Of the probability of success, within [0, 1].

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Examples
    --------
    >>> interval = wilson(8, 10)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.4902, 0.9433)
    """
    k, n, tail = _counts(successes, trials, level)
    z = _normal_quantile(1 - tail)
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the formula is exact up to rounding only.
    return Interval(p, 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half, level)


def rank_correlation(
    x: Any,
    y: Any,
    *,
    level: float = 0.95,
    method: Literal["fisher", "bootstrap"] = "fisher",
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return Spearman's rank correlation of two samples with its interval.

    Parameters
    ----------
    x, y : array, shape (n,)
        Paired values, n >= 4; ties get their mean rank.
    level : float, default=0.95
        Confidence, in (0, 1).
    method : {"fisher", "bootstrap"}, default="fisher"
        ``"fisher"``: ``tanh(atanh(r) +- z sqrt((1 + r^2 / 2) / (n - 3)))``, instant. ``"bootstrap"``:
        percentiles over resampled pairs, for many ties or n < 20.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    interval : Interval
        Of the correlation, within [-1, 1].

    Raises
    ------
    QuernelError
        If lengths differ, a value is not finite, or one sample is constant.

    References
    ----------
    Bonett, Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations", 2000.

    Examples
    --------
    >>> rank_correlation(np.arange(50), np.arange(50) ** 3).estimate
    1.0
    """
    check_choice("method", method, ("fisher", "bootstrap"))
    check_float("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
    check_int("resamples", resamples, low=100)
    first, second = _sample("x", x), _sample("y", y)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 4:
        raise QuernelError(f"x and y must be paired values, shape (n,), n >= 4; got {first.shape} and {second.shape}")
    estimate = _spearman(first, second)
    if math.isnan(estimate):
        raise QuernelError("a rank correlation needs two samples that vary; x or y is constant")
    if method == "fisher":
        # atanh(1) is infinite; an exact correlation keeps a degenerate interval at its own value.
        centre = math.atanh(min(max(estimate, -1 + 1e-15), 1 - 1e-15))
        half = _normal_quantile((1 + level) / 2) * math.sqrt((1 + estimate**2 / 2) / (len(first) - 3))
        low, high = math.tanh(centre - half), math.tanh(centre + half)
    else:
        draws = _bootstrap(
            len(first), resamples, seed, lambda index: np.array([_spearman(first[row], second[row]) for row in index])
        )
        # A resample that is constant by chance has no correlation; it says nothing and is left out.
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(min(low, estimate)), float(max(high, estimate)), level)


def _difference(
    metric: Callable[..., float], first: np.ndarray, second: np.ndarray | None
) -> Callable[[np.ndarray], float]:
    if second is None:
        return lambda index: float(metric(first[index]))
    return lambda index: float(metric(first[index])) - float(metric(second[index]))


def _bootstrap(n: int, resamples: int, seed: int, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    generator = _random.generator(seed)
    block = max(1, _BLOCK_ELEMENTS // n)
    parts = [
        statistic(generator.integers(0, n, size=(min(block, resamples - start), n)))
        for start in range(0, resamples, block)
    ]
    return np.concatenate(parts)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.stats import rankdata

    a, b = rankdata(x) - (len(x) + 1) / 2, rankdata(y) - (len(y) + 1) / 2
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else math.nan


def _sample(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim == 0 or len(array) < 2:
        raise QuernelError(f"{name} must hold numbers, at least 2 rows; got {array.dtype}, shape {array.shape}")
    array = array.astype(np.float64)
    check_finite(name, array)
    return array


def _counts(successes: int, trials: int, level: float) -> tuple[int, int, float]:
    n = check_int("trials", trials, low=1)
    k = check_int("successes", successes, low=0, high=n)
    return k, n, (1 - check_float("level", level, low=0.0, high=1.0, open_low=True, open_high=True)) / 2


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
