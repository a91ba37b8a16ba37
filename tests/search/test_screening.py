"""Screening in bfloat16: within its bound, and the answers of the plain search."""

from __future__ import annotations

import numpy as np
import pytest

from quernel.search import MultiVectorIndex, _screening, multi_vector
from quernel.search._ragged import Ragged
from tests.reference import crisp as reference

# float32 sums of a few products in another order.
SAME = 1e-4


def texts(n: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [(scale * draw.standard_normal((draw.integers(1, 12), 24)) + shift).astype(np.float32) for _ in range(n)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Screen everything in small blocks, and note which share of the texts was possible."""
    shares: list[float] = []

    def noted(store, queries, rough, k, alive):
        found = _screening.possible(store, queries, rough, k, alive)
        shares.append(sum(map(len, found)) / (len(found) * len(alive)))
        return found

    monkeypatch.setattr(multi_vector, "worth_it", lambda store, columns: True)
    monkeypatch.setattr(multi_vector, "possible", noted)
    monkeypatch.setattr(_screening, "_ROWS", (40, 40))
    return shares


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (100.0, 0.0), (0.1, -3.0)])
def test_rough_scores_are_within_the_bound(dtype: str, scale: float, shift: float) -> None:
    """With the shift, all products of one sign: their roundings add up, and the maxima are negative."""
    store = MultiVectorIndex(24, dtype).add(texts(60, 0, scale, shift))._store
    asked = texts(9, 1, 1.0, -shift)
    rough = _screening.rough_scores(store, Ragged.of("q", asked, 24))
    exact = reference.chamfer_matrix(asked, np.split(store.values(), store.offsets[1:-1]))
    lengths = np.array([np.linalg.norm(q.astype(float), axis=1).sum() for q in asked])
    errors = np.abs(rough - exact) / (store.longest() * lengths[:, None])
    assert errors.max() <= _screening._ERROR
    assert errors.max() > 1e-4, "not rounded at all?"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_answers_are_the_exact_ones(dtype: str, always: list[float]) -> None:
    held, asked = texts(400, 0, 0.3), texts(12, 1, 0.3)
    index = MultiVectorIndex(24, dtype).add(held)
    gone = list(range(0, 400, 7))
    index.remove(gone)
    scores, ids = index.search(asked, 5)
    rounded = np.split(index._store.values(), index._store.offsets[1:-1])
    kept = [i for i in range(400) if i not in gone]
    wanted, order = reference.best(asked, [rounded[i] for i in kept], 5)
    np.testing.assert_allclose(scores, wanted, atol=SAME)
    np.testing.assert_array_equal(ids, np.array(kept)[order])
    assert len(always) == 1 and 0 < always[0] < 0.125, "most texts are ruled out"


def test_where_nothing_is_ruled_out_all_are_scored(always: list[float]) -> None:
    index = MultiVectorIndex(2).add([[[1.0, 0.0]]] * 50)
    assert index.search([[[1.0, 0.0]]], 3)[1].tolist() == [[0, 1, 2]]
    assert always == [1.0]
    assert index.search([[[1.0, 0.0]]], 60)[1][0].tolist() == [*range(50), *[-1] * 10]


def test_the_longest_vector_is_known_after_every_change() -> None:
    store = MultiVectorIndex(2).add([[[3.0, 4.0]]])._store
    assert store.longest() == pytest.approx(5, rel=1e-4) and store.longest() > 5
    store.append(Ragged.of("x", [[[6.0, 8.0]], [[1.0, 0.0]]], 2))
    assert store.longest() == pytest.approx(10, rel=1e-4)
    store.keep(np.array([False, False, True]))
    store.append(Ragged.of("x", [[[0.0, 20.0]]], 2))
    assert store.longest() == pytest.approx(20, rel=1e-4)
