"""Keys order as scores and slots do; selection and rerank against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel.search._best_keys import (
    bars_at,
    best_slots,
    bits_of,
    key_of,
    largest_first,
    rerank,
    score_of,
    sorted_best,
)

FLOATS = st.floats(width=32, allow_nan=False)


@given(FLOATS, st.integers(0, 2**32 - 1), FLOATS, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_larger_keys_are_better_items(a, i, b, j):
    a, b = np.float32(a) + np.float32(0), np.float32(b) + np.float32(0)
    keys = [key_of(s.view(np.int32), slot) for s, slot in ((a, i), (b, j))]
    assert (keys[0] > keys[1]) == ((a, -i) > (b, -j))
    assert bits_of(keys[0]) == a.view(np.int32) and score_of(keys[0]) == a


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=60, unique=True), st.data())
@settings(max_examples=100, deadline=None)
def test_the_largest_come_first_and_the_smallest_of_them_last(keys, data):
    k = data.draw(st.integers(1, len(keys)))
    array = np.array(keys)
    largest_first(array, len(keys), k)
    assert sorted(array[:k].tolist(), reverse=True) == sorted(keys, reverse=True)[:k]
    assert array[k - 1] == min(array[:k])
    assert sorted(array.tolist()) == sorted(keys)


def test_the_best_of_lists_that_are_filled_unequally():
    scores, slots = np.array([3.0, -1.0, 3.0, 0.5], np.float32), np.array([9, 2, 4, 7])
    row = [key_of(s.view(np.int32), slot) for s, slot in zip(scores, slots, strict=True)]
    keys, held = np.array([row, row, row]), np.array([4, 1, 0])
    found, best = np.empty((3, 3), np.float32), np.empty((3, 3), np.int64)
    sorted_best(keys.copy(), held, found, best)
    assert best.tolist() == [[4, 9, 7], [9, -1, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(found[0], [3.0, 3.0, 0.5])
    assert np.isnan(found[1:]).sum() == 5
    unsorted, bars = np.empty((3, 2), np.int64), np.empty(3, np.float32)
    best_slots(keys.copy(), held, unsorted)
    assert set(unsorted[0]) == {4, 9} and unsorted[1:].tolist() == [[9, -1], [-1, -1]]
    bars_at(keys, held, 3, bars)
    assert bars.tolist() == [0.5, -np.inf, -np.inf]


@pytest.mark.parametrize("unit", [False, True])
def test_candidates_are_ordered_by_their_prefixes(unit):
    draw = np.random.default_rng(0)
    items, queries = (draw.standard_normal((n, 7)).astype(np.float32) for n in (30, 4))
    items[5] = 0
    slots = np.stack([draw.permutation(30)[:9] for _ in range(4)])
    slots[:, 0], slots[2, 3] = 5, -1
    scores, best = np.empty((4, 6), np.float32), np.empty((4, 6), np.int64)
    rerank(queries, items, slots, slots, 4, unit, np.empty(9, np.int64), scores, best)
    for i in range(4):
        mine = slots[i][slots[i] >= 0]
        exact = items[mine, :4].astype(float) @ queries[i, :4]
        exact = exact / np.maximum(np.linalg.norm(items[mine, :4].astype(float), axis=1), 1e-30) if unit else exact
        order = np.argsort(-exact, kind="stable")[:6]
        assert best[i].tolist() == mine[order].tolist()
        np.testing.assert_allclose(scores[i], exact[order], rtol=1e-5, atol=1e-6)  # float32 sums in another order
