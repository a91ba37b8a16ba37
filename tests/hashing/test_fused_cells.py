"""Fused cells: those of the family bit for bit, one row as many rows, threads or not, and nothing out of range read."""

from __future__ import annotations

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.hashing import PStable, SignProjection
from quernel.hashing._cell_kernels import hash_rows
from quernel.hashing._fused_cells import FusedCells, Projection, fused_cells
from tests.reference import sketch as oracle

FAMILIES = [
    PStable(7, 5, 1, 3.0, 11, seed=1),
    PStable(7, 65, 3, 3.0, 32, norm="l1", seed=2),
    PStable(7, 40, 2, 3.0, 2**32, directions="sparse", seed=3),
    PStable(1, 3, 2, 0.5, 2, directions="rademacher", seed=4),
    SignProjection(7, 9, 5, seed=5),
    SignProjection(7, 70, 2, 6, directions="sparse", seed=6),
    SignProjection(100, 33, 12, seed=7),
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=repr)


def rows(n: int, dim: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, dim)).astype(np.float32)


@every_family
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 1000])
def test_cells_are_the_family_s(family, n: int) -> None:
    x = rows(n, family.dim)
    got = FusedCells(family).cells(x)
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, family.codes(x))


@every_family
def test_a_projection_comes_before(family) -> None:
    x, a, s = rows(37, 12), rows(family.dim, 12), rows(1, family.dim)[0]
    before = Projection.of(a, s)
    # The fused product sums one column after the other in float32, as this loop does but for fused rounding.
    hidden = (x.astype(np.float64) @ a.T.astype(np.float64) + s).astype(np.float32)
    got = FusedCells(family).cells(x, before)
    assert (got == family.codes(hidden)).mean() > 0.999


@every_family
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.int8])
@pytest.mark.parametrize("outputs", [1, 3])
def test_sums_are_what_the_cells_hold(family, dtype, outputs: int) -> None:
    if family.n_codes > 2**16:
        pytest.skip("a table of 2^32 cells is nothing to hold")
    draw, x = np.random.default_rng(0), rows(21, family.dim)
    table = draw.integers(-99, 99, (family.n_tables, family.n_codes, outputs)).astype(dtype)
    scale = draw.uniform(0.5, 2, family.n_tables).astype(np.float64 if dtype == np.float64 else np.float32)
    fused = FusedCells(family)
    got = fused.sums(x, table, scale)
    wanted = oracle.read(table, scale, family.codes(x), np.zeros(outputs))
    assert got.dtype == scale.dtype
    np.testing.assert_allclose(got[:, 0], wanted, rtol=1e-5, atol=1e-2)
    np.testing.assert_array_equal(np.concatenate([fused.sums(x[i : i + 1], table, scale) for i in range(21)]), got)
    if family.n_tables % 3 == 0:
        groups = fused.sums(x, table, scale, n_groups=3)
        np.testing.assert_allclose(groups.sum(1), got[:, 0], rtol=1e-5, atol=1e-2)


def test_threads_change_nothing() -> None:
    family, x = FAMILIES[1], rows(3000, 7)
    fused, table, scale = FusedCells(family), rows(65 * 32, 1).reshape(65, 32, 1), np.ones(65, np.float32)
    with threads(1):
        wanted = fused.sums(x, table, scale), fused.cells(x)
    with threads(2):
        got = fused.sums(x, table, scale), fused.cells(x)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[4]], ids=repr)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(family, value: float) -> None:
    x = rows(700, 7)
    x[600, 3] = value
    fused, scale = FusedCells(family), np.ones(family.n_tables, np.float32)
    table = np.zeros((family.n_tables, family.n_codes, 1), np.float32)
    for call in (lambda: fused.cells(x), lambda: fused.sums(x, table, scale), lambda: fused.check(x)):
        with pytest.raises(QuernelError, match="row 600"):
            call()


def test_rows_beyond_float32_s_integers_are_refused() -> None:
    fused = FusedCells(PStable(2, 3, 1, 1e-3, 8))
    with pytest.raises(QuernelError, match="larger width"):
        fused.cells(np.full((1, 2), 1e5, np.float32))
    # A Cauchy direction is often long; that is no reason to refuse a row near zero.
    assert FusedCells(PStable(2, 20_000, 1, 1.0, 8, norm="l1")).cells(rows(50, 2)).shape == (50, 20_000)


@pytest.mark.parametrize("x", [rows(3, 6), rows(3, 7).astype(np.float64), rows(3, 7)[0]], ids=["6", "f8", "1d"])
def test_rows_of_another_form_are_refused(x: np.ndarray) -> None:
    with pytest.raises(QuernelError, match="rows must"):
        FusedCells(FAMILIES[0]).cells(x)


def test_rows_in_any_memory_are_taken() -> None:
    x, fused = rows(3, 7), FusedCells(FAMILIES[0])
    wide, frozen = np.repeat(x, 2, axis=1)[:, ::2], x.copy()
    frozen.flags.writeable = False
    odd = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(3, 7)
    for other in (wide, frozen, odd, np.asfortranarray(x)):
        assert not other.flags.carray
        np.testing.assert_array_equal(fused.cells(other), fused.cells(x))
    assert len(hash_rows.signatures) <= 2


def test_tables_of_another_form_are_refused() -> None:
    fused = FusedCells(FAMILIES[0])
    for shape, scales in (((5, 10, 1), 5), ((4, 11, 1), 5), ((5, 11, 1), 4)):
        with pytest.raises(QuernelError, match="table must"):
            fused.sums(rows(1, 7), np.zeros(shape, np.float32), np.ones(scales, np.float32))


def test_equal_arguments_share_their_arrays() -> None:
    arguments = ("l2", 4, 8, 2, 16, 4.0, "gaussian", 3)
    assert fused_cells(*arguments) is fused_cells(*arguments)
