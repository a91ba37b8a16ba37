"""``FunnelIndex``: stages against sorting, exactness, bytes, storage in other dtypes, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quernel._errors import FormatError, QuernelError
from quernel._timing import threads
from quernel.search import FlatIndex, FunnelIndex, Index, funnel
from quernel.search import _prefixes as prefixes
from tests.reference import matryoshka as oracle

# float32 sums in another order.
SAME = 1e-5


def nested(n, seed=0, d=48):
    """Vectors with most of their length in the first coordinates, as trained ones have; lengths differ."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((n, d)) / np.sqrt(np.arange(1, d + 1)) * draw.uniform(0.5, 2, (n, 1))).astype(
        np.float32
    )


def recall(index, queries, truth):
    found = index.search(queries, truth.shape[1])[1]
    return np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)])


@pytest.mark.parametrize(
    ("dims", "shortlist"), [((4,), (30,)), ((2, 4, 8, 16), (100, 50, 25, 10)), ((3, 48), (40, 12)), ((48,), (10,))]
)
def test_each_stage_keeps_its_number_of_candidates(dims, shortlist):
    items, queries = nested(300), nested(5, 1)
    index = FunnelIndex(48, dims, shortlist).add(items)
    scores, ids = index.search(queries, 7)
    for i, query in enumerate(queries):
        assert ids[i].tolist() == oracle.funnel(items, query, dims, shortlist, 7)
        np.testing.assert_allclose(scores[i], items[ids[i]] @ query, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("dims", [(4,), (2, 8, 16)])
def test_a_shortlist_of_everything_is_exact_search(metric, dims, monkeypatch):
    monkeypatch.setattr(funnel, "_BLOCK", 1000)  # several blocks
    items, queries = nested(300), nested(9, 1)
    exact_scores, exact_ids = FlatIndex(48, metric).add(items).search(queries, 20)
    whole = FunnelIndex(48, dims, (300,) * len(dims), metric=metric).add(items)
    # One slot more than the shortlist: through all the stages.
    nearly = FunnelIndex(48, dims, (300,) * len(dims), metric=metric).add(items).add(items[:1])
    nearly.remove([300])
    for index in (whole, nearly):
        scores, ids = index.search(queries, 20)
        np.testing.assert_array_equal(ids, exact_ids)
        np.testing.assert_allclose(scores, exact_scores, rtol=SAME, atol=SAME)
    scores, ids = FunnelIndex(48, dims, (20,) * len(dims), metric=metric).add(items).search(queries, 20, dim=48)
    np.testing.assert_array_equal(ids, exact_ids)


def test_recall_grows_with_the_shortlist_and_the_prefix():
    items, queries = nested(4000), nested(200, 1)
    truth = FlatIndex(48, "ip").add(items).search(queries, 10)[1]
    by_length = [recall(FunnelIndex(48, (8,), (k,)).add(items), queries, truth) for k in (10, 50, 200, 1000)]
    by_prefix = [recall(FunnelIndex(48, (m,), (100,)).add(items), queries, truth) for m in (2, 8, 24, 48)]
    for recalls in (by_length, by_prefix):
        assert all(later >= earlier - 0.005 for earlier, later in itertools.pairwise(recalls))
        assert recalls[-1] > recalls[0] + 0.1


def test_a_prefix_alone_compares_directions():
    items, query = nested(200), nested(1, 1)
    index = FunnelIndex(48, (8, 16), (50, 20)).add(items)
    scores, ids = index.search(query, 60, dim=8)
    cut = items[:, :8] / np.linalg.norm(items[:, :8], axis=1, keepdims=True)
    wanted = cut @ query[0, :8]
    assert ids[0].tolist() == np.argsort(-wanted, kind="stable")[:60].tolist()
    np.testing.assert_allclose(scores[0], wanted[ids[0]], rtol=SAME, atol=SAME)


def test_the_file_has_vectors_prefixes_and_one_percent(tmp_path):
    items = nested(2000, d=384)
    path = FunnelIndex(384, (32,), (200,)).add(items).save(tmp_path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    stored = 2000 * 4 * (384 + 32)
    assert stored < size <= 1.01 * stored


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_smaller_numbers_are_stored_and_their_scores_are_those_of_what_is_stored(
    dtype, bytes_each, tmp_path, monkeypatch
):
    monkeypatch.setattr(prefixes, "_DECODED", 2000)  # several parts
    items, queries = nested(512), nested(12, 1)  # eight panels
    index = FunnelIndex(48, (8, 24), (60, 20), dtype=dtype).add(items[:200]).add(items[200:])
    scale = 8 if dtype == "int8" else 0
    assert index.nbytes == 512 * (bytes_each * (48 + 8) + scale + 8 + 1)
    stored = index.vectors
    # Half a step of 127, or 11 bits of mantissa.
    error = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.51 / 127}[dtype]
    assert (np.abs(stored - items) <= error * np.abs(items).max(1, keepdims=True)).all()
    for made in (index, Index.load(index.save(tmp_path)), Index.load(tmp_path, mmap=True)):
        scores, ids = made.search(queries, 5)
        np.testing.assert_allclose(scores, (queries[:, None] * stored[ids]).sum(2), rtol=SAME, atol=SAME)
    truth = FlatIndex(48, "ip").add(items).search(queries, 5)[1]
    plain = FunnelIndex(48, (8, 24), (60, 20)).add(items)
    assert recall(index, queries, truth) >= recall(plain, queries, truth) - 0.05  # 60 answers: three of them


def test_deleted_items_take_no_place_in_the_shortlist():
    items = nested(100)
    index = FunnelIndex(48, (4,), (5,)).add(items)
    query = items[:1]
    first = index.search(query, 5)[1][0]
    index.remove(first)
    second = index.search(query, 5)[1][0]
    assert (second >= 0).all() and not np.isin(second, first).any()


def test_zeros_and_equal_items():
    items = np.zeros((6, 4), np.float32)
    items[[1, 4], 0] = 1.0
    index = FunnelIndex(4, (2,), (5,)).add(items)
    scores, ids = index.search([[1.0, 0.0, 0.0, 0.0]], 4)
    assert ids.tolist() == [[1, 4, 0, 2]] and scores.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_answers_do_not_depend_on_threads_or_company():
    items, queries = nested(3000), nested(33, 1)
    index = FunnelIndex(48, (8,), (100,)).add(items)
    wanted = index.search(queries, 10)
    for n in (1, 2):
        with threads(n):
            got = index.search(queries, 10)
            alone = [index.search(q, 10) for q in queries]
        np.testing.assert_array_equal(got[1], wanted[1])
        np.testing.assert_array_equal(got[0], wanted[0])
        np.testing.assert_array_equal(np.concatenate([ids for _, ids in alone]), wanted[1])


@pytest.mark.parametrize("name", ["prefixes", "vectors"])
def test_arrays_that_do_not_fit_are_refused(name, tmp_path, monkeypatch):
    index = FunnelIndex(8, (4,), (5,)).add(nested(10, d=8))
    arrays = index._arrays()
    monkeypatch.setattr(index, "_arrays", lambda: arrays | {name: arrays[name][:, :3]})
    index.save(tmp_path)
    with pytest.raises(FormatError, match=f"array '{name}' must be float32 of shape"):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FunnelIndex(8, (4, 4), (5, 5)), "dims must be integers that increase"),
        (lambda: FunnelIndex(8, (4, 9), (5, 5)), r"dims must be an integer in \[1, 8\]; got 9"),
        (lambda: FunnelIndex(8), r"dims must be an integer in \[1, 8\]; got 32"),
        (lambda: FunnelIndex(8, (4,), (5, 5)), "shortlist must have 1 lengths, one for each of dims"),
        (lambda: FunnelIndex(8, (4,), 5), "shortlist must have 1 lengths"),
        (lambda: FunnelIndex(8, (4,), None), "shortlist must have 1 lengths, one for each of dims; got None"),
        (lambda: FunnelIndex(8, (4,), {5}), "shortlist must have 1 lengths"),
        (lambda: FunnelIndex(8, (4,), "5"), "shortlist must have 1 lengths"),
        (lambda: FunnelIndex(8, (4,), (None,)), "shortlist must be an integer"),
        (lambda: FunnelIndex(8, (2, 4), (5, 6)), r"shortlist must not increase: .*got \(5, 6\)"),
        (lambda: FunnelIndex(8, (4,), (0,)), "shortlist must be an integer"),
        (lambda: FunnelIndex(8, (4,), (5,), metric="l2"), "metric must be one of 'ip', 'cosine'"),
        (lambda: FunnelIndex(8, (4,), (5,), dtype="bfloat16"), "dtype must be one of"),
        (lambda: FunnelIndex(8, (2, 4), (9, 5)).search(np.ones((1, 8)), 6), r"k must be at most shortlist\[-1\]=5"),
        (lambda: FunnelIndex(8, (2, 4), (9, 5)).search(np.ones((1, 8)), 3, dim=4), "stored, 2 or 8; got 4"),
        (lambda: FunnelIndex(8, (4,), (5,), metric="cosine").add(np.zeros((1, 8))), "x holds a vector of zeros"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
