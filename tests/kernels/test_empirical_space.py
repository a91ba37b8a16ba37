"""Spaces of finitely many rows: rank, leverage, weights, penalties, grids that stand for densities, and memory."""

import tracemalloc
from math import factorial

import numpy as np
import pytest
from numpy.polynomial import hermite_e
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

from quernel._errors import QuernelError
from quernel.kernels import Design, EmpiricalSpace, ProjectionDPP, VolumeSampler, WeightedLeastSquares
from quernel.testing import require_frequencies


def everything(space):
    """Return the design of all points once, each with its mass: the whole population's problem."""
    points = np.arange(space.n_points)
    masses = space.leverage / (space.phi(points) ** 2).sum(1)
    return Design.of(space, points, masses)


def test_functions_are_orthonormal_and_leverage_is_the_hat_matrix():
    x, _ = load_diabetes(return_X_y=True)
    space = EmpiricalSpace(x)
    phi = space.phi(np.arange(len(x)))
    np.testing.assert_allclose(phi.T @ phi / len(x), np.eye(10), atol=1e-12)
    np.testing.assert_allclose(space.leverage, np.diag(x @ np.linalg.pinv(x)), atol=1e-12)
    np.testing.assert_allclose(space.phi(x[5:9]), phi[5:9], atol=1e-9)
    np.testing.assert_allclose(x @ space.feature_coefficients(np.eye(10)), phi, atol=1e-9)


def test_draws_follow_leverage_and_masses():
    rng = np.random.default_rng(0)
    a, masses = rng.standard_t(3, (30, 4)), rng.uniform(0.5, 2, 30)
    a[7] = 0
    space = EmpiricalSpace(a, masses=masses)
    drawn = np.bincount(space.sample_nu(50_000, 1), minlength=30)
    require_frequencies(drawn, space.leverage / 4)
    assert drawn[7] == 0
    require_frequencies(np.bincount(space.sample_mu(50_000, 2), minlength=30), masses / masses.sum())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dependent_columns_are_found(dtype):
    x = np.random.default_rng(0).standard_normal((300, 6)).astype(dtype)
    wide = np.column_stack((x, x[:, :3], x[:, 0] * 2, np.zeros(300), x[:, 4] * dtype(1e-20)))
    space = EmpiricalSpace(wide.astype(dtype))
    assert space.n_features == 6
    assert abs(space.leverage.sum() - 6) < 1e-9
    np.testing.assert_allclose(space.leverage, EmpiricalSpace(x).leverage, atol=1e-5 if dtype == np.float32 else 1e-10)


def test_a_design_of_all_rows_is_ridge_regression():
    x, y = load_diabetes(return_X_y=True)
    for alpha in (0.0, 0.1, 10.0):
        space = EmpiricalSpace(x, ridge=alpha)
        design = everything(space)
        fit = WeightedLeastSquares(space).fit(design, design.spread(y))
        wanted = Ridge(alpha, fit_intercept=False).fit(x, y)
        np.testing.assert_allclose(space.feature_coefficients(fit.coef_), wanted.coef_, rtol=1e-7)
        np.testing.assert_allclose(fit.predict(x[:20]), wanted.predict(x[:20]), rtol=1e-7)


def test_masses_weigh_the_rows():
    x, y = load_diabetes(return_X_y=True)
    masses = np.random.default_rng(0).uniform(0.2, 3, len(y))
    space = EmpiricalSpace(x, masses=masses, ridge=0.3)
    design = everything(space)
    fit = WeightedLeastSquares(space).fit(design, design.spread(y))
    wanted = Ridge(0.3, fit_intercept=False).fit(x, y, sample_weight=masses * len(y) / masses.sum())
    np.testing.assert_allclose(space.feature_coefficients(fit.coef_), wanted.coef_, rtol=1e-7)


def test_a_penalty_allows_more_columns_than_rows_and_its_rows_need_no_label():
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal((12, 20)), rng.standard_normal(12)
    space = EmpiricalSpace(a, ridge=1.0)
    assert (space.n_rows, space.n_points, space.n_features) == (12, 32, 20)
    design = VolumeSampler(space, n=40).sample(0)
    assert design.rows.max() < 12 < design.indices.max()
    spread = design.spread(y[design.rows])
    real = design.indices < 12
    np.testing.assert_array_equal(spread[real], y[design.indices[real]])
    assert not spread[~real].any()


def test_a_grid_with_masses_stands_for_a_density():
    nodes = np.linspace(-12, 12, 4001)
    powers = np.stack([nodes**k for k in range(6)], 1)
    space = EmpiricalSpace(powers, masses=np.exp(-(nodes**2) / 2))
    middle = np.flatnonzero(np.abs(nodes) < 4)
    hermite = np.stack([hermite_e.hermeval(nodes[middle], np.eye(6)[k]) / np.sqrt(factorial(k)) for k in range(6)], 1)
    np.testing.assert_allclose((space.phi(middle) ** 2).sum(1), (hermite**2).sum(1), rtol=1e-6)


def test_memory_is_linear_in_the_rows():
    n, m = 30_000, 24
    a = np.random.default_rng(0).standard_normal((n, m))
    tracemalloc.start()
    space = EmpiricalSpace(a)
    VolumeSampler(space, "dpp_repeat", n=2 * m).sample(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The factored copy, the basis, and some vectors of N; one N x N array would be 7 GB.
    assert peak < 3.5 * a.nbytes
    assert space.nbytes < 1.3 * a.nbytes


def test_ill_conditioned_features_keep_their_numerical_rank():
    # Powers of numbers near 1: a condition number of some 1e12, with two columns twice.
    t = np.linspace(0.8, 1.2, 500)
    powers = np.vander(t, 12, increasing=True)
    space = EmpiricalSpace(np.column_stack((powers, powers[:, [2, 5]])))
    assert 8 <= space.n_features <= 12
    assert np.linalg.cond(powers / np.linalg.norm(powers, axis=0)) > 1e12
    q = space.phi(np.arange(500)) / np.sqrt(500)
    assert np.abs(q.T @ q - np.eye(space.n_features)).max() < 1e-10
    assert (space.leverage >= 0).all() and (space.leverage <= 1 + 1e-12).all()
    rows = ProjectionDPP(space).sample(0)
    assert len(set(rows.tolist())) == space.n_features


def test_bad_arguments_are_named():
    x = np.random.default_rng(0).standard_normal((10, 3))
    for make, message in (
        (lambda: EmpiricalSpace(x.T), "m must not exceed N"),
        (lambda: EmpiricalSpace(np.zeros((10, 3))), "zero in every row"),
        (lambda: EmpiricalSpace(x, orthonormal=True), "not orthonormal"),
        (lambda: EmpiricalSpace(x * np.nan), "NaN"),
        (lambda: EmpiricalSpace(x[:, 0]), r"shape \(N, M\)"),
        (lambda: EmpiricalSpace(x, ridge=-1), "ridge must be"),
        (lambda: EmpiricalSpace(x, ridge=[1.0]), "ridge must be"),
        (lambda: EmpiricalSpace(x, masses=np.zeros(10)), "masses must be 10 positive numbers.*values down to 0"),
        (lambda: EmpiricalSpace(x, rank_tolerance=2.0), "rank_tolerance must be"),
        (lambda: EmpiricalSpace(x).phi([10]), r"row numbers in \[0, 10\)"),
        (lambda: EmpiricalSpace(x).phi(x[:, :2]), "features of shape"),
        (lambda: EmpiricalSpace(x).feature_coefficients(np.ones(2)), "coef must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    basis = EmpiricalSpace(x).phi(np.arange(10))
    taken = EmpiricalSpace(basis, orthonormal=True)
    np.testing.assert_array_equal(taken.phi(basis[:2]), basis[:2])
    np.testing.assert_allclose(taken.phi([4, 1]), basis[[4, 1]], rtol=1e-12)
    np.testing.assert_array_equal(taken.feature_coefficients([1.0, 2.0, 3.0]), [1, 2, 3])
    with pytest.raises(QuernelError, match="ridge must be 0"):
        EmpiricalSpace(basis, orthonormal=True, ridge=1.0)
