"""mmd2: loops, no bias, the level and the power of the permutation test, memory, refusals; median_gamma."""

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels.statistics import median_gamma, mmd
from quernel.kernels.statistics import mmd2 as two_samples
from quernel.testing import require_mean, require_proportion
from tests.reference import rkme_model_search as oracle


def pair(n=9, m=7, d=2, shift=0.0, seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)), draw.standard_normal((m, d)) + shift


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("rows", [3, 256])
def test_equals_loops(unbiased, rows, monkeypatch):
    monkeypatch.setattr(mmd, "_ROWS", rows)
    x, y = pair(shift=0.5)
    found = two_samples(x, y, gamma=0.7, unbiased=unbiased)
    assert found.value == pytest.approx(oracle.mmd2(x, y, 0.7, unbiased=unbiased), abs=1e-12)
    assert found.p_value is None and found.gamma == 0.7
    assert two_samples(y, x, gamma=0.7, unbiased=unbiased).value == pytest.approx(found.value, abs=1e-12)


def test_biased_is_never_negative_and_unbiased_may_be():
    values = [[two_samples(*pair(seed=s), gamma=1.0, unbiased=u).value for s in range(40)] for u in (True, False)]
    assert min(values[0]) < 0 <= min(values[1])


def test_one_statistic_for_all_permutations():
    x, y = pair(shift=0.4)
    rows, chosen = np.concatenate((x, y)), np.random.default_rng(1).permutation(16)[:9]
    first = np.zeros((16, 1))
    first[chosen] = 1
    got = mmd._discrepancies(torch.from_numpy(rows * np.sqrt(1.4)), torch.from_numpy(first), 9, True)
    other = rows[np.setdiff1d(np.arange(16), chosen)]
    assert got[0] == pytest.approx(oracle.mmd2(rows[chosen], other, 0.7, unbiased=True), abs=1e-12)


@pytest.mark.parametrize("repetitions", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_bias_where_the_samples_are_alike(repetitions):
    values = [two_samples(*pair(20, 15, seed=s), gamma=0.5).value for s in range(repetitions)]
    require_mean(values, 0.0)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(repetitions)


@pytest.mark.slow
def test_the_permutation_test_keeps_its_level():
    # With 99 permutations p <= 0.05 has probability 0.05 exactly.
    small = sum(
        two_samples(*pair(15, 15, seed=s), permutations=99, random_state=s).p_value <= 0.05 for s in range(2000)
    )
    require_proportion(small, 2000, 0.05)
    assert 0.04 <= small / 2000 <= 0.06


def test_the_permutation_test_finds_a_difference():
    assert two_samples(*pair(60, 60, shift=1.0), permutations=199, random_state=0).p_value == 1 / 200
    # Samples of the same rows: no permutation is closer.
    x = pair()[0]
    assert two_samples(x, x, permutations=50, unbiased=False, random_state=0).p_value == 1.0


def test_the_kernel_is_met_in_blocks(monkeypatch):
    sizes, whole = [], mmd.gaussian_kernel

    def watched(x, y):
        sizes.append(len(x))
        return whole(x, y)

    monkeypatch.setattr(mmd, "gaussian_kernel", watched)
    two_samples(*pair(600, 500), gamma=1.0)
    assert max(sizes) == mmd._ROWS and sum(sizes) == 1100


def test_median_gamma():
    x = pair(50)[0]
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(50, 1)]
    assert median_gamma(x) == pytest.approx(1 / np.median(distances) ** 2)
    assert median_gamma(np.ones((4, 2))) == 1.0
    many = np.random.default_rng(0).standard_normal((5000, 3))
    assert median_gamma(many) == median_gamma(many) == pytest.approx(median_gamma(many, n_rows=3000), rel=0.1)
    # A large offset does not round the distances away.
    assert median_gamma(x + 1e6) == pytest.approx(median_gamma(x), rel=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.ones((1, 2)), np.ones((3, 2)), {}, "X must be numbers of shape"),
        (np.ones((3, 2)), np.ones((3, 3)), {}, "as many columns; got 2 and 3"),
        (np.ones((3, 2)), np.full((3, 2), np.nan), {}, "Y holds NaN"),
        (np.ones(3), np.ones(3), {}, "X must be numbers of shape"),
        (np.ones((3, 2)), np.ones((3, 2)), {"gamma": -1.0}, "gamma must be"),
        (np.ones((3, 2)), np.ones((3, 2)), {"gamma": "scale"}, 'gamma must be "median"'),
        (np.ones((3, 2)), np.ones((3, 2)), {"permutations": -1}, "permutations must be"),
        (np.ones((3, 2)), np.ones((3, 2)), {"unbiased": 1}, "unbiased must be"),
    ],
)
def test_errors(x, y, options, message):
    with pytest.raises(QuernelError, match=message):
        two_samples(x, y, **options)
