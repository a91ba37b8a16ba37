"""RaggedVectors: lists go in and come out, whatever they are kept as."""

from __future__ import annotations

import numpy as np
import pytest

from quernel.search._ragged import Ragged, RaggedVectors


def lists(sizes: list[int], seed: int = 0) -> Ragged:
    draw = np.random.default_rng(seed)
    return Ragged.of("x", [draw.standard_normal((n, 5)) for n in sizes], 5)


# Half a step of int8 relative to the largest coordinate, a bit of float16, nothing.
ERRORS = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}


@pytest.mark.parametrize("dtype", ERRORS)
def test_lists_come_back(dtype: str) -> None:
    given = lists([3, 1, 4, 2, 6])
    store = RaggedVectors(5, dtype)  # type: ignore[arg-type]
    for part in (given[:2], given[2:2], given[2:]):
        store.append(part)
    assert len(store) == 5
    np.testing.assert_array_equal(store.offsets, given.offsets)
    room = ERRORS[dtype] * np.abs(given.rows).max(1, keepdims=True) * (1 + 1e-6)
    assert (np.abs(store.values() - given.rows) <= room).all()
    assert (np.abs(store.values(4, 9) - given.rows[4:9]) <= room[4:9]).all()
    offsets, rows, scales = store.gathered(np.array([4, 1, 1]))
    assert offsets.tolist() == [0, 6, 7, 8]
    places = [*range(10, 16), 3, 3]
    np.testing.assert_array_equal(rows, store.rows[places])
    np.testing.assert_array_equal(scales, store.scales[places] if dtype == "int8" else [])
    store.keep(np.array([True, False, True, False, False]))
    assert store.offsets.tolist() == [0, 3, 7]
    twin = RaggedVectors(5, dtype)  # type: ignore[arg-type]
    twin.restore(store.arrays(), 2)
    np.testing.assert_array_equal(twin.values(), store.values())


def test_int8_keeps_zeros_and_the_largest_coordinate() -> None:
    store = RaggedVectors(2, "int8")
    store.append(Ragged.of("x", [[[0.0, 0.0], [3.0, -1.5]], [[-1e-30, 0.0]]], 2))
    np.testing.assert_allclose(store.values(), [[0, 0], [3, -1.5], [-1e-30, 0]], rtol=0.01)


def test_slices_of_lists_are_lists() -> None:
    given = lists([3, 1, 4])
    assert len(given[5:]) == 0 and given[1:1].rows.shape == (0, 5)
    np.testing.assert_array_equal(given[1:].rows, given.rows[3:])
    assert given[1:].offsets.tolist() == [0, 1, 5]
    np.testing.assert_array_equal(Ragged.of("x", given, 5).rows, given.rows)
