"""Representer estimators: as good as the machine they sketch, in bytes that are counted, told apart by their seed."""

from __future__ import annotations

import numpy as np
import pytest

import quernel
from quernel._errors import QuernelError
from quernel.kernels import LSHKernelMachine
from quernel.sketch import RepresenterClassifier, RepresenterRegressor

DRAW = np.random.default_rng(0)
X = DRAW.uniform(-1, 1, (3000, 4))
Y = np.sin(3 * X[:, 0]) + X[:, 1] * X[:, 2]
SMALL = {"n_anchors": 100, "proj_dim": 4, "n_steps": 400, "learning_rate": 1e-2, "random_state": 0}


@pytest.mark.slow
def test_a_sketch_keeps_up_with_its_machine() -> None:
    train, test = slice(0, 2000), slice(2000, None)
    machine = LSHKernelMachine(**SMALL).fit(X[train], Y[train])
    sketches = {
        bits: RepresenterRegressor(400, bits=bits, finetune_epochs=20, **SMALL).fit(X[train], Y[train])
        for bits in (32, 16, 8)
    }
    scores = {bits: sketch.score(X[test], Y[test]) for bits, sketch in sketches.items()}
    assert min(scores.values()) > machine.score(X[test], Y[test]) - 0.04
    raw = RepresenterRegressor(400, finetune_epochs=0, **SMALL).fit(X[train], Y[train])
    assert raw.score(X[test], Y[test]) < scores[16]
    assert [sketches[b].nbytes for b in (32, 16, 8)] == [
        400 * 16 * b // 8 + (1600 if b < 32 else 0) + 84 for b in (32, 16, 8)
    ]


@pytest.mark.parametrize("kernel", ["l2", "l1", "angular"])
def test_saved_sketches_answer_the_same_and_so_does_the_fast_path(kernel: str, tmp_path) -> None:
    options = {**SMALL, "n_steps": 30, "kernel": kernel, "directions": "gaussian" if kernel == "l1" else "sparse"}
    model = RepresenterRegressor(50, 8, **options).fit(X, Y)
    twin = quernel.load(model.save(tmp_path))
    np.testing.assert_array_equal(twin.predict(X), model.predict(X))
    np.testing.assert_array_equal(model.predictor()(X[5:6])[:, 0], model.predict(X)[5:6].astype(np.float32))


def test_labels() -> None:
    labels = np.where(Y > 0.3, "high", np.where(Y < -0.3, "low", "middle"))
    model = RepresenterClassifier(200, **SMALL).fit(X, labels)
    assert model.score(X, labels) > 0.8
    np.testing.assert_allclose(model.predict_proba(X[:9]).sum(1), 1, atol=1e-6)
    assert model.decision_function(X[:9]).shape == (9, 3)
    two = RepresenterClassifier(100, **{**SMALL, "n_steps": 100}).fit(X, labels == "low")
    np.testing.assert_array_equal(two.predict(X), two.decision_function(X) > 0)


def test_another_random_state_draws_other_hashes() -> None:
    first, second = (RepresenterRegressor(20, **{**SMALL, "n_steps": 5, "random_state": s}).fit(X, Y) for s in (0, 1))
    assert first.hash_seed_ != second.hash_seed_


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"n_cells": 1}, "n_cells"),
        ({"n_rows": 0}, "n_rows"),
        ({"width": -1.0}, "width"),
        ({"bits": 4}, "bits"),
        ({"finetune_epochs": -1}, "finetune_epochs"),
        ({"finetune_rate": 0.0}, "finetune_rate"),
    ],
)
def test_parameters_that_are_no_good_are_named(options, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        RepresenterRegressor(**options).fit(X, Y)
