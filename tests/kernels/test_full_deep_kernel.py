"""The objective over all points: closed forms for linear kernels, one optimum from anywhere, the GP on top."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from quernel._errors import QuernelError
from quernel.kernels import FullDeepKernel
from tests.reference import deep_kernel_machines as reference

P = 5
LINEAR = {"kernel": "linear", "likelihood": "gram", "jitter": 0.0, "precomputed": True}


def gram(seed):
    root = np.random.default_rng(seed).standard_normal((P, 2 * P))
    return root @ root.T / (2 * P)


FIRST, LAST = gram(0), gram(1)


# Check 2, equal nu.
@pytest.mark.parametrize("seed", range(3))
def test_linear_layers_of_equal_nu_end_on_the_geodesic_from_any_start(seed):
    closed = FullDeepKernel(3, **LINEAR).fit(FIRST, LAST)
    free = FullDeepKernel(3, **LINEAR, solver="gradient", start="random", random_state=seed).fit(FIRST, LAST)
    for layer in (1, 2, 3):
        wanted = reference.geodesic(FIRST, LAST, layer / 4)
        np.testing.assert_allclose(closed.gram_(layer), wanted, rtol=1e-9, atol=1e-10)
        assert np.linalg.norm(free.gram_(layer) - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert closed.objective_ >= free.objective_ - 1e-9
    np.testing.assert_array_equal(closed.gram_(0), FIRST)


# Check 2, unequal nu.
def test_one_linear_layer_of_unequal_nu_solves_the_riccati_equation():
    wanted = reference.riccati(FIRST, LAST, 0.5, 2.0)
    for solver in ("riccati", "gradient"):
        found = FullDeepKernel(1, nu=(0.5, 2.0), **LINEAR, solver=solver).fit(FIRST, LAST).gram_(1)
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    rest = 0.5 * wanted @ np.linalg.inv(FIRST) @ wanted + 1.5 * wanted - 2.0 * LAST
    assert np.abs(rest).max() < 1e-9


def test_cycling_over_layers_of_unequal_nu_finds_what_ascent_finds():
    nu = (0.3, 1.0, 2.0, 0.7)
    cycled = FullDeepKernel(3, nu=nu, **LINEAR).fit(FIRST, LAST)
    climbed = FullDeepKernel(3, nu=nu, **LINEAR, solver="gradient").fit(FIRST, LAST)
    assert cycled.solver == "riccati" and 10 < cycled.n_iter_ < 200
    for layer in (1, 2, 3):
        assert np.linalg.norm(cycled.gram_(layer) - climbed.gram_(layer)) <= 1e-5 * np.linalg.norm(climbed.gram_(layer))


def rows(n=12, d=3, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, d))
    return x, np.stack([np.sin(2 * x[:, 0]), x[:, 1] * x[:, 2]], 1)


@pytest.mark.parametrize("kernel", ["arccos", "rbf"])
def test_the_objective_is_that_of_the_definition_and_rises(kernel):
    x, y = rows()
    model = FullDeepKernel(2, kernel=kernel, nu=(0.5, 2.0), noise=0.2, jitter=1e-4).fit(x, y)
    below, none = x @ x.T / 3, (np.zeros((0, len(x))), np.zeros(0))
    value = 0.0
    for layer, nu in ((1, 0.5), (2, 2.0)):
        value -= nu * reference.kl(model.gram_(layer), reference.kernel(below, *none, kernel, 1e-4)[0])
        below = model.gram_(layer)
    cov = reference.kernel(below, *none, kernel, 1e-4)[0] + 0.2 * np.eye(len(x))
    density = np.trace(y.T @ np.linalg.inv(cov) @ y) + 2 * (np.linalg.slogdet(cov)[1] + len(x) * np.log(2 * np.pi))
    assert model.objective_ == pytest.approx(value - 0.5 * density, abs=1e-6)
    fixed = FullDeepKernel(2, kernel=kernel, nu=1e9, noise=0.2, jitter=1e-4).fit(x, y)
    assert model.objective_ > fixed.objective_ + 0.1


def test_a_large_nu_keeps_the_fixed_kernel():
    x, y = rows()
    model = FullDeepKernel(1, nu=1e8, jitter=1e-4).fit(x, y)
    k = reference.kernel(x @ x.T / 3, np.zeros((0, len(x))), np.zeros(0), "arccos", 1e-4)[0]
    np.testing.assert_allclose(model.gram_(1), k, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FullDeepKernel(nu=0.0), "nu must be > 0"),
        (lambda: FullDeepKernel(nu=float("inf")), "nu must be finite"),
        (lambda: FullDeepKernel(2, nu=(1.0, 1.0, 1.0)), "2 of them"),
        (lambda: FullDeepKernel(kernel="poly"), "kernel must be one of"),
        (lambda: FullDeepKernel(0), "n_layers"),
        (lambda: FullDeepKernel(solver="riccati"), "kernel='linear'"),
        (lambda: FullDeepKernel(**{**LINEAR, "nu": (1.0, 2.0)}, solver="geodesic"), "equal nu"),
        (lambda: FullDeepKernel(**LINEAR).fit(FIRST[:3], LAST), "must be square"),
        (lambda: FullDeepKernel(**LINEAR).fit(FIRST, LAST + np.triu(LAST)), "symmetric"),
        (lambda: FullDeepKernel(**LINEAR).fit(FIRST, -LAST), "positive definite"),
        (lambda: FullDeepKernel().fit([[1.0], [np.nan]], [1.0, 2.0]), "NaN"),
        (lambda: FullDeepKernel().fit([[1.0], [2.0]], [1.0, 2.0, 3.0]), "2 rows of X; got 3"),
        (lambda: FullDeepKernel().gram_(1), "not fitted"),
        (lambda: FullDeepKernel(**LINEAR).fit(FIRST, LAST).predict(FIRST), "predict needs rows"),
        (lambda: FullDeepKernel(**LINEAR).fit(FIRST, LAST).gram_(2), "layer"),
    ],
)
def test_what_is_no_good_is_named(call, message):
    with pytest.raises(QuernelError, match=message):
        call()


def test_ascent_needs_no_gradient_mode():
    x, y = rows()
    with torch.no_grad():
        assert FullDeepKernel(1, max_iter=3).fit(x, y).gram_(1).shape == (12, 12)


def test_what_diverges_and_other_columns_are_said():
    x, y = load_diabetes(return_X_y=True)
    with pytest.raises(QuernelError, match=r"the optimisation diverged .* Y is not standardised"):
        FullDeepKernel(1).fit(x[:40], y[:40])
    fitted = FullDeepKernel(1, max_iter=5).fit(x[:40], (y[:40] - y.mean()) / y.std())
    with pytest.raises(QuernelError, match="X must have 10 columns, as in fit; got 3"):
        fitted.predict(x[:, :3])
