"""NTKRegressor: the dynamics as an estimator, bands that hold, early stopping, search over the kernel, refusals."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.model_selection import GridSearchCV, cross_val_score

from quernel._errors import QuernelError
from quernel.kernels import JitterWarning, NTKernel, NTKRegressor, ntk_dynamics


def diabetes(n=200):
    x, y = load_diabetes(return_X_y=True)
    return (x / x.std(0))[:n], ((y - y.mean()) / y.std())[:n]


@pytest.mark.parametrize("options", [{}, {"t": 2.0}, {"steps": 20, "lr": 1e-3}, {"ridge": 0.5}])
def test_it_is_the_dynamics(options):
    x, y = diabetes(60)
    z = x[40:]
    kernel = NTKernel(2, sigma_b=0.5)
    model = NTKRegressor(kernel, **options).fit(x[:40], y[:40])
    wanted = ntk_dynamics(kernel, x[:40], y[:40], z, **options)
    mean, cov = model.predict(z, return_cov=True)
    np.testing.assert_allclose(mean, wanted.mean, rtol=1e-8)
    np.testing.assert_allclose(cov, wanted.cov, rtol=1e-7, atol=1e-10)
    same, std = model.predict(z, return_std=True)
    np.testing.assert_array_equal(same, mean)
    np.testing.assert_allclose(std**2, cov.diagonal(), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(model.predict(z), mean, rtol=1e-12)


def test_every_target_is_a_network_of_its_own():
    x, y = diabetes(60)
    both = NTKRegressor(ridge=0.1).fit(x, np.stack((y, -(y**2)), axis=1))
    np.testing.assert_allclose(both.predict(x)[:, 0], NTKRegressor(ridge=0.1).fit(x, y).predict(x), rtol=1e-9)
    assert both.predict(x, return_std=True)[1].shape == (60,)


def test_stopping_early_or_decay_helps_where_targets_are_noisy():
    x, y = diabetes(442)
    kernel = NTKernel(1, sigma_b=1.0)
    score = {
        name: cross_val_score(NTKRegressor(kernel, **options), x, y, cv=3).mean()
        for name, options in {"to the end": {}, "early": {"t": 1.0}, "decay": {"ridge": 3.0}}.items()
    }
    assert min(score["early"], score["decay"]) > score["to the end"] + 0.05


def test_the_spread_grows_away_from_the_data():
    x = np.linspace(-1, 1, 12)[:, None]
    model = NTKRegressor(NTKernel(2, sigma_b=0.5)).fit(x, np.sin(3 * x[:, 0]))
    std = model.predict(np.array([[0.0], [1.0], [2.0], [4.0]]), return_std=True)[1]
    assert std[1] < 1e-6 and (np.diff(std[1:]) > 0).all() and std[0] < std[2]


def test_a_search_reaches_the_parameters_of_the_kernel():
    x, y = diabetes(80)
    grid = {"kernel__depth": [1, 2], "kernel__sigma_b": [0.0, 1.0], "ridge": [1.0]}
    search = GridSearchCV(NTKRegressor(NTKernel()), grid, cv=2).fit(x, y)
    assert search.best_params_["ridge"] == 1.0 and search.best_estimator_.kernel.depth in (1, 2)


def test_bad_parameters_are_refused():
    x, y = diabetes(20)
    for options, message in (
        ({"kernel": "relu"}, "kernel must be NTKernel"),
        ({"kernel": NTKernel(-1)}, "depth must be"),
        ({"t": -1.0}, "t must be"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"steps": 3, "lr": 100.0}, "diverges"),
        ({"steps": 3, "t": 1.0}, "not both"),
    ):
        with pytest.raises(QuernelError, match=message):
            NTKRegressor(**options).fit(x, y)
    with pytest.raises(QuernelError, match="X has rows of zeros only"):
        NTKRegressor().fit(np.zeros((5, 2)), np.ones(5))
    with pytest.warns(JitterWarning, match="the kernel of X plus ridge .* Regularise more$"):
        NTKRegressor().fit(np.ones((5, 2)), np.ones(5))
    with pytest.raises(QuernelError, match="exclude each other"):
        NTKRegressor().fit(x, y).predict(x, return_std=True, return_cov=True)
