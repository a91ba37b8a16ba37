"""Chains hold the rows of every bucket in order of arrival, however they were appended."""

from __future__ import annotations

import numpy as np
import pytest

from quernel.hashing import BucketTables
from quernel.hashing._chains import Chains


@pytest.mark.parametrize("cuts", [(), (1, 2, 2, 30)])
def test_buckets_are_those_of_sorted_tables(cuts: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 7, (60, 3)).astype(np.uint16)
    chains, tables = Chains(3, 8), BucketTables.build(codes, 8)
    for part in np.split(codes, cuts):
        chains.append(part)
    for t in range(3):
        for c in range(8):
            assert chains.bucket(t, c) == tables.bucket(t, c).tolist()
