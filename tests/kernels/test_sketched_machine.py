"""A machine and its table: unbiased, tuned towards what is asked, rounded by a scale a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.hashing._fused_cells import Projection
from quernel.kernels._machine_training import Machine, Settings
from quernel.kernels._sketched_machine import (
    Cells,
    Predictor,
    cells_of,
    look_up,
    round_table,
    sketch_machine,
    tune_table,
)

SETTINGS = Settings(n_anchors=50, proj_dim=4)
GENERATOR = torch.Generator().manual_seed(0)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


MACHINE = Machine(tensor(4, 6), tensor(4), tensor(50, 4), tensor(50, 2), tensor(2))
X = tensor(20, 6)


@pytest.mark.parametrize("options", [("l2", 16), ("l1", 8), ("angular", 8), ("angular", None)], ids=str)
def test_many_rows_come_to_the_machine_s_answers(options) -> None:
    kernel, n_cells = options
    settings = Settings(n_anchors=50, proj_dim=4, kernel=kernel)
    cells = Cells.of(settings, 20_000, n_cells, "gaussian", seed=1)
    table = sketch_machine(MACHINE, cells)
    before = Projection.of(MACHINE.projection.numpy(), MACHINE.shift.numpy())
    got = look_up(cells_of(X, before, cells), *table)
    wanted = MACHINE(X, kernel, 4.0, 2)
    # A row's sum has a standard deviation below sum |alpha| = 40; six standard errors of 20,000 rows.
    assert float((got - wanted).abs().max()) < 6 * 40 / 20_000**0.5
    predictor = Predictor(cells, MACHINE.projection.numpy(), MACHINE.shift.numpy(), *map(np.asarray, (
        table.values, np.ones(20_000, np.float32), table.intercept)))  # fmt: skip
    np.testing.assert_allclose(predictor(X.numpy()), got.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(predictor(X.numpy()[3:4]), predictor(X.numpy())[3:4])


def test_tuning_brings_a_coarse_sketch_to_its_targets() -> None:
    cells = Cells.of(SETTINGS, 60, 8, "gaussian", 0)
    before = Projection.of(MACHINE.projection.numpy(), MACHINE.shift.numpy())
    x = tensor(2000, 6)
    wanted, table = MACHINE(x, "l2", 4.0, 2), sketch_machine(MACHINE, cells)
    options = {"batch_size": 100, "learning_rate": 0.05}

    def error(table) -> float:
        return float((look_up(cells_of(x, before, cells), *table) - wanted).norm() / wanted.norm())

    tuned = tune_table(table, x, wanted, before, cells, np.random.default_rng(0), epochs=10, **options)
    assert error(tuned) < 0.6 * error(table)
    same = tune_table(table, x, wanted, before, cells, np.random.default_rng(0), epochs=0, **options)
    assert same is table
    again = tune_table(table, x, wanted, before, cells, np.random.default_rng(0), epochs=10, **options)
    assert torch.equal(again.values, tuned.values)


def test_tuning_on_labels_lowers_the_cross_entropy() -> None:
    cells = Cells.of(SETTINGS, 60, 8, "sparse", 0)
    before = Projection.of(MACHINE.projection.numpy(), MACHINE.shift.numpy())
    x = tensor(1000, 6)
    labels = (x[:, 0] > 0).long()
    table = sketch_machine(MACHINE, cells)
    tuned = tune_table(
        table, x, labels, before, cells, np.random.default_rng(0), epochs=5, batch_size=64, learning_rate=0.1,
        loss="logistic",
    )  # fmt: skip

    def accuracy(table) -> float:
        return float((look_up(cells_of(x, before, cells), *table).argmax(1) == labels).float().mean())

    assert accuracy(table) < 0.6
    assert accuracy(tuned) > 0.7


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_to_the_nearest_step_of_the_row(bits: int) -> None:
    values = tensor(5, 4, 3)
    values[2] = 0
    codes, scale = round_table(values, bits)
    assert codes.dtype == (torch.int8 if bits == 8 else torch.int16)
    error = (codes * scale[:, None, None] - values).abs()
    assert (error <= 0.5001 * scale[:, None, None]).all()
    assert not codes[2].any()
    assert codes.abs().amax((1, 2))[[0, 1, 3, 4]].tolist() == [2 ** (bits - 1) - 1] * 4


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_cells": 1}, "n_cells"),
        ({"n_cells": None}, "n_cells"),
        ({"n_rows": 0}, "n_rows"),
        ({"width": 0.0}, "width"),
        ({"kernel": "jaccard"}, "kernel"),
        ({"directions": "dense"}, "directions"),
        ({"seed": -1}, "seed"),
    ],
)
def test_hashes_that_are_no_good_are_named(change, word: str) -> None:
    fields = vars(Cells.of(SETTINGS, 8, 4, "gaussian", 0))
    with pytest.raises(QuernelError, match=word):
        Cells(**{**fields, **change})
