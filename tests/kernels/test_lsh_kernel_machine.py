"""Kernel machines: answers by their definition, students of a teacher, penalties that do what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels import LSHKernel, LSHKernelClassifier, LSHKernelMachine

DRAW = np.random.default_rng(0)
X = DRAW.uniform(-1, 1, (600, 3)) * [1, 10, 100] + [0, 5, -300]
Y = np.stack([np.sin(3 * X[:, 0]) + (X[:, 1] / 10 - 0.5) ** 2, 100 * np.abs((X[:, 2] + 300) / 100)], axis=1)
SMALL = {"n_anchors": 60, "proj_dim": 4, "n_steps": 500, "learning_rate": 2e-2, "random_state": 0}


@pytest.mark.parametrize("kernel", ["l2", "l1", "angular"])
def test_answers_are_sums_of_the_exact_kernel(kernel: str) -> None:
    model = LSHKernelMachine(**{**SMALL, "kernel": kernel, "n_steps": 20}).fit(X, Y)
    hidden = X @ model.projection_.T + model.shift_
    k = LSHKernel(kernel, model.width, model.n_concat)(hidden, model.anchors_)  # type: ignore[arg-type]
    np.testing.assert_allclose(model.predict(X), k @ model.weights_ + model.intercept_, rtol=1e-6)
    noise = np.sqrt(k) @ np.abs(model.weights_)
    np.testing.assert_allclose(model.sketch_noise(X), noise, rtol=1e-6)


def test_columns_of_any_scale_are_learned_and_nothing_depends_on_the_scale() -> None:
    model = LSHKernelMachine(**SMALL).fit(X, Y)
    assert model.score(X, Y) > 0.9
    twin = LSHKernelMachine(**SMALL).fit(X * 1000, Y)
    np.testing.assert_allclose(twin.predict(X * 1000), model.predict(X), rtol=1e-3, atol=1e-2)


def test_one_target_and_a_column_of_it_are_told_apart() -> None:
    flat, column = (LSHKernelMachine(**{**SMALL, "n_steps": 5}).fit(X, y) for y in (Y[:, 0], Y[:, :1]))
    assert flat.predict(X).shape == (600,)
    assert column.predict(X).shape == (600, 1)
    np.testing.assert_array_equal(flat.predict(X), column.predict(X)[:, 0])


def test_the_penalty_lowers_the_noise_of_a_sketch() -> None:
    free, tight = (LSHKernelMachine(**{**SMALL, "l1": l1}).fit(X, Y[:, 0]) for l1 in (0.0, 1e-2))
    assert tight.sketch_noise(X).mean() < 0.7 * free.sketch_noise(X).mean()


def test_constant_columns_and_targets_are_no_trouble() -> None:
    x = np.concatenate([X, np.full((600, 1), 1e6)], axis=1)
    model = LSHKernelMachine(**{**SMALL, "n_steps": 50}).fit(x, np.full(600, 7.0))
    # The error of targets that are all 0 after centring.
    np.testing.assert_allclose(model.predict(x), 7, atol=0.5)


def test_labels_of_three_classes_with_probabilities() -> None:
    labels = np.array(["a", "b", "c"])[(X[:, 0] > -0.3).astype(int) + (X[:, 1] > 8)]
    model = LSHKernelClassifier(**SMALL).fit(X, labels)
    assert model.score(X, labels) > 0.93
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1, atol=1e-6)
    two = LSHKernelClassifier(**{**SMALL, "n_steps": 20}).fit(X, labels == "a")
    np.testing.assert_array_equal(two.predict(X), two.decision_function(X) > 0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"width": 0.0}, "width"),
        ({"kernel": "jaccard"}, "kernel"),
        ({"n_anchors": 0}, "n_anchors"),
        ({"proj_dim": 2.5}, "proj_dim"),
        ({"l1": -1.0}, "l1"),
        ({"n_concat": 0}, "n_concat"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"random_state": "seed"}, "seed"),
    ],
)
def test_parameters_that_are_no_good_are_named(options, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        LSHKernelMachine(**options).fit(X, Y)


def test_training_needs_no_gradient_mode() -> None:
    with torch.no_grad():
        model = LSHKernelMachine(**{**SMALL, "n_steps": 3}).fit(X, Y)
    assert model.projection_.shape == (4, 3)
