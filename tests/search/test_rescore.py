"""Kept items: true scores of candidates, equal to the exact index's, whatever else is asked beside them."""

from __future__ import annotations

import numpy as np
import pytest

from quernel.hashing import Sets, jaccard_similarity
from quernel.search import FlatIndex
from quernel.search._rescore import KeptSets, KeptVectors, best_scored

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of 33 terms in another order


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_vectors_score_as_in_the_exact_index(metric: str) -> None:
    draw = np.random.default_rng(0)
    x, q = (draw.standard_normal((n, 33)).astype(np.float32) for n in (20, 5))
    kept = KeptVectors(33, metric)
    kept.append(x[:7])
    kept.append(x[7:])
    slots = np.tile(np.arange(20), (5, 1))
    slots[2, 3] = -1
    scores = kept.scores(q, slots)
    assert np.isnan(scores[2, 3])
    exact, ids = FlatIndex(33, metric).add(x).search(q, 20)  # type: ignore[arg-type]
    for i in (0, 1, 3, 4):
        np.testing.assert_allclose(scores[i][ids[i]], exact[i], **ROUNDING)
    np.testing.assert_allclose(kept.scores(x[:1], np.array([[0]])), 0 if metric == "l2" else 1, rtol=1e-6)
    np.testing.assert_array_equal(kept.scores(q[3:4], slots[3:4]), scores[3:4])
    kept.keep(np.arange(20) % 2 == 0)
    np.testing.assert_array_equal(kept.scores(q[:1], np.array([[1]])), scores[:1, 2:3])


def test_sets_score_their_jaccard_similarity() -> None:
    draw = np.random.default_rng(1)
    sets = [draw.integers(0, 30, draw.integers(1, 25)) for _ in range(12)]
    kept = KeptSets()
    kept.append(Sets.of(sets[:5]))
    kept.append(Sets.of(sets[5:]))
    slots = np.tile(np.arange(12), (4, 1))
    scores = kept.scores(Sets.of(sets[:4]), slots)
    wanted = [[jaccard_similarity(a, b) for b in sets] for a in sets[:4]]
    np.testing.assert_allclose(scores, wanted, rtol=1e-6)
    alive = np.arange(12) % 3 > 0
    kept.keep(alive)
    np.testing.assert_array_equal(kept.scores(Sets.of(sets[:1]), np.arange(8)[None]), scores[:1, alive])


def test_the_best_come_first_and_ties_by_slot() -> None:
    scores = np.array([[0.5, np.nan, 0.9, 0.5]], np.float32)
    slots = np.array([[7, -1, 1, 3]])
    best, where = best_scored(scores, slots, 4)
    assert where.tolist() == [[1, 3, 7, -1]]
    np.testing.assert_array_equal(best, np.array([[0.9, 0.5, 0.5, np.nan]], np.float32))
