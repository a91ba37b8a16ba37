"""The estimator of universal random features: two maps that agree, damping chosen from the data, refusals."""

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.kernels import UniversalRandomFeatures
from quernel.kernels.features import Spectrum, best_damping
from tests.reference import snnk as oracle

# 16,384 columns; single terms have a standard deviation near 2, twelve outputs are compared.
CLOSE = 0.08


def problem(length=0.8):
    draw = np.random.default_rng(2)
    x, w = (length * z / np.linalg.norm(z, axis=1, keepdims=True) for z in draw.standard_normal((2, 4, 10)))
    return x, w[:3], np.array([0.2, -0.5, 1.0])


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "hadamard"])
@pytest.mark.parametrize("activation", ["cos", "sin", "gauss"])
def test_two_maps_estimate_the_layer(activation, projection):
    x, w, b = problem()
    maps = UniversalRandomFeatures(activation, 16384, projection=projection, random_state=0).fit(x)
    estimate = maps.transform(x) @ maps.transform_weights(w, b).T
    wanted = np.vectorize(oracle.ACTIVATIONS[activation])(x @ w.T + b)
    np.testing.assert_allclose(estimate, wanted, atol=CLOSE)


def test_both_maps_must_come_from_one_draw():
    x, _, _ = problem(1.4)
    one, two = (UniversalRandomFeatures("cos", 65536, weight_norm=1.4, random_state=seed).fit(x) for seed in (0, 1))
    wanted = np.cos(1.4**2)  # of every x with itself
    own, other = ((one.transform(x) * m.transform_weights(x)).sum(1) for m in (one, two))
    assert abs(own - wanted).max() < 0.3
    # Independent draws know nothing of w.x: what is left is the product of two means, cos(0).
    assert abs(other - 1.0).max() < 0.3


def test_damping_is_chosen_for_the_lengths_at_hand():
    x, _, _ = problem()
    maps = UniversalRandomFeatures("gauss", 8, weight_norm=0.6, random_state=0).fit(x)
    s = np.pi * np.abs(maps.frequencies_) * (0.8**2 + 0.6**2)
    np.testing.assert_allclose(maps.damping_, best_damping(s, 10))
    np.testing.assert_array_equal(UniversalRandomFeatures(damping=0.3).fit(x).damping_, 0.3)


def test_best_damping_lowers_the_spread():
    x, w, b = problem(1.5)
    errors = {}
    for damping in ("auto", 0.0, 0.5):
        runs = []
        for seed in range(40):
            maps = UniversalRandomFeatures("cos", 64, damping=damping, weight_norm=1.5, random_state=seed).fit(x)
            runs.append(((maps.transform(x) @ maps.transform_weights(w, b).T - np.cos(x @ w.T + b)) ** 2).mean())
        errors[damping] = np.mean(runs)
    assert errors["auto"] < errors[0.0]
    assert errors["auto"] < errors[0.5]


def test_long_rows_and_weights_are_refused():
    x, w, b = problem()
    maps = UniversalRandomFeatures("cos", 16, random_state=0).fit(x)
    with pytest.raises(QuernelError, match="X has rows of length up to 8"):
        maps.transform(10 * x)
    with pytest.raises(QuernelError, match="weight has rows of length up to 8"):
        maps.transform_weights(10 * w)
    with pytest.raises(QuernelError, match="weight must have 10 columns"):
        maps.transform_weights(w[:, :4])
    with pytest.raises(QuernelError, match=r"bias must have shape \(3,\)"):
        maps.transform_weights(w, b[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "no integrable Fourier transform"),
        ({"damping": "best"}, 'damping must be "auto" or a number'),
        ({"damping": -1.0}, "damping must be a finite number in"),
        ({"weight_norm": -1.0}, "weight_norm must be"),
        ({"n_features": 5}, "n_features must be even"),
    ],
)
def test_bad_parameters_are_named_by_fit(options, message):
    with pytest.raises(QuernelError, match=message):
        UniversalRandomFeatures(**options).fit(np.zeros((2, 3)))


def test_a_spectrum_of_one_s_own_works_but_is_not_saved(tmp_path):
    own = Spectrum("dc", lambda draw, n: np.full(n, 1e-9), lambda xi: np.ones(len(xi), complex))
    x, w, b = problem()
    maps = UniversalRandomFeatures(own, 8, random_state=0).fit(x)
    np.testing.assert_allclose(maps.transform(x) @ maps.transform_weights(w, b).T, 1.0, atol=1e-3)
    with pytest.raises(QuernelError, match=r"params\.activation is a Spectrum, which a file cannot hold"):
        maps.save(tmp_path)
