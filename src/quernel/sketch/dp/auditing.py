"""``audit``: measure from outputs alone how well a mechanism hides a record; a lower bound on its epsilon.

Run the mechanism often on two neighbouring data sets, guess from a statistic of each output which set it came from, and
count: TPR is how often set 1 is recognised, FPR how often set 0 is taken for it. (epsilon, delta)-privacy allows
TPR <= e^epsilon FPR + delta, mu-Gaussian privacy Phi^-1(TPR) - Phi^-1(FPR) <= mu. With Clopper-Pearson bounds for the
rates, a larger value refutes the guarantee. It never proves one: a mechanism that hides its flaw passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.statistics import Interval, clopper_pearson
from quernel.sketch.dp.calibration import gaussian_epsilon

Outputs = NDArray[Any]
Statistic = Callable[[Outputs], NDArray[np.floating[Any]]]
# Thresholds are chosen on this share of the trials, and judged on the rest: one look, no selection to correct for.
_PILOT = 0.25
_THRESHOLDS = 400


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes
    ----------
    epsilon_lower : float
        With probability ``level`` the mechanism's epsilon at ``delta`` is not smaller; 0 if nothing was found.
    mu_lower : float or None
        The same for mu, with ``form="mu"``.
    detected, mistaken : Interval
        Share of outputs of one set that were recognised, and of the other that were taken for it.
    delta, level : float
        As asked for.
    """

    epsilon_lower: float
    mu_lower: float | None
    detected: Interval
    mistaken: Interval
    delta: float
    level: float


def audit(
    mechanism: Callable[[Any, int], Outputs],
    x0: Any,
    x1: Any,
    *,
    trials: int = 100_000,
    delta: float = 0.0,
    form: Literal["plain", "mu"] = "plain",
    statistic: Statistic | None = None,
    level: float = 0.95,
) -> AuditResult:
    """Bound the epsilon of a mechanism from below.

    Parameters
    ----------
    mechanism : callable
        ``mechanism(x, n)`` runs n times on the data set x and returns the outputs, shape (n, ...).
    x0, x1 : anything
        Two neighbouring data sets, as different as they can be.
    trials : int, default=100_000
        Runs on each; a quarter of them chooses the test, the others judge.
    delta : float, default=0.0
        In [0, 1).
    form : {"plain", "mu"}, default="plain"
        "plain" assumes nothing: log((TPR - delta) / FPR) at the best threshold, in either direction. "mu" tests
        mu-Gaussian privacy at the threshold midway between the means and converts mu to epsilon at ``delta``: far
        sharper, and a bound for mechanisms that claim a mu, as Gaussian noise does.
    statistic : callable, optional
        ``statistic(outputs) -> (n,)``, larger for ``x1``. Default: the projection on the difference of mean outputs,
        which is the likelihood ratio for Gaussian noise.
    level : float, default=0.95
        Confidence of both bounds together.

    Returns
    -------
    result : AuditResult

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> result = audit(lambda x, n: x + draw.standard_normal((n, 1)), 0.0, 1.0, trials=20_000, delta=1e-5, form="mu")
    >>> bool(0.9 < result.mu_lower < 1.0)
    True
    """
    check_int("trials", trials, low=1000)
    check_float("delta", delta, low=0.0, high=1.0, open_high=True)
    check_float("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
    check_choice("form", form, ("plain", "mu"))
    if form == "mu" and delta == 0:
        raise QuernelError('form="mu" needs delta > 0, at which mu becomes an epsilon')
    outputs = [_flat(mechanism(x, trials), trials) for x in (x0, x1)]
    pilot = int(trials * _PILOT)
    if statistic is None:
        direction = outputs[1][:pilot].mean(0) - outputs[0][:pilot].mean(0)
        scores = [np.asarray(o @ direction, np.float64) for o in outputs]
    else:
        scores = [np.asarray(statistic(o), np.float64) for o in outputs]
    chosen, judged = [s[:pilot] for s in scores], [s[pilot:] for s in scores]
    if form == "mu":
        middle = (float(chosen[0].mean()) + float(chosen[1].mean())) / 2
        found, mistaken = _rates(judged[0], judged[1], middle, level)
        mu = max(0.0, float(ndtri(found.low) - ndtri(mistaken.high)))
        return AuditResult(gaussian_epsilon(mu, delta), mu, found, mistaken, delta, level)
    best = max(
        ((flip, t) for flip in (False, True) for t in _thresholds(chosen)),
        key=lambda test: _plain(*_test(chosen, test[0], test[1], level), delta),
    )
    found, mistaken = _test(judged, best[0], best[1], level)
    return AuditResult(_plain(found, mistaken, delta), None, found, mistaken, delta, level)


def _test(scores: list[NDArray[np.float64]], flip: bool, threshold: float, level: float) -> tuple[Interval, Interval]:
    """Return detected and mistaken shares; with ``flip``, of set 0 among the low scores."""
    if flip:
        return _rates(-scores[1], -scores[0], -threshold, level)
    return _rates(scores[0], scores[1], threshold, level)


def _rates(
    zero: NDArray[np.float64], one: NDArray[np.float64], threshold: float, level: float
) -> tuple[Interval, Interval]:
    counts = [int((scores > threshold).sum()) for scores in (one, zero)]
    # Each end of the two intervals fails with (1 - level) / 2, and one end of each is used.
    found, mistaken = (clopper_pearson(k, len(s), level=level) for k, s in zip(counts, (one, zero), strict=True))
    return found, mistaken


def _plain(found: Interval, mistaken: Interval, delta: float) -> float:
    return max(0.0, math.log((found.low - delta) / mistaken.high)) if found.low > delta else 0.0


def _thresholds(scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    pooled = np.concatenate(scores)
    return np.unique(np.quantile(pooled, np.linspace(0.0, 1.0, _THRESHOLDS + 2)[1:-1]))


def _flat(outputs: Outputs, trials: int) -> NDArray[np.float64]:
    held = np.asarray(outputs, np.float64)
    if held.ndim == 0 or len(held) != trials or not np.isfinite(held).all():
        raise QuernelError(f"mechanism must return {trials} finite outputs; got shape {held.shape}")
    return held.reshape(trials, -1)
