"""DesignRegressor: which labels it asks for and that it reads no others, the pool's solution, what it refuses."""

import copy
import pickle

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import quernel
from quernel._errors import QuernelError
from quernel.kernels import DesignRegressor, RandomFourierFeatures
from quernel.testing import require_mean


def diabetes():
    return load_diabetes(return_X_y=True)


@pytest.mark.parametrize("method", ["dpp_repeat", "volume", "iid"])
def test_labels_of_other_rows_are_not_read(method):
    x, y = diabetes()
    model = DesignRegressor(method=method, random_state=0)
    rows = model.query(x)
    assert (np.diff(rows) > 0).all() and len(rows) <= 22 and model.query(x).tolist() == rows.tolist()
    wrong = np.full(len(y), 1e6)
    wrong[rows] = y[rows]
    few = model.fit(x, y[rows]).predict(x)
    np.testing.assert_array_equal(few, DesignRegressor(method=method, random_state=0).fit(x, wrong).predict(x))
    np.testing.assert_array_equal(model.indices_, rows)
    wrong[np.setdiff1d(np.arange(len(y)), rows)] = np.nan
    np.testing.assert_array_equal(few, model.fit(x, wrong).predict(x))
    wrong[rows[3]] = np.nan
    with pytest.raises(
        ValueError, match=r"Input y contains NaN(.|\n)*rows that query\(X\) names; 1 have none, row \d+ first"
    ):
        model.fit(x, wrong)
    assert model.rank_ == 11 and model.unbiased_ == (method == "volume")


def test_the_mean_over_draws_is_the_whole_pool_s_solution():
    x, y = diabetes()
    for alpha in (0.0, 0.5):
        rng = np.random.default_rng(0)
        # The generator goes on from one to the next.
        models = [DesignRegressor(method="volume", alpha=alpha, random_state=rng) for _ in range(150)]
        found = [model.fit(x, y).coef_[0] for model in models]
        require_mean(found, (Ridge(alpha) if alpha else LinearRegression()).fit(x, y).coef_)


def test_targets_in_the_span_come_back_from_as_many_labels_as_features():
    x, _ = diabetes()
    features = PolynomialFeatures(2, include_bias=False)
    c = np.random.default_rng(0).standard_normal((65, 2))
    y = features.fit_transform(x) @ c + [3.0, -1.0]
    model = DesignRegressor(features, budget=1.0, random_state=0)
    rows = model.query(x)
    np.testing.assert_allclose(model.fit(x, y[rows]).predict(x), y, atol=1e-6)
    assert len(rows) == model.rank_ <= 66


def test_a_pool_of_fewer_rows_than_features_needs_a_penalty():
    x, y = diabetes()
    features = RandomFourierFeatures(128, random_state=0)
    with pytest.raises(QuernelError, match="X must have at least as many rows as features"):
        DesignRegressor(features, random_state=0).query(x[:60])
    model = DesignRegressor(features, alpha=1.0, random_state=0)
    rows = model.query(x[:60])
    assert len(rows) <= 60 and rows.max() < 60
    assert np.isfinite(model.fit(x[:60], y[rows]).predict(x)).all()


def test_labels_may_come_after_a_query_without_a_seed():
    x, y = diabetes()
    model = DesignRegressor()
    rows = model.query(x)
    assert model.fit(x, y[rows]).indices_.tolist() == rows.tolist()
    with pytest.raises(QuernelError, match=r"rows that query\(X\) names now"):
        DesignRegressor().fit(x, y[rows])
    with pytest.raises(QuernelError, match="inconsistent numbers of samples"):
        DesignRegressor(random_state=0).fit(x, y[rows][:-1])
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    with pytest.raises(QuernelError, match=r"rows that query\(X\) names now"):
        other.fit(x, y[rows])


def test_rows_drawn_by_chance_are_not_forgotten_by_saving(tmp_path):
    x, y = diabetes()
    by_chance, seeded = DesignRegressor(), DesignRegressor(random_state=0)
    rows, named = by_chance.query(x), seeded.query(x)
    with pytest.raises(QuernelError, match="random_state must be an integer to be saved between query and fit"):
        by_chance.save(tmp_path / "m")
    features = DesignRegressor(RandomFourierFeatures(20, gamma=1.0), random_state=0)
    features.query(x)
    with pytest.raises(QuernelError, match="base_features__random_state must be an integer to be saved"):
        features.save(tmp_path / "m")
    twin = pickle.loads(pickle.dumps(by_chance))
    assert by_chance.fit(x, y[rows]).save(tmp_path / "m").exists()
    np.testing.assert_array_equal(twin.fit(x, y[rows]).coef_, by_chance.coef_)
    by_chance.query(x[::-1])
    with pytest.raises(QuernelError, match="random_state must be an integer"):
        by_chance.save(tmp_path / "again")
    twin = quernel.load(seeded.save(tmp_path / "n"))
    np.testing.assert_array_equal(twin.fit(x, y[named]).coef_, seeded.fit(x, y[named]).coef_)


def test_a_query_or_a_refused_fit_leaves_a_fitted_model_as_it_is():
    x, y = diabetes()
    model = DesignRegressor(StandardScaler(), random_state=0).fit(x, y)
    before = model.predict(x)
    model.query(100 * x[:, :4] + 3)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(7 * x[:, :5], np.full(len(y), np.nan))
    np.testing.assert_array_equal(model.predict(x), before)


def test_saved_with_its_features(tmp_path):
    x, y = diabetes()
    model = DesignRegressor(RandomFourierFeatures(16, random_state=0), delta=0.95, random_state=0).fit(x, y)
    np.testing.assert_array_equal(quernel.load(model.save(tmp_path / "m")).predict(x), model.predict(x))
    assert model.gram_min_ >= 0.05


def test_bad_arguments_are_named():
    x, y = diabetes()
    for options, message in (
        ({"budget": 5, "method": "volume"}, "budget must come to at least 11 labels, one a feature; budget=5"),
        ({"budget": 0.5}, "budget must come to at least 11 labels"),
        ({"budget": "x"}, "budget must be"),
        ({"budget": 0}, "budget must be"),
        ({"budget": -1.0}, "budget must be"),
        ({"method": "greedy"}, "method must be one of"),
        ({"delta": 0}, "delta must be"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"fit_intercept": 1}, "fit_intercept must be"),
        ({"base_features": "rbf"}, "base_features must be a transformer"),
        ({"base_features": StandardScaler}, "base_features must be a transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            DesignRegressor(**options).fit(x, y)


def test_labels_of_another_pool_are_refused():
    pool, y = load_diabetes(return_X_y=True)
    model = DesignRegressor(random_state=0)
    rows = model.query(pool)
    for other, labels in ((pool[::-1], y[rows]), (pool[rows], y[rows])):
        with pytest.raises(QuernelError, match="X must be the whole pool that query was asked for"):
            model.fit(other, labels)
    # Nothing was lost: the right call still works, and so does another pool with all its labels.
    assert model.fit(pool, y[rows]).indices_.tolist() == rows.tolist()
    model.fit(pool[::-1], y[::-1])


def test_one_that_was_only_asked_is_saved_as_unfitted_and_names_the_same_rows(tmp_path):
    pool, y = load_diabetes(return_X_y=True)
    model = DesignRegressor(random_state=0)
    rows = model.query(pool)
    twin = quernel.load(model.save(tmp_path))
    np.testing.assert_array_equal(twin.fit(pool, y[rows]).coef_, model.fit(pool, y[rows]).coef_)
