"""PermutationLearner: every input of every small permutation, large ones at random, trained networks, refusals."""

import numpy as np
import pytest

import quernel
from quernel._errors import QuernelError
from quernel.apps import PermutationLearner
from quernel.kernels import EnsemblePlan, NTKernel, ntk_dynamics
from tests.reference import ntk_permutations as reference

ENSEMBLE = {"mode": "ensemble", "width": 512, "random_state": 0}


def moved(bits, places):
    """Return bits with bit i at place places[i]."""
    result = np.zeros_like(bits)
    result[:, places] = bits
    return result


def right(learner, bits, places):
    """Return the share of inputs that come out right in every bit."""
    return float((learner.predict(bits) == moved(bits, places)).all(1).mean())


@pytest.mark.parametrize("rounding", ["sign", "midpoint"])
@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_every_input_comes_out_right(k, rounding):
    bits = reference.all_inputs(k)
    for seed in range(20):
        places = np.random.default_rng(seed).permutation(k)
        assert right(PermutationLearner(rounding).fit(places), bits, places) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["sign", "midpoint"])
@pytest.mark.parametrize("k", [10, 11, 12, 13, 14])
def test_every_input_of_longer_permutations_comes_out_right(k, rounding):
    test_every_input_comes_out_right(k, rounding)


@pytest.mark.parametrize(("count"), [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_two_hundred_bits(count):
    draw = np.random.default_rng(0)
    places = draw.permutation(200)
    # Every number of ones, not only a half of them.
    bits = (draw.random((count, 200)) < draw.random((count, 1))).astype(int)
    bits = bits[bits.any(1)]
    for rounding in ("sign", "midpoint"):
        assert right(PermutationLearner(rounding).fit(places), bits, places) == 1


def test_outputs_are_those_of_kernel_regression():
    k, places = 7, np.random.default_rng(0).permutation(7)
    bits = reference.all_inputs(k)
    unit = bits / np.linalg.norm(bits, axis=1, keepdims=True)
    learner = PermutationLearner().fit(places)
    wanted = ntk_dynamics(NTKernel(), np.eye(k), learner.targets_, unit).mean
    np.testing.assert_allclose(learner.decision_function(bits), wanted, atol=1e-12)


def test_a_permutation_is_given_in_three_ways():
    places = np.array([2, 0, 3, 1])
    matrix = np.zeros((4, 4))
    matrix[places, np.arange(4)] = 1  # P e_i = e_places[i]
    order = [3, 1, 0, 2]
    pairs = np.eye(4)[order], np.eye(4)[places[order]]
    learners = [PermutationLearner().fit(places), PermutationLearner().fit(matrix), PermutationLearner().fit(*pairs)]
    bits = reference.all_inputs(4)
    for learner in learners:
        np.testing.assert_array_equal(learner.predict(bits), bits @ matrix.T)


def test_what_is_learned_are_the_targets():
    # Not read off: the answer follows the kernel and the targets, whatever they are.
    learner = PermutationLearner().fit([0, 1, 2])
    learner.targets_ = np.eye(3)[[1, 2, 0]]
    assert learner.predict([[1, 0, 1]]).tolist() == [[1, 1, 0]]
    half = PermutationLearner("sign").fit([0, 1, 2])
    half.targets_ = -half.targets_
    assert half.predict([[1, 1, 0]]).tolist() == [[0, 0, 1]]


def test_planned_networks_learn_a_permutation():
    places = np.array([3, 0, 4, 1, 2])
    seen = []
    learner = PermutationLearner(**ENSEMBLE, delta=1e-3).fit(places, progress=lambda *step: seen.append(step))
    assert learner.n_models_ == EnsemblePlan(5, 1e-3).n_models == len(learner.hidden_)
    assert learner.loss_ <= learner.tol
    assert right(learner, reference.all_inputs(5), places) == 1
    assert seen[-1] == (f"{learner.n_models_} of {learner.n_models_} networks trained", 1.0)


def test_sign_rounding_of_trained_networks_knows_the_training_vectors():
    learner = PermutationLearner("sign", **ENSEMBLE, n_models=2, tol=1e-6).fit([1, 2, 0])
    assert right(learner, np.eye(3, dtype=int), [1, 2, 0]) == 1


def test_the_seed_decides():
    bits = reference.all_inputs(3)
    outputs = [
        PermutationLearner(**{**ENSEMBLE, "random_state": seed}, n_models=2).fit([0, 2, 1]).decision_function(bits)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {**ENSEMBLE, "n_models": 2}])
def test_it_comes_back_from_a_folder(options, tmp_path):
    learner = PermutationLearner(**options).fit([1, 2, 0])
    loaded = quernel.load(learner.save(tmp_path))
    bits = reference.all_inputs(3)
    np.testing.assert_array_equal(loaded.decision_function(bits), learner.decision_function(bits))
    np.testing.assert_array_equal(loaded.predict(bits), learner.predict(bits))
    assert quernel.load(PermutationLearner(**options).save(tmp_path / "unfitted")).get_params() == learner.get_params()


def test_a_state_that_does_not_fit_is_refused():
    learner = PermutationLearner(**ENSEMBLE, n_models=2).fit([1, 2, 0])
    learner.n_models_ = 3
    with pytest.raises(QuernelError, match="hidden_ must hold n_models_ networks"):
        learner.check_state()
    learner = PermutationLearner().fit([1, 2, 0])
    learner.targets_ = learner.targets_ * 2
    with pytest.raises(QuernelError, match="targets_ must be of shape"):
        learner.check_state()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0, 0, 1],), "places must be 0 to k - 1"),
        (([0.0, 1.0],), "places must be 0 to k - 1"),
        (([0],), "k >= 2 bits; got 1"),
        ((np.eye(1),), "k >= 2 bits"),
        ((np.ones((3, 3)),), "a single 1 in every row and column"),
        ((np.eye(3) * 2,), "a single 1"),
        ((np.eye(3)[:2],), "a single 1"),
        ((np.eye(3), np.ones((3, 3))), "Y must be of shape"),
        ((np.ones((3, 3)), np.eye(3)), "X must be of shape"),
        ((np.eye(3), np.eye(2)), "one shape"),
    ],
)
def test_what_is_no_permutation_is_refused(given, message):
    with pytest.raises(QuernelError, match=message):
        PermutationLearner().fit(*given)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([[1, 0, 0], [0, 0, 0]], "row 1 of X is zero"),
        ([[1, 2, 0]], "0 and 1 only"),
        ([[0.5, 0.5, 0.0]], "0 and 1 only"),
        ([[np.nan, 1, 0]], "0 and 1 only"),
        ([[1, 0]], r"X must have shape \(n, 3\)"),
        ([1, 0, 1], "X must have shape"),
        ([["a", "b", "c"]], "X must have shape"),
    ],
)
def test_what_is_no_input_is_refused(bits, message):
    with pytest.raises(QuernelError, match=message):
        PermutationLearner().fit([2, 0, 1]).predict(bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of"),
        ({"mode": "guess"}, "mode must be one of"),
        ({"width": 0}, "width must be"),
        ({"n_models": 0}, "n_models must be"),
        ({"delta": 1.5}, "delta must be"),
        ({"scope": "one"}, "scope must be one of"),
        ({"tol": 0.0}, "tol must be"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"random_state": -1}, "random_state must be"),
        ({"mode": "ensemble", "lr": 100.0}, "lr must be below 2 /"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(QuernelError, match=message):
        PermutationLearner(**options).fit([1, 0])


def test_no_rows_have_no_answer():
    assert PermutationLearner().fit([1, 0]).predict(np.empty((0, 2))).shape == (0, 2)
