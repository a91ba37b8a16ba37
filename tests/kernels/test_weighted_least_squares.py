"""Designs and fits: the weighted solution, failure that is announced, sample sizes, what is refused."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from quernel._errors import QuernelError
from quernel.kernels import (
    Design,
    EmpiricalSpace,
    IllConditionedDesignWarning,
    LegendreSpace,
    VolumeSampler,
    WeightedLeastSquares,
    stable_sample_size,
)
from tests.reference import volume_sampling as slow


def test_the_fit_solves_the_weighted_normal_equations():
    space, rng = LegendreSpace(4, 2), np.random.default_rng(0)
    design = VolumeSampler(space, n=40).sample(rng)
    y = rng.standard_normal((40, 3))
    fit = WeightedLeastSquares(space).fit(design, y)
    phi = space.phi(design.points)
    np.testing.assert_allclose(fit.coef_, slow.fit(phi, design.weights, y), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(fit.predict(design.points), phi @ fit.coef_, rtol=1e-14)
    one = WeightedLeastSquares(space).fit(design, y[:, 0])
    np.testing.assert_allclose(one.coef_, fit.coef_[:, 0], rtol=1e-12)
    gram = (phi * design.weights[:, None]).T @ phi / 40
    assert abs(design.gram_min - np.linalg.eigvalsh(gram)[0]) < 1e-12
    assert fit.gram_min_ == design.gram_min and fit.unbiased_


def test_an_undetermined_fit_warns_and_takes_the_shortest_solution():
    space = LegendreSpace(5)
    design = Design.of(space, [[0.1], [0.1], [0.5], [-0.3], [0.5], [0.7], [0.7]], np.ones(7))
    assert design.gram_min < 1e-12
    y = np.arange(7.0)
    with pytest.warns(IllConditionedDesignWarning, match="amplified"):
        fit = WeightedLeastSquares(space).fit(design, y)
    wanted = np.linalg.lstsq(space.phi(design.points), y, rcond=None)[0]
    np.testing.assert_allclose(fit.coef_, wanted, atol=1e-9)
    # Rows that come twice leave pivots of unpivoted QR far from zero; the shortest solution must be found anyway.
    wide = EmpiricalSpace(np.random.default_rng(1).standard_normal((90, 60)))
    few = Design.of(wide, np.tile(np.arange(40), 2), np.ones(80))
    with pytest.warns(IllConditionedDesignWarning):
        assert np.abs(WeightedLeastSquares(wide).fit(few, np.tile(np.arange(40.0), 2)).coef_).max() < 1e4
    assert WeightedLeastSquares(space, min_gram=0.0).fit(design, y).coef_.shape == (6,)


def test_rows_that_come_twice_are_labelled_once():
    space = EmpiricalSpace(np.random.default_rng(0).standard_normal((9, 2)))
    design = Design.of(space, [3, 1, 3, 8], np.ones(4))
    assert design.rows.tolist() == [1, 3, 8] and len(design) == 4
    np.testing.assert_array_equal(design.spread([10, 30, 80]), [30, 10, 30, 80])
    assert design.spread(np.ones((3, 2))).shape == (4, 2)
    with pytest.raises(QuernelError, match="one for each of the 3 rows"):
        design.spread([1, 2, 3, 4])
    assert not design.unbiased


def test_the_sample_size_of_independent_draws_is_chernoff_s():
    assert stable_sample_size(20) == 1534
    assert stable_sample_size(20, delta=0.9) < 700
    sizes = [stable_sample_size(10, eta=eta) for eta in (0.1, 0.01, 0.001)]
    assert sizes == sorted(sizes)
    with pytest.raises(QuernelError, match="delta must be"):
        stable_sample_size(10, delta=1.0)


def test_designs_of_that_size_are_stable():
    space = LegendreSpace(4)
    n = stable_sample_size(5, delta=0.5, eta=0.1)
    least = [VolumeSampler(space, "iid", n=n).sample(seed).gram_min for seed in range(50)]
    assert min(least) >= 0.5  # ten in a hundred may miss by the bound, which is far from tight


def test_bad_arguments_are_named():
    space = LegendreSpace(2)
    design = VolumeSampler(space, n=6).sample(0)
    with pytest.raises(NotFittedError):
        WeightedLeastSquares(space).predict([0.0])
    for make, message in (
        (lambda: WeightedLeastSquares(space).fit(design, np.ones(5)), "one value for each of the 6 points"),
        (lambda: WeightedLeastSquares(space).fit(design, [np.inf] * 6), "y holds NaN or infinity"),
        (lambda: WeightedLeastSquares(space).fit(design.points, np.ones(6)), "design must be Design"),
        (lambda: WeightedLeastSquares(space, min_gram=-1), "min_gram must be"),
        (lambda: Design.of(space, [[0.1]], [0.0]), "weights must be positive"),
        (lambda: Design.of(space, [[0.1]], [1.0, 2.0]), "weights must be positive"),
        (lambda: design.rows, "points, not rows"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
