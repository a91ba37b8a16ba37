"""PStable: collisions by the law of the distance, from a tenth of a cell to ten cells, in both norms."""

import numpy as np
import pytest
from scipy import integrate, stats

from quernel._errors import QuernelError
from quernel.hashing import PStable, pstable_probability

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed
RATIOS = (0.1, 0.3, 1.0, 3.0, 10.0)  # distance over width


def pair_at(distance, norm):
    step = np.random.default_rng(0).standard_normal(6)
    x = np.random.default_rng(1).standard_normal(6)
    return np.stack([x, x + step * distance / np.linalg.norm(step, 2 if norm == "l2" else 1)])


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n_concat", [1, 2])
def test_collisions_follow_the_law(norm, ratio, n_concat):
    width = 1.5
    family = PStable(6, 20_000, n_concat, width=width, norm=norm, seed=1)
    codes = family.codes(pair_at(ratio * width, norm))
    wanted = float(family.collision_probability(ratio * width))
    assert stats.binomtest(int((codes[0] == codes[1]).sum()), 20_000, wanted).pvalue > FALSE_ALARM / 20


@pytest.mark.parametrize("distance", [0.5, 2.0, 5.0, 10.0, 40.0])
def test_the_published_values(distance):
    known = {0.5: 0.8105, 2.0: 0.3715, 5.0: 0.0919, 10.0: 0.0248, 40.0: 0.0016}
    family = PStable(2, 1, 2, width=4.0)
    assert float(family.collision_probability(distance)) == pytest.approx(known[distance], abs=5e-5)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_law_is_the_integral(norm):
    # P = int_0^w f(t / c) / c (1 - t / w) dt with f the density of the absolute value of the stable law.
    density = (lambda t: 2 * stats.norm.pdf(t)) if norm == "l2" else (lambda t: 2 * stats.cauchy.pdf(t))
    for c in (0.2, 1.0, 30.0):
        wanted = integrate.quad(lambda t, c=c: density(t / c) / c * (1 - t / 4), 0, 4)[0]
        assert float(pstable_probability(c, 4.0, norm)) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_extreme_distances(norm):
    p = pstable_probability(np.array([0.0, 1e-300, 1e-9, 1e9, 1e300]), 1.0, norm)
    assert np.isfinite(p).all() and (np.diff(p) <= 0).all()
    assert p[0] == 1 and p[1] == pytest.approx(1) and 0 <= p[-1] < 1e-8


def test_cells_and_margins():
    x = np.random.default_rng(0).standard_normal((30, 4)) * 10
    family = PStable(4, 3, 2, width=0.7, seed=5)
    exact = x @ family.projections.dense().T.astype(float) + family.offsets
    raw, margins = family.raw(x).reshape(30, 6), family.margins(x).reshape(30, 6)
    assert (margins >= 0).all() and (margins < 1).all()
    np.testing.assert_allclose(raw + margins, exact, atol=1e-4)
    assert (raw < 0).any()  # cells below zero are cells of their own


def test_offsets_are_even():
    assert stats.kstest(PStable(2, 10_000, 1, width=1.0).offsets, "uniform").pvalue > FALSE_ALARM


def test_a_heavy_tail_is_no_error():
    # Some Cauchy directions of 400 000 carry any point beyond 2^24 cells; that says nothing about the point.
    family = PStable(1, 400_000, 1, width=1e-3, norm="l1", seed=0)
    cells = family.raw(np.array([[900.0], [901.0]]))
    assert np.abs(cells).max() > 2**24


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_points_too_far_out(norm):
    with pytest.raises(QuernelError, match=r"more than 16777216 cells of width 0\.001 from zero; centre or scale X"):
        PStable(2, 4, 2, width=1e-3, norm=norm).codes(np.full((1, 2), 1e6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PStable(2, 1, 1, width=0), "width must be"),
        (lambda: PStable(2, 1, 1, width=1.0, norm="linf"), "norm must be one of"),
        (lambda: PStable(2, 1, 1, width=1.0, directions="cauchy"), "directions must be one of"),
        (lambda: PStable(2, 1, 1, width=1.0, norm="l1", directions="gaussian"), 'norm="l1" has Cauchy ones'),
        (lambda: pstable_probability(-1.0, 1.0), "distance must not be negative"),
        (lambda: pstable_probability(np.nan, 1.0), "distance must not be negative or NaN"),
        (lambda: pstable_probability(1.0, 1.0, "l3"), "norm must be one of"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
