"""BucketTables against a dictionary of lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quernel._errors import QuernelError
from quernel.hashing import BucketTables
from tests.reference import hashing as oracle

SHAPES = st.tuples(st.integers(0, 12), st.integers(1, 4))


@given(codes=SHAPES.flatmap(lambda s: hnp.arrays(np.uint32, s, elements=st.integers(0, 6))))
@settings(max_examples=150, deadline=None)
def test_buckets_equal_a_dictionary(codes):
    tables = BucketTables.build(codes, 7)
    wanted = oracle.buckets(codes)
    assert tables.n_tables == codes.shape[1] and len(tables.items) == codes.size
    for table in range(codes.shape[1]):
        for code in range(7):
            assert tables.bucket(table, code).tolist() == wanted.get((table, code), [])


@given(codes=SHAPES.flatmap(lambda s: hnp.arrays(np.uint32, s, elements=st.integers(0, 4))), data=st.data())
@settings(max_examples=150, deadline=None)
def test_values_are_kept_once(codes, data):
    shape = (len(codes), data.draw(st.integers(1, 3)))
    values = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(-3, 3)))
    tables = BucketTables.build(codes, 5, values)
    wanted = oracle.buckets(codes, values)
    for table in range(codes.shape[1]):
        for code in range(5):
            assert tables.bucket(table, code).tolist() == wanted.get((table, code), [])
    assert len(tables.items) == sum(map(len, wanted.values()))


def test_bytes_are_those_of_the_arrays():
    tables = BucketTables.build(np.zeros((10, 3), np.uint32), 4)
    assert tables.nbytes == 8 * (3 * 4 + 1) + 4 * 30
    assert np.shares_memory(tables.bucket(0, 0), tables.items)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BucketTables.build(np.zeros(3, np.uint32), 4), r"codes must have shape \(n, tables\); got \(3,\)"),
        (lambda: BucketTables.build(np.full((1, 1), 4, np.uint32), 4), "codes must be below n_codes=4; got 4"),
        (lambda: BucketTables.build(np.zeros((1, 1), np.uint32), 0), "n_codes must be"),
        (lambda: BucketTables.build(np.full((1, 1), -1), 4), "codes must be"),
        (lambda: BucketTables.build(np.full((1, 1), 0.5), 4), "codes must have shape .* float64"),
        (
            lambda: BucketTables.build(np.zeros((2, 1), np.uint32), 4, np.zeros(2, np.int32)),
            r"values must have shape \(2, values\); got \(2,\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
