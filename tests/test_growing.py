"""Appending costs what is appended: nothing that grows is moved at every addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quernel._growing import GrowingArray
from quernel.hashing._chains import Chains
from quernel.search import FlatIndex, FlinngIndex, MaxIPIndex
from quernel.search._ids import IdTable

ADDITIONS = 500
# A moved array gets half as much again: 1.5^17 > 500, and the first rows come with no room to spare.
MOVES = 20


def test_rows_stay_as_they_were() -> None:
    held = GrowingArray(np.zeros((0, 2), np.int16))
    for i in range(20):
        held.append(np.full((i, 2), i, np.int16))
    np.testing.assert_array_equal(held.rows[:, 1], np.repeat(np.arange(20), np.arange(20)))
    assert len(held) == 190


def test_what_it_begins_with_is_not_written_to() -> None:
    first = np.arange(3)
    first.flags.writeable = False
    held = GrowingArray(first)
    assert held.rows.base is first
    held.append(np.array([3, 4]))
    assert held.rows.tolist() == [0, 1, 2, 3, 4] and first.tolist() == [0, 1, 2]


def _ids() -> tuple[Callable[[int], Any], Callable[[], list[Any]]]:
    table = IdTable()
    return lambda i: table.append(np.array([i])), lambda: [table.ids, table.alive]


def _chains() -> tuple[Callable[[int], Any], Callable[[], list[Any]]]:
    chains = Chains(2, 8)
    return lambda i: chains.append(np.array([[i % 8, i % 5]])), lambda: [chains.nexts]


def _vectors() -> tuple[Callable[[int], Any], Callable[[], list[Any]]]:
    index = FlatIndex(3)
    return lambda i: index.add(np.ones((1, 3)) * (i + 1)), lambda: [index.vectors, index._ids.ids]


def _sets() -> tuple[Callable[[int], Any], Callable[[], list[Any]]]:
    index = FlatIndex(metric="jaccard")
    return lambda i: index.add([[i, i + 1]]), lambda: [index._sets.offsets, index._sets.items]


def _products() -> tuple[Callable[[int], Any], Callable[[], list[Any]]]:
    index = MaxIPIndex(3)
    return lambda i: index.add(np.ones((1, 3)) * i), lambda: [index.vectors]


def _group_tests() -> tuple[Callable[[int], Any], Callable[[], list[Any]]]:
    index = FlinngIndex(3, n_groups=4, n_tables=2, bits=3).add(np.ones((8, 3)))
    tests = index._tests
    return lambda i: index.add(np.ones((1, 3))), lambda: [tests.codes, tests.groups, tests._tail_cells.rows]


@pytest.mark.parametrize("make", [_ids, _chains, _vectors, _sets, _products, _group_tests])
def test_many_small_additions_move_few_times(make: Callable[[], Any]) -> None:
    add, arrays = make()
    add(0)
    held, moves = arrays(), np.zeros(len(arrays()), int)
    for i in range(1, ADDITIONS):
        add(i)
        # The old arrays are still held: a new one cannot have an old address.
        now = arrays()
        moves += [
            a.__array_interface__["data"][0] != b.__array_interface__["data"][0] for a, b in zip(held, now, strict=True)
        ]
        held = now
    assert (moves <= MOVES).all() and all(len(a) >= ADDITIONS for a in held)
