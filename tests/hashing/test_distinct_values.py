"""``BucketTables.build(values=...)``: every bucket holds each value once, ascending, in the dtype given."""

from __future__ import annotations

import numpy as np
import pytest

from quernel._timing import threads
from quernel.hashing import BucketTables


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
@pytest.mark.parametrize(
    ("n", "tables", "each", "n_codes"), [(0, 2, 3, 4), (1, 1, 1, 1), (300, 5, 3, 16), (97, 3, 2, 1000)]
)
def test_buckets_hold_each_value_once(kind: type, n: int, tables: int, each: int, n_codes: int) -> None:
    draw = np.random.default_rng(n)
    codes = draw.integers(0, n_codes, (n, tables)).astype(np.uint32 if n_codes > 100 else np.uint16)
    values = draw.integers(0, 40, (n, each)).astype(kind)
    held = BucketTables.build(codes, n_codes, values=values)
    assert held.items.dtype == kind and held.n_tables == tables
    for t in range(tables):
        for c in np.unique(codes[:, t]) if n else []:
            np.testing.assert_array_equal(held.bucket(t, int(c)), np.unique(values[codes[:, t] == c]))
    assert held.offsets[-1] == len(held.items)
    with threads(2):
        again = BucketTables.build(codes, n_codes, values=values)
    np.testing.assert_array_equal(held.items, again.items)
    np.testing.assert_array_equal(held.offsets, again.offsets)


def test_negative_values_are_values_too() -> None:
    held = BucketTables.build(np.zeros((3, 1), np.uint32), 1, values=np.array([[-1], [-5], [-1]], np.int32))
    assert held.bucket(0, 0).tolist() == [-5, -1]
