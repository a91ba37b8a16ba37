"""Touched counters: counted like ``numpy.unique``, sorted by count in stable order, and left at zero."""

from __future__ import annotations

import numpy as np
import pytest

from quernel.hashing._touched import clear_touched, count_touched, sort_by_count


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_counts_and_order(kind: type) -> None:
    draw = np.random.default_rng(0)
    counts, touched, order = np.zeros(50, kind), np.full(51, -1, np.int32), np.full(50, -1, np.int32)
    ends = np.full(202, -1, np.int64)
    for _ in range(3):  # what one query leaves behind must not be seen by the next
        values = draw.integers(0, 50, 200).astype(np.uint16)
        n = count_touched(values, 0, 120, counts, touched, 0)
        n = count_touched(values, 120, 200, counts, touched, n)
        wanted = np.bincount(values, minlength=50)
        np.testing.assert_array_equal(counts, wanted)
        first_seen = list(dict.fromkeys(values.tolist()))
        assert touched[:n].tolist() == first_seen
        sort_by_count(touched, n, counts, order, ends)
        assert order[:n].tolist() == sorted(first_seen, key=lambda v: -wanted[v])
        for c in range(1, 200):
            assert (wanted[order[ends[c + 1] : ends[c]]] == c).all()
        clear_touched(touched, n, counts)
        assert not counts.any()


def test_every_counter_touched_needs_the_spare_place() -> None:
    counts, touched = np.zeros(4, np.uint8), np.zeros(5, np.int32)
    assert count_touched(np.array([0, 1, 2, 3, 3, 0], np.int32), 0, 6, counts, touched, 0) == 4
    assert counts.tolist() == [2, 1, 1, 2]
