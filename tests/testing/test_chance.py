"""Tests of chance: right hypotheses pass at the stated rate, wrong ones are caught."""

import numpy as np
import pytest
from scipy import stats

from quernel._errors import QuernelError
from quernel.testing import (
    ConformanceError,
    require_distribution,
    require_frequencies,
    require_mean,
    require_proportion,
    require_same_distribution,
)


def draw(seed=0):
    return np.random.default_rng(seed)


def alarms(check, runs):
    count = 0
    for seed in range(runs):
        try:
            check(draw(seed))
        except ConformanceError:
            count += 1
    return count


@pytest.mark.parametrize(
    "check",
    [
        lambda g: require_mean(g.exponential(size=(400, 3)), 1.0, alpha=0.05),
        lambda g: require_frequencies(g.multinomial(500, [0.5, 0.3, 0.2]), [0.5, 0.3, 0.2], alpha=0.05),
        lambda g: require_distribution(g.standard_normal(100), stats.norm.cdf, alpha=0.05),
        lambda g: require_proportion(int(g.binomial(300, 0.3)), 300, 0.3, alpha=0.05),
        lambda g: require_same_distribution(
            g.normal(size=(20, 2)), g.normal(size=(15, 2)), alpha=0.05, permutations=99
        ),
    ],
    ids=["mean", "frequencies", "distribution", "proportion", "same distribution"],
)
def test_a_true_hypothesis_fails_at_the_stated_rate(check):
    # 1 in 20 of 400 runs is 20 +- 4.4; skewness and discreteness may move the rate by a third.
    assert 4 <= alarms(check, 400) <= 40


@pytest.mark.parametrize(
    "check",
    [
        lambda g: require_mean(g.standard_normal((10000, 2)), [0.0, 0.1]),
        lambda g: require_frequencies(g.multinomial(10000, [0.5, 0.3, 0.2]), [0.5, 0.25, 0.25]),
        lambda g: require_frequencies([5, 1], [1.0, 0.0]),
        lambda g: require_distribution(g.standard_normal(2000), stats.norm(0.2).cdf),
        lambda g: require_proportion(400, 1000, 0.5),
        lambda g: require_same_distribution(g.normal(size=50), g.normal(1.0, size=50)),
        lambda g: require_mean(np.ones((40, 1)), 1.1),
        lambda g: require_distribution(g.standard_normal(20), lambda x: x * np.nan),
    ],
)
def test_a_false_hypothesis_is_caught(check):
    with pytest.raises(ConformanceError, match=r"false-alarm rate|probability 0"):
        check(draw())


def test_constant_samples_are_compared_as_they_are():
    require_mean(np.full((40, 2), 0.1), 0.1)


def test_rare_outcomes_are_joined():
    probabilities = np.concatenate(([0.9], np.full(100, 0.001)))
    require_frequencies(draw().multinomial(1000, probabilities), probabilities)


def test_bad_arguments_are_refused():
    with pytest.raises(QuernelError, match="at least 30"):
        require_mean(np.ones(5), 1.0)
    with pytest.raises(QuernelError, match="sum to 1"):
        require_frequencies([1, 2], [0.5, 0.6])
    with pytest.raises(QuernelError, match="too few"):
        require_frequencies([1, 1], [0.5, 0.5])
    with pytest.raises(QuernelError, match="permutations"):
        require_same_distribution(np.ones(5), np.ones(5), alpha=1e-6)
