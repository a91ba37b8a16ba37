"""Intervals: published values, coverage, agreement with SciPy, determinism, bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quernel._errors import QuernelError
from quernel.kernels.statistics import clopper_pearson, paired_bootstrap, rank_correlation, wilson

FALSE_ALARM = 1e-6


@given(n=st.integers(1, 2000), share=st.floats(0, 1), level=st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(max_examples=150, deadline=None)
def test_proportions_equal_scipy(n, share, level):
    k = round(share * n)
    for ours, method in ((clopper_pearson, "exact"), (wilson, "wilson")):
        interval = ours(k, n, level=level)
        expected = stats.binomtest(k, n).proportion_ci(level, method=method)
        assert interval.low == pytest.approx(expected.low, abs=1e-9)
        assert interval.high == pytest.approx(expected.high, abs=1e-9)
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_exact_interval_covers_at_least_its_level():
    # Exact coverage, summed over all outcomes; Wilson's is only right on average.
    n = 30
    exact = [clopper_pearson(k, n) for k in range(n + 1)]
    shorter = [wilson(k, n) for k in range(n + 1)]
    grid = np.linspace(0.01, 0.99, 99)
    coverage = {
        name: [sum(stats.binom.pmf(k, n, p) for k in range(n + 1) if p in intervals[k]) for p in grid]
        for name, intervals in (("exact", exact), ("wilson", shorter))
    }
    assert min(coverage["exact"]) >= 0.95
    assert np.mean(coverage["wilson"]) == pytest.approx(0.95, abs=0.01)
    assert np.mean(coverage["exact"]) > np.mean(coverage["wilson"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clopper_pearson(3, 2), r"successes must be an integer in \[0, 2\]; got 3"),
        (lambda: wilson(0, 0), "trials must be"),
        (lambda: wilson(1, 2, level=1.0), "level must be"),
        (lambda: wilson(1.5, 2), "successes must be"),
        (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "got 2 and 3 rows"),
        (lambda: paired_bootstrap([1.0, math.nan]), "a holds NaN"),
        (lambda: paired_bootstrap([1.0]), "at least 2 rows"),
        (lambda: paired_bootstrap(["a", "b"]), "a must hold numbers"),
        (lambda: paired_bootstrap(np.zeros((3, 2))), r"shape \(n,\); got \(3, 2\)"),
        (lambda: paired_bootstrap([1, 2, 3], resamples=10), "resamples must be"),
        (lambda: paired_bootstrap([1, 2, 3], metric=lambda rows: math.nan), "finite on every resample"),
        (lambda: rank_correlation([1, 2, 3, 4], [1, 1, 1, 1]), "x or y is constant"),
        (lambda: rank_correlation([1, 2, 3], [1, 2, 3]), "n >= 4"),
        (lambda: rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], method="exact"), "method must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(QuernelError, match=message):
        call()


def scores(n, gain, seed):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    return shared + gain + 0.3 * rng.normal(size=n), shared + 0.3 * rng.normal(size=n)


def test_bootstrap_of_means_equals_the_t_interval_on_many_samples():
    a, b = scores(2000, 0.1, 0)
    result = paired_bootstrap(a, b, resamples=4000)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    width = expected.high - expected.low
    assert result.estimate == pytest.approx((a - b).mean())
    assert result.low == pytest.approx(expected.low, abs=0.06 * width)
    assert result.high == pytest.approx(expected.high, abs=0.06 * width)


def test_pairing_cancels_what_both_find_hard():
    a, b = scores(300, 0.1, 1)
    paired = paired_bootstrap(a, b)
    assert paired.high - paired.low < 0.5 * 4 * math.sqrt((a.var() + b.var()) / 300)
    assert paired.p_value < 0.01
    assert 0 not in paired


def test_bootstrap_coverage_without_an_effect():
    # 300 experiments at 95 %: the percentile interval of 60 rows covers slightly less than its level.
    covered = sum(0.0 in paired_bootstrap(*scores(60, 0.0, seed), resamples=300, seed=seed) for seed in range(300))
    assert stats.binomtest(covered, 300, 0.93).pvalue > FALSE_ALARM


def test_differences_alone_and_an_explicit_metric_agree():
    a, b = scores(100, 0.2, 2)
    from_pairs = paired_bootstrap(a, b, seed=5)
    assert paired_bootstrap(a - b, seed=5) == from_pairs
    slow = paired_bootstrap(a, b, metric=lambda rows: rows.mean(), seed=5)
    assert slow.estimate == pytest.approx(from_pairs.estimate)
    assert (slow.low, slow.high) == (pytest.approx(from_pairs.low), pytest.approx(from_pairs.high))


def test_a_metric_of_predictions_and_labels():
    rng = np.random.default_rng(3)
    labels = rng.normal(size=200)
    good, bad = labels + 0.5 * rng.normal(size=200), labels + 2 * rng.normal(size=200)

    def correlation(rows):
        return stats.spearmanr(rows[:, 0], rows[:, 1]).statistic

    result = paired_bootstrap(
        np.column_stack([good, labels]), np.column_stack([bad, labels]), metric=correlation, resamples=200
    )
    assert result.low > 0
    assert result.estimate == pytest.approx(
        correlation(np.column_stack([good, labels])) - correlation(np.column_stack([bad, labels]))
    )


def test_equal_models_have_no_difference():
    result = paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (result.estimate, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_deterministic_by_seed_and_untouched_by_blocks(monkeypatch):
    a, b = scores(50, 0.1, 4)
    first = paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap(a, b, seed=1) == first != paired_bootstrap(a, b, seed=2)
    from quernel.kernels.statistics import intervals

    monkeypatch.setattr(intervals, "_BLOCK_ELEMENTS", 1000)
    assert paired_bootstrap(a, b, seed=1) == first


@pytest.mark.parametrize("method", ["fisher", "bootstrap"])
def test_rank_correlation_equals_scipy_with_ties(method):
    rng = np.random.default_rng(5)
    x = rng.integers(0, 10, 100)
    y = x + rng.integers(0, 10, 100)
    interval = rank_correlation(x, y, method=method, resamples=300)
    assert interval.estimate == pytest.approx(stats.spearmanr(x, y).statistic)
    assert -1 <= interval.low < interval.estimate < interval.high <= 1


def test_fisher_interval_value():
    x = np.arange(103.0)
    y = x + 40 * np.sin(x * x)
    interval = rank_correlation(x, y, level=0.9)
    r = interval.estimate
    half = stats.norm.ppf(0.95) * math.sqrt((1 + r * r / 2) / 100)
    assert interval.low == pytest.approx(math.tanh(math.atanh(r) - half))
    assert interval.high == pytest.approx(math.tanh(math.atanh(r) + half))


def test_perfect_order():
    x = np.arange(50.0)
    up, down = rank_correlation(x, x**3), rank_correlation(x, -x)
    assert (up.estimate, up.high) == (1.0, 1.0)
    assert (down.estimate, down.low) == (-1.0, -1.0)


def test_fisher_coverage():
    # Bivariate normal with r = 0.6: Spearman's population value is 6/pi asin(r/2).
    population = 6 / math.pi * math.asin(0.3)
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(500):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)
        covered += population in rank_correlation(x, y)
    assert stats.binomtest(covered, 500, 0.95).pvalue > FALSE_ALARM
