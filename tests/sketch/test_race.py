"""``RACE``: unbiased weighted kernel sums, errors that shrink as promised, exact merging and taking back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quernel
from quernel._errors import QuernelError
from quernel.kernels import LSHKernel
from quernel.sketch import RACE
from tests.reference import sketch as oracle

DRAW = np.random.default_rng(0)
X, Q = DRAW.standard_normal((300, 5)), DRAW.standard_normal((12, 5))
SIGNED = DRAW.standard_normal(300)
EVERY = [
    {"kernel": "l2", "width": 3.0},
    {"kernel": "l2", "width": 3.0, "directions": "sparse"},
    {"kernel": "l1", "width": 6.0, "n_cells": 8},
    {"kernel": "angular", "n_cells": None, "n_concat": 4},
    {"kernel": "angular", "n_cells": 16, "n_concat": 3},
]
every_kernel = pytest.mark.parametrize("options", EVERY, ids=str)
# Largest of 12 estimates over their standard error: 1e-6 in all for a normal law, and some for its tails.
SIGMAS = 6.0


@every_kernel
def test_counts_are_those_of_plain_loops(options) -> None:
    sketch = RACE(5, n_rows=24, n_outputs=2, **options)
    weights = DRAW.integers(-3, 4, (300, 2)).astype(float)
    sketch.update(X, weights)
    codes = sketch.family.codes(X)
    np.testing.assert_array_equal(sketch.table, oracle.count(codes, weights, sketch.family.n_codes))
    for agg in ("mean", "mom"):
        wanted = oracle.estimate(sketch.table, sketch.family.codes(Q), sketch.n_cells, agg, 8)
        np.testing.assert_allclose(sketch.query(Q, agg), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(sketch.total, weights.sum(0))


@pytest.mark.parametrize("options", [EVERY[0], *EVERY[2:]], ids=str)
def test_the_mean_over_seeds_is_the_exact_signed_sum(options) -> None:
    # Every row is a seed of its own: 20,000 rows.
    sketch = RACE(5, n_rows=20_000, **options).update(X, SIGNED)
    exact = sketch.kernel.sums(Q, X, SIGNED)
    codes = sketch.family.codes(Q)
    rows = sketch.table[np.arange(20_000), codes, 0]
    if sketch.n_cells is not None:
        rows = (sketch.n_cells * rows - SIGNED.sum()) / (sketch.n_cells - 1)
    error = np.abs(rows.mean(1) - exact) / (rows.std(1) / 20_000**0.5)
    assert error.max() < SIGMAS
    np.testing.assert_allclose(sketch.query(Q), rows.mean(1))
    # The bound of the RACE theorem, with the chance collisions of rehashing.
    kernel = np.abs(SIGNED) * np.sqrt(sketch.kernel(Q, X) + (0 if sketch.n_cells is None else 1 / sketch.n_cells))
    factor = 1.0 if sketch.n_cells is None else sketch.n_cells / (sketch.n_cells - 1)
    assert (rows.std(1) < 1.05 * factor * kernel.sum(1)).all()


def test_two_cells_have_the_variance_of_the_corrected_bound() -> None:
    # 30 equal points that never collide with the query but by chance: variance 900, where no factor would give 450.
    sketch = RACE(1, n_rows=40_000, n_cells=2, width=0.01).update(np.zeros((30, 1)))
    rows = 2 * sketch.table[np.arange(40_000), sketch.family.codes([[1e4]])[0], 0] - 30
    # The square of a row is 900 always; its mean has a standard error of 30 / 200.
    assert np.abs(rows.mean()) < SIGMAS * 0.15
    np.testing.assert_array_equal(rows**2, 900)


@pytest.mark.slow
def test_errors_shrink_like_the_root_of_the_rows() -> None:
    exact = LSHKernel("l2", 3.0).sums(Q, X, SIGNED)
    sizes = 2 ** np.arange(5, 12)
    errors = [
        np.mean([(RACE(5, n_rows=n, width=3.0, seed=s).update(X, SIGNED).query(Q) - exact) ** 2 for s in range(24)])
        ** 0.5
        for n in sizes
    ]
    # 24 seeds, 12 queries: a log error of about 0.05 a size, 0.015 for the slope over six octaves.
    assert -0.6 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < -0.4


def test_the_median_of_means_survives_corrupted_rows() -> None:
    exact = LSHKernel("l2", 3.0).sums(Q, X)
    fails = {"mean": 0, "mom": 0}
    for seed in range(20):
        sketch = RACE(5, n_rows=400, width=3.0, seed=seed).update(X)
        broken = np.random.default_rng(seed).choice(400, 4, replace=False)  # 1 % of the rows
        sketch._table[broken] = 1e4
        for agg in ("mean", "mom"):
            # 16 groups: four broken rows reach four of them at most.
            fails[agg] += int((np.abs(sketch.query(Q, agg, n_groups=16) - exact) > 20).sum())
    assert fails["mean"] == 20 * len(Q)
    assert fails["mom"] < 0.05 * 20 * len(Q)


@given(split=st.integers(0, 300), weight=st.integers(-(2**40), 2**40), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_parts_merge_and_taken_back_items_leave_no_trace(split: int, weight: int, seed: int) -> None:
    whole = RACE(5, n_rows=8, seed=seed).update(X, weight)
    parts = [RACE(5, n_rows=8, seed=seed).update(part, weight) for part in (X[:split], X[split:])]
    np.testing.assert_array_equal(parts[0].merge(parts[1]).table, whole.table)
    assert not whole.update(X[::-1], -weight).table.any()


def test_sets() -> None:
    sets = [list(range(i, i + 30)) for i in range(0, 60, 3)]
    sketch = RACE(kernel="jaccard", n_rows=2000, n_concat=1, n_cells=64).update(sets)
    exact = sketch.kernel.sums(sets, sets)
    # A row's sum of 20 items: standard deviation below 5, 0.11 over 2,000 rows.
    assert np.abs(sketch.query(sets) - exact).max() < 0.8
    assert (sketch.update(sets, -1).table == 0).all()


def test_shapes_one_row_and_density() -> None:
    one, two = RACE(5).update(X), RACE(5, n_outputs=2).update(X, np.stack([SIGNED, SIGNED], 1))
    assert one.query(Q[0]).shape == (1,)
    assert two.query(Q).shape == (12, 2)
    assert one.total == 300.0
    np.testing.assert_array_equal(two.query(Q)[:, 0], two.query(Q)[:, 1])
    np.testing.assert_array_equal([one.query(q)[0] for q in Q], one.query(Q))
    many = np.repeat(Q, 100, axis=0)
    np.testing.assert_array_equal(one.query(many)[::100], one.query(Q))
    with pytest.raises(ValueError, match="read-only"):
        one.table[0] = 1


def test_a_loaded_sketch_goes_on(tmp_path) -> None:
    sketch = RACE(kernel="jaccard", n_rows=16).update([[1, 2], [5]])
    twin = quernel.load(sketch.save(tmp_path))
    assert repr(twin) == repr(sketch)
    np.testing.assert_array_equal(twin.merge(sketch).table, 2 * sketch.table)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: RACE(5, n_cells=1), "n_cells"),
        (lambda: RACE(5, n_cells=None), "n_cells"),
        (lambda: RACE(5, width=0.0), "width"),
        (lambda: RACE(5, width=-1.0), "width"),
        (lambda: RACE(5, n_rows=0), "n_rows"),
        (lambda: RACE(), "dim"),
        (lambda: RACE(5, n_rows=10).query(Q, "mom", n_groups=4), "n_groups must divide n_rows=10"),
        (lambda: RACE(5).query(Q, "median"), "agg"),
        (lambda: RACE(5).query(Q[:, :4]), "q must have shape"),
        (lambda: RACE(5).query(np.full((1, 5), np.nan)), "NaN"),
        (lambda: RACE(5).update(np.full((1, 5), np.inf)), "NaN or infinity"),
        (lambda: RACE(5, width=1e-6).update(np.full((1, 5), 1e6)), "far from zero"),
        (lambda: RACE(5).update(X, np.nan), "weight"),
        (lambda: RACE(5).update(X, np.ones(3)), "weight"),
        (lambda: RACE(5).merge(RACE(5, seed=1)), "seed=0 here and 1 there"),
        (lambda: RACE(5).merge(RACE(5, n_rows=8)), "n_rows"),
        (lambda: RACE(5).merge(RACE(5, kernel="l1")), "kernel"),
    ],
)
def test_bad_input_is_named(call, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        call()


def test_a_bad_item_among_many_changes_nothing() -> None:
    sketch, items = RACE(5), np.repeat(X, 30, axis=0)
    items[-1, 2] = np.nan
    with pytest.raises(QuernelError, match="row 8999"):
        sketch.update(items)
    assert not sketch.table.any()
