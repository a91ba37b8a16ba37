"""top_k against a stable sort."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quernel._timing import threads
from quernel.search._top_k import top_k

# Few distinct values, so that ties are common.
SCORES = st.sampled_from([-np.inf, -1.5, 0.0, 0.25, 2.0, np.inf, np.nan])


def by_sorting(scores, k, alive):
    """Return the k best of each row: descending, equal ones in order, NaN and dead ones never."""
    best, slots = np.full((len(scores), k), np.nan, np.float32), np.full((len(scores), k), -1)
    for row, place, slot in zip(scores, best, slots, strict=True):
        usable = [j for j in range(len(row)) if alive[j] and not np.isnan(row[j])]
        chosen = sorted(usable, key=lambda j: -row[j])[:k]
        place[: len(chosen)], slot[: len(chosen)] = row[chosen], chosen
    return best, slots


@given(data=st.data(), n=st.integers(0, 4), width=st.integers(0, 12), k=st.integers(1, 15))
@settings(max_examples=150, deadline=None)
def test_equals_a_stable_sort(data, n, width, k):
    scores = data.draw(hnp.arrays(np.float32, (n, width), elements=SCORES))
    alive = data.draw(hnp.arrays(bool, width))
    for got, wanted in zip(top_k(scores, k, alive), by_sorting(scores, k, alive), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_many_rows_on_several_threads():
    scores = np.random.default_rng(0).standard_normal((101, 300)).astype(np.float32)
    alive = np.arange(300) % 7 != 0
    wanted = by_sorting(scores, 10, alive)
    for n in (1, 2):
        with threads(n):
            for got, want in zip(top_k(scores, 10, alive), wanted, strict=True):
                np.testing.assert_array_equal(got, want)


def test_strided_rows():
    scores = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    for got, wanted in zip(
        top_k(scores[::2, ::3], 3, np.ones(14, bool)), by_sorting(scores[::2, ::3], 3, np.ones(14, bool)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
