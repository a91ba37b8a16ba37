"""Tests of random results, each with a stated rate of false alarms.

A random check that is right fails with probability ``alpha``, 1e-6 by default: one false alarm in a million runs, so a
failure is a fact, and a loose tolerance is never needed. Each function raises ``ConformanceError`` with the p-value.
Tests with fixed seeds use them too: the seed makes the outcome repeatable, the rate says that it was not picked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._validate import check_int, check_probability
from quernel.testing._suite import ConformanceError

ALPHA = 1e-6
# Chi-square needs about five expected counts a cell; rarer cells are joined.
_LEAST_EXPECTED = 5.0


def require_mean(samples: ArrayLike, expected: ArrayLike, *, alpha: float = ALPHA) -> None:
    """Require that independent samples have the expected mean, by a two-sided t test (z for large samples).

    Parameters
    ----------
    samples : array, shape (n, ...)
        n >= 30 independent samples of anything; every entry is tested, the rate is shared among them.
    expected : array, shape (...)
    alpha : float
        Probability that all entries right raise anyway.

    Raises
    ------
    ConformanceError
        If one entry is further off than chance allows.
    """
    x = np.asarray(samples, np.float64)
    _check(x, 30, alpha)
    wanted = np.broadcast_to(np.asarray(expected, np.float64), x.shape[1:])
    error = x.std(0, ddof=1) / np.sqrt(len(x))
    off = np.abs(x.mean(0) - wanted)
    # A constant sample has no error but rounding.
    exact = error <= 1e-12 * np.maximum(np.abs(wanted), 1e-300)
    t = np.where(exact, np.where(off <= 1e-9 * (1 + np.abs(wanted)), 0.0, np.inf), off / np.where(exact, 1.0, error))
    p = 2 * stats.t.sf(t, len(x) - 1)
    _judge("mean", p, alpha, f"largest deviation is {float(np.max(t)):.2f} standard errors")


def require_frequencies(counts: ArrayLike, probabilities: ArrayLike, *, alpha: float = ALPHA) -> None:
    """Require that counts come from a distribution over finitely many outcomes, by Pearson's chi-square test.

    Parameters
    ----------
    counts : array of int, shape (k,)
    probabilities : array, shape (k,)
        Sum to 1. Outcomes expected fewer than five times are joined; one of probability 0 must not occur.
    """
    seen, share = np.asarray(counts, np.float64).ravel(), np.asarray(probabilities, np.float64).ravel()
    if seen.shape != share.shape or abs(share.sum() - 1) > 1e-9 or (share < -1e-12).any():
        raise QuernelError("probabilities must be as many as counts, not negative, and sum to 1")
    check_probability("alpha", alpha)
    if (seen[share <= 1e-12] > 0).any():
        raise ConformanceError("an outcome of probability 0 occurred")
    order = np.argsort(share)
    groups = _joined(share[order] * seen.sum())
    observed = np.bincount(groups, seen[order])
    wanted = np.bincount(groups, share[order]) * seen.sum()
    if len(wanted) < 2:
        raise QuernelError(f"{int(seen.sum())} samples are too few to test {len(share)} outcomes")
    p = stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue
    _judge("frequencies", p, alpha, f"chi-square over {len(wanted)} cells")


def require_distribution(samples: ArrayLike, cdf: Callable[[np.ndarray], Any], *, alpha: float = ALPHA) -> None:
    """Require that samples (n,) have a continuous distribution, by the Kolmogorov-Smirnov test."""
    x = np.asarray(samples, np.float64).ravel()
    _check(x, 10, alpha)
    result = stats.kstest(x, cdf)
    _judge("distribution", result.pvalue, alpha, f"largest gap between distribution functions {result.statistic:.4f}")


def require_proportion(successes: int, trials: int, probability: float, *, alpha: float = ALPHA) -> None:
    """Require that successes in independent trials have a probability, by the exact binomial test."""
    check_int("trials", trials, low=1)
    check_int("successes", successes, low=0, high=trials)
    check_probability("probability", probability)
    p = stats.binomtest(successes, trials, probability).pvalue
    _judge("proportion", p, alpha, f"{successes} of {trials}, {probability:.4g} expected")


def require_same_distribution(
    a: ArrayLike, b: ArrayLike, *, alpha: float = 1e-3, permutations: int = 9999, seed: Seed = 0
) -> None:
    """Require that two samples of rows have one distribution, by a permutation test of the energy distance.

    Parameters
    ----------
    a, b : arrays, shapes (n, d) or (n,), and (m, d) or (m,)
    alpha : float, default=1e-3
        Not below 1 / (permutations + 1), the least p-value there is.
    permutations : int, default=9999
    seed : Seed, default=0
        What decides the permutations.
    """
    x, y = (np.asarray(part, np.float64).reshape(len(np.asarray(part)), -1) for part in (a, b))
    _check(x, 5, alpha)
    _check(y, 5, alpha)
    if alpha < 1 / (check_int("permutations", permutations, low=1) + 1):
        raise QuernelError(f"alpha={alpha} needs at least {int(1 / alpha)} permutations; got {permutations}")
    pooled = np.concatenate((x, y))
    distance = np.sqrt(np.maximum(((pooled[:, None] - pooled[None]) ** 2).sum(-1), 0.0))
    draw = generator(seed)
    # Signed weights w sum to 0, and -w^T D w is the energy distance: one product for all permutations.
    weights = np.concatenate((np.full(len(x), 1 / len(x)), np.full(len(y), -1 / len(y))))
    shuffled = np.stack([draw.permutation(weights) for _ in range(permutations)])
    null = -((shuffled @ distance) * shuffled).sum(1)
    seen = -float(weights @ distance @ weights)
    p = (1 + int((null >= seen - 1e-12 * abs(seen)).sum())) / (permutations + 1)
    _judge("same distribution", p, alpha, f"energy distance {seen:.4g}")


def _joined(expected: np.ndarray) -> np.ndarray:
    """Return a cell for each outcome, ascending in expected counts, each cell expecting at least five."""
    cells, cell, filled = np.zeros(len(expected), np.int64), 0, 0.0
    for i, value in enumerate(expected):
        if filled >= _LEAST_EXPECTED:
            cell, filled = cell + 1, 0.0
        cells[i] = cell
        filled += value
    if filled < _LEAST_EXPECTED and cell:
        cells[cells == cell] = cell - 1
    return cells


def _check(x: np.ndarray, least: int, alpha: float) -> None:
    check_probability("alpha", alpha)
    if len(x) < least or not np.isfinite(x).all():
        raise QuernelError(f"samples must be at least {least} and finite; got shape {x.shape}")


def _judge(what: str, p: Any, alpha: float, detail: str) -> None:
    values = np.atleast_1d(np.asarray(p, np.float64))
    least = float(values.min()) * values.size
    # Written so that NaN fails.
    if not least >= alpha:
        raise ConformanceError(f"{what}: p = {least:.2e} is below the false-alarm rate {alpha:g}; {detail}")
