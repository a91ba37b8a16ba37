"""MinHash: its definition, collisions by the Jaccard similarity also where sets are smaller than the bins, sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from quernel._errors import QuernelError
from quernel.hashing import MinHash, Sets, jaccard_similarity
from tests.reference import hashing as oracle

ITEMS = st.lists(st.integers(0, 2**40), min_size=1, max_size=30)


@given(sets=st.lists(ITEMS, min_size=1, max_size=4), bins=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_equals_the_definition(sets, bins, seed):
    raw = MinHash(bins, 1, seed=seed).raw(sets)
    assert raw[..., 0].tolist() == [oracle.min_hashes(items, bins, seed) for items in sets]


@pytest.mark.parametrize(("shared", "each"), [(1, 1), (2, 0), (3, 5), (9, 1), (0, 4), (60, 20), (400, 600)])
def test_collisions_follow_the_jaccard_similarity(shared, each):
    # 64 bins over sets of 2 to 1000 items. Bins of one set depend on each other, so each of 2000 seeds gives one
    # share; their mean lies within 5 standard errors (false alarm 6e-7 each).
    a = np.arange(shared + each)
    b = np.concatenate([a[:shared], 10**6 + np.arange(each)])
    wanted = jaccard_similarity(a, b)
    sets = Sets.of([a, b])
    shares = np.array([(raw := MinHash(16, 4, seed=s).raw(sets))[0].ravel() == raw[1].ravel() for s in range(2000)])
    shares = shares.mean(1)
    assert wanted == pytest.approx(shared / (shared + 2 * each))
    assert abs(shares.mean() - wanted) <= 5 * shares.std() / np.sqrt(len(shares)) + 1e-9


def test_order_and_repeats_do_not_matter():
    family = MinHash(20, 2, n_cells=1000)
    codes = family.codes([[5, 1, 9], [9, 9, 5, 1, 1], [1, 5]])
    np.testing.assert_array_equal(codes[0], codes[1])
    assert codes.shape == (3, 20) and (codes < 1000).all() and (codes[0] != codes[2]).any()


def test_sets_come_in_several_forms():
    rows = [[0, 3], [1], [2, 3, 4]]
    matrix = sparse.csr_matrix((np.ones(6), ([0, 0, 1, 2, 2, 2], [0, 3, 1, 2, 3, 4])), shape=(3, 5))
    sets = Sets.of(rows)
    assert len(sets) == 3 and Sets.of(sets) is sets
    for form in (matrix, matrix.tocsc(), matrix.tocoo(), [np.array(r, np.uint16) for r in rows]):
        twin = Sets.of(form)
        assert twin.offsets.tolist() == sets.offsets.tolist() and twin.items.tolist() == sets.items.tolist()
    assert sets[1:].offsets.tolist() == [0, 1, 4] and sets[1:].items.tolist() == [1, 2, 3, 4]
    assert len(sets[2:1]) == 0 == len(Sets.of([]))


def test_stored_zeros_of_a_matrix_are_no_items():
    matrix = sparse.csr_matrix((np.array([1.0, 0.0, 2.0]), ([0, 0, 1], [0, 2, 1])), shape=(2, 3))
    sets = Sets.of(matrix)
    assert sets.offsets.tolist() == [0, 1, 2] and sets.items.tolist() == [0, 1]
    assert matrix.nnz == 3  # the caller's own stays as it is
    matrix.data[2] = 0
    with pytest.raises(QuernelError, match=r"X\[1\] is empty"):
        Sets.of(matrix)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sets.of([[1], []]), r"X\[1\] is empty; the Jaccard similarity of an empty set"),
        (lambda: Sets.of([[1, -2]]), "X holds the item id -2; ids must not be negative"),
        (lambda: Sets.of([[1], [0.5]]), r"X\[1\] must hold integer item ids; got float64"),
        (lambda: Sets.of(sparse.csr_matrix((2, 3))), r"X\[0\] is empty"),
        (lambda: MinHash(2, 2).codes(Sets(np.array([0, 0, 1]), np.array([7]))), r"X\[0\] is empty"),
        (lambda: Sets(np.array([0, 2]), np.array([7])), "offsets must rise from 0 to the number of items"),
        (lambda: Sets(np.array([0, 2, 1, 3]), np.arange(3)), "offsets must rise"),
        (lambda: Sets(np.array([0.0, 1.0]), np.arange(1)), "both must be arrays of integers"),
        (lambda: MinHash(2**16, 2**16), r"n_tables \* n_concat must be"),
        (lambda: MinHash(1, 1).hash_probability(1.1), r"jaccard must lie in \[0, 1\]"),
        (lambda: jaccard_similarity([], []), "a and b are both empty"),
    ],
)
def test_errors(make, message):
    with pytest.raises(QuernelError, match=message):
        make()
