"""WinnerTakeAll: its definition, collisions by the law of common winners, invariance under increasing functions."""

import numpy as np
import pytest
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import WinnerTakeAll
from tests.reference import hashing as oracle

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed


def test_equals_the_definition():
    x = np.random.default_rng(0).integers(0, 4, (50, 12)).astype(float)  # many ties
    family = WinnerTakeAll(12, 6, 3, window=5, seed=2)
    assert family.raw(x).reshape(50, 18).tolist() == [[oracle.winner(row, p) for p in family.places] for row in x]


@pytest.mark.parametrize("window", [2, 3, 8, 16])
@pytest.mark.parametrize("noise", [0.1, 1.0, 100.0])
def test_collisions_follow_the_law(window, noise):
    draw = np.random.default_rng(3)
    x = draw.standard_normal(16).astype(np.float32)
    y = x + noise * draw.standard_normal(16).astype(np.float32)
    family = WinnerTakeAll(16, 20_000, 1, window=window, seed=1)
    raw = family.raw(np.stack([x, y]))
    equal = int((raw[0] == raw[1]).sum())
    wanted = family.hash_probability(x, y)
    if window == 16:  # every window holds all coordinates
        assert equal == 20_000 * wanted
    else:
        assert stats.binomtest(equal, 20_000, wanted).pvalue > FALSE_ALARM / 9


def test_the_law_by_counting_windows():
    from itertools import combinations

    x, y = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
    windows = list(combinations(range(8), 3))
    same = sum(max(w, key=lambda i: x[i]) == max(w, key=lambda i: y[i]) for w in windows)
    assert WinnerTakeAll(8, 1, 1, window=3).hash_probability(x, y) == pytest.approx(same / len(windows))


def test_increasing_functions_change_nothing():
    x = np.random.default_rng(0).standard_normal((20, 10))
    family = WinnerTakeAll(10, 8, 2, window=4)
    for changed in (3 * x + 7, np.exp(x), x**3):
        np.testing.assert_array_equal(family.codes(changed), family.codes(x))


def test_windows_are_distinct_coordinates():
    places = WinnerTakeAll(10, 50, 2, window=10).places
    assert (np.sort(places, axis=1) == np.arange(10)).all() and len(np.unique(places, axis=0)) > 90


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WinnerTakeAll(1, 1, 1), "dim must be"),
        (lambda: WinnerTakeAll(4, 1, 1, window=5), "window must be"),
        (lambda: WinnerTakeAll(4, 1, 1, window=1), "window must be"),
        (lambda: WinnerTakeAll(4, 1, 1, 2).raw(np.ones((1, 5))), r"X must have shape \(n, 4\)"),
        (lambda: WinnerTakeAll(2, 1, 1, 2).hash_probability([1, 1], [1, 2]), "distinct numbers; ties"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
