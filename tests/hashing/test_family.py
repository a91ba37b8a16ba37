"""From hash values to cells: the mixer by its definition, the law of mixed collisions, and debiased sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import PStable, SignProjection, debias, rehash_to_range
from quernel.hashing._family import check_rows
from tests.reference import hashing as oracle

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed


@given(
    values=st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2), min_size=1, max_size=4),
    n_cells=st.sampled_from([2, 3, 1000, 2**31 + 11, 2**32]),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=100, deadline=None)
def test_cells_by_definition(values, n_cells, seed):
    cells = rehash_to_range(np.array([values]), n_cells, seed)
    assert cells.dtype == np.uint32
    assert cells.tolist() == [[oracle.cell(seed, t, row, n_cells) for t, row in enumerate(values)]]


def test_codes_are_packed_bits_or_mixed_values():
    x = np.random.default_rng(0).standard_normal((20, 6))
    packed, mixed = SignProjection(6, 5, 4, seed=3), SignProjection(6, 5, 4, n_cells=10, seed=3)
    raw = packed.raw(x)
    assert packed.codes(x).tolist() == (raw * (1 << np.arange(4))).sum(2).tolist()
    np.testing.assert_array_equal(mixed.codes(x), rehash_to_range(raw, 10, 3))
    assert (packed.n_codes, mixed.n_codes) == (16, 10)


@pytest.mark.parametrize(("distance", "known"), [(2.0, 0.391), (5.0, 0.120), (10.0, 0.055)])
def test_mixed_collisions_follow_the_law(distance, known):
    # 20 000 tables; the second column is the published value for w = 4, K = 2, 32 cells.
    family = PStable(8, 20_000, 2, width=4.0, n_cells=32, seed=1)
    wanted = float(family.collision_probability(distance))
    assert wanted == pytest.approx(known, abs=1e-3)
    codes = family.codes(np.stack([np.zeros(8), np.eye(8)[0] * distance]))
    assert stats.binomtest(int((codes[0] == codes[1]).sum()), 20_000, wanted).pvalue > FALSE_ALARM / 3


@pytest.mark.parametrize("signed", [False, True])
def test_debiased_sums_are_unbiased(signed):
    # 40 points with weights, 20 000 independent tables of 8 cells; the mean within 5 standard errors (6e-7).
    draw = np.random.default_rng(2)
    points, query = draw.standard_normal((40, 5)), draw.standard_normal(5)
    alpha = draw.standard_normal(40) if signed else draw.random(40)
    family = PStable(5, 20_000, 2, width=3.0, n_cells=8, seed=2)
    same = family.codes(points) == family.codes(query)
    sums = (alpha[:, None] * same).sum(0)
    estimates = debias(sums, alpha.sum(), 8)
    exact = alpha @ family.hash_probability(np.linalg.norm(points - query, axis=1)) ** 2
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - exact) < 5 * error
    assert abs(sums.mean() - exact) > 20 * error if not signed else True  # without the correction it would be far off


def test_families_compare_and_rebuild():
    family = PStable(4, 3, 2, width=0.5, n_cells=99, norm="l1", seed=2**62)
    twin = PStable.from_config(family.config())
    assert twin == family != PStable(4, 3, 2, width=0.5, n_cells=99, norm="l1", seed=1)
    assert family != SignProjection(4, 3, 2)
    assert repr(twin) == repr(family) and "width=0.5" in repr(family)
    x = np.random.default_rng(0).standard_normal((5, 4))
    np.testing.assert_array_equal(twin.codes(x), family.codes(x))


def test_rows_are_checked():
    assert check_rows("X", [1, 2], 2).tolist() == [[1.0, 2.0]]
    assert check_rows("X", np.zeros((0, 2)), 2).shape == (0, 2)
    assert check_rows("X", np.ones((4, 4), np.float64)[:, ::2], 2).flags.c_contiguous
    for value, message in (
        (np.ones((2, 3)), r"X must have shape \(n, 2\); got \(2, 3\)"),
        (np.ones((1, 2, 2)), "X must have shape"),
        (np.ones((2, 2), bool), "X must hold real numbers; got bool"),
        (np.ones((2, 2), complex), "X must hold real numbers"),
        ([[np.nan, 0]], "X holds NaN or infinity"),
        ([["a", "b"]], "X must hold real numbers"),
    ):
        with pytest.raises(QuernelError, match=message):
            check_rows("X", value, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignProjection(4, 0, 2), "n_tables must be"),
        (lambda: SignProjection(4, 2, 0), "n_concat must be"),
        (lambda: SignProjection(4, 2, 33), "n_cells must be given for n_concat above 32"),
        (lambda: SignProjection(4, 2, 2, n_cells=1), "n_cells must be"),
        (lambda: SignProjection(4, 2, 2, n_cells=2**32 + 1), "n_cells must be"),
        (lambda: SignProjection(4, 2, 2, seed=-1), "seed must be"),
        (lambda: PStable(4, 2, 2, width=1.0, n_cells=None), "n_cells must be given for PStable, whose hashes"),
        (lambda: rehash_to_range(np.zeros((2, 2), int), 8, 0), "raw must have shape"),
        (lambda: rehash_to_range(np.zeros((1, 2, 2)), 8, 0), "raw must be an integer"),
        (lambda: rehash_to_range(np.zeros((1, 2, 2), int), 1, 0), "n_cells must be"),
        (lambda: debias(1.0, 2.0, 1), "n_cells must be"),
    ],
)
def test_errors(make, message):
    with pytest.raises(QuernelError, match=message):
        make()
