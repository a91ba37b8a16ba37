"""FLINNG: equal to the model in plain Python, however items came, with estimates that mean what they say."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from quernel._errors import FormatError, QuernelError
from quernel._timing import threads
from quernel.hashing import fastrange, mix64
from quernel.search import FlatIndex, FlinngIndex, FlinngSettings
from quernel.search._flinng_settings import default_groups
from tests.reference.search import expected_count, flinng

DIM = 24


def _codes(draw: np.random.Generator, n: int, tables: int, high: int) -> np.ndarray:
    """Codes with many collisions and some items twice."""
    codes = draw.integers(0, high, (n, tables))
    if n > 4:
        codes[3] = codes[1]
        codes[n // 2 :, : tables // 2] = codes[: n - n // 2, : tables // 2]
    return codes


def _as_arrays(answers: list[list[tuple[float, int]]], k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, ids = np.full((len(answers), k), np.nan, np.float32), np.full((len(answers), k), -1, np.int64)
    for i, answer in enumerate(answers):
        for j, (score, item) in enumerate(answer):
            scores[i, j], ids[i, j] = score, item
    return scores, ids


def _require_equal(index: FlinngIndex, codes: Any, groups: Any, queries: Any, k: int) -> None:
    wanted = _as_arrays(flinng(codes.tolist(), groups.tolist(), queries.tolist(), k), k)
    got = index.search(queries, k)
    np.testing.assert_array_equal(got[1], wanted[1])
    np.testing.assert_array_equal(got[0], wanted[0])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("tables", "n", "n_groups"), [(7, 103, 10), (3, 5, 16), (300, 41, 4), (255, 30, 7), (256, 30, 7)]
)
def test_equals_the_plain_model_with_given_groups(rows: int, tables: int, n: int, n_groups: int) -> None:
    # n not divisible by B, empty groups (16 groups for 5 items), repeated items, top_k > n, counts beyond a byte.
    draw = np.random.default_rng(100 * rows + tables)
    codes, groups = _codes(draw, n, tables, 6), draw.integers(0, n_groups, (n, rows))
    queries = np.concatenate([codes[:4], draw.integers(0, 8, (5, tables))])
    index = FlinngIndex.from_codes(codes, groups, n_groups, bits=3)
    for k in (1, 4, n + 3):
        _require_equal(index, codes, groups, queries, k)


def _groups(n: int, rows: int, n_groups: int, seed: int = 0) -> np.ndarray:
    return fastrange(mix64(seed, np.arange(n)[:, None], np.arange(rows)[None]), n_groups).astype(np.int64)


@pytest.mark.parametrize("n_groups", [None, 13, 70_000])
def test_equals_the_plain_model_with_waiting_items(n_groups: int | None) -> None:
    draw = np.random.default_rng(5)
    codes, queries = _codes(draw, 240, 12, 5), draw.integers(0, 5, (20, 12))
    index = FlinngIndex(metric="codes", n_tables=12, bits=3, n_groups=n_groups, n_rows=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more groups than items, on purpose
        for start, stop in ((0, 160), (160, 161), (161, 200), (200, 240)):
            index.add(codes[start:stop])
    assert index.stats().waiting == 80
    groups = _groups(240, 2, n_groups or default_groups(240))
    for k in (3, 300):
        _require_equal(index, codes, groups, queries, k)


def test_a_duplicate_is_never_missed() -> None:
    # Identical codes count in every table, so every group of the item reaches L; k covers all that tie there.
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 4, (400, 9))
    codes[200:300] = codes[:100]
    index = FlinngIndex.from_codes(codes, bits=2)
    scores, ids = index.search(codes, 400)
    for i in range(400):
        assert i in ids[i][scores[i] == 1.0]


def test_a_count_is_at_least_the_equal_codes() -> None:
    draw = np.random.default_rng(2)
    codes, queries = draw.integers(0, 6, (150, 20)), draw.integers(0, 6, (30, 20))
    scores, ids = FlinngIndex.from_codes(codes, bits=3).search(queries, 150)
    for q in range(30):
        found = ids[q][ids[q] >= 0]
        equal = (codes[found] == queries[q]).sum(1) / 20
        assert (scores[q][: len(found)] >= equal - 1e-6).all()


def test_counts_have_the_exact_mean_over_partitions() -> None:
    # 600 random partitions: the mean of so many counts is off by six standard errors with probability 2e-9.
    draw = np.random.default_rng(3)
    n, tables, n_groups, trials = 60, 30, 8, 600
    codes, query, item = draw.integers(0, 12, (n, tables)), draw.integers(0, 12, tables), 17
    codes[item, :9] = query[:9]
    counts = np.empty(trials)
    for trial in range(trials):
        groups = draw.integers(0, n_groups, (n, 1))
        scores, ids = FlinngIndex.from_codes(codes, groups, n_groups, bits=4).search(query[None], n)
        found = scores[0][ids[0] == item]
        counts[trial] = tables * found[0] if found.size else 0
        wanted = (codes[groups[:, 0] == groups[item, 0]] == query).any(0).sum()
        assert counts[trial] == pytest.approx(wanted)
    wanted = expected_count(codes.tolist(), query.tolist(), item, n_groups)
    assert abs(counts.mean() - wanted) < 6 * counts.std() / trials**0.5


def _vectors(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, DIM)).astype(np.float32)
    return x, (x[: min(n, 50)] + 0.1 * draw.standard_normal((min(n, 50), DIM))).astype(np.float32)


def _same(one: FlinngIndex, other: FlinngIndex, queries: Any, k: int = 7) -> None:
    for a, b in zip(one.search(queries, k), other.search(queries, k), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cuts", [(1500,), (1, 3, 1500, 1501, 1600), tuple(range(200, 3000, 200))])
def test_the_order_of_adding_does_not_matter(cuts: tuple[int, ...]) -> None:
    x, queries = _vectors(3000)
    whole = FlinngIndex(DIM, bits=8).add(x)
    pieces = FlinngIndex(DIM, bits=8)
    for part in np.split(x, cuts):
        pieces.add(part)
    assert pieces.stats().n_groups == whole.stats().n_groups == default_groups(3000)
    _same(whole, pieces, queries)
    with threads(2):
        two = whole.search(queries, 7)
    with threads(1):
        one = whole.search(queries, 7)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_saving_with_waiting_items_and_mapping(tmp_path: Any) -> None:
    x, queries = _vectors(2000)
    index = FlinngIndex(DIM, bits=9, keep_vectors=True).add(x[:1800]).add(x[1800:])
    assert index.stats().waiting == 200
    index.remove([5, 1900])
    wanted = index.search(queries, 7), index.search(queries, 7, rerank=30)
    index.save(tmp_path / "ix")
    for mmap in (False, True):
        twin = FlinngIndex.load(tmp_path / "ix", mmap=mmap)
        got = twin.search(queries, 7), twin.search(queries, 7, rerank=30)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_array_equal(a[1], b[1])
        twin.add(x[:2], ids=[7000, 7001])
        assert sorted(twin.search(x[:1], 2)[1][0].tolist()) == [0, 7000]


def test_compacting_is_building_anew() -> None:
    x, queries = _vectors(900)
    index = FlinngIndex(DIM, bits=8, keep_vectors=True).add(x)
    gone = np.arange(0, 900, 3)
    index.remove(gone)
    kept = np.setdiff1d(np.arange(900), gone)
    fresh = FlinngIndex(DIM, bits=8, keep_vectors=True).add(x[kept], ids=kept)
    assert index.stats().slots == 900
    index.compact()
    assert index.stats() == fresh.stats()
    _same(index, fresh, queries)
    _same(index.compact(), fresh, queries)


@pytest.mark.parametrize("metric", ["cosine", "l2", "jaccard"])
def test_near_duplicates_are_found_and_reranked_exactly(metric: Any) -> None:
    draw = np.random.default_rng(7)
    if metric == "jaccard":
        items: Any = [draw.choice(5000, 40, replace=False) for _ in range(1500)]
        queries: Any = [np.append(row[:36], [9001, 9002]) for row in items[:60]]
        index = FlinngIndex(metric="jaccard", n_tables=32, bits=11, keep_vectors=True)
        exact = FlatIndex(metric="jaccard")
    else:
        items = draw.standard_normal((1500, 48)).astype(np.float32)
        queries = (items[:60] + 0.1 * draw.standard_normal((60, 48))).astype(np.float32)
        width = 4.0 if metric == "l2" else None
        index = FlinngIndex(48, metric, n_tables=24, bits=10, width=width, keep_vectors=True)
        exact = FlatIndex(48, metric)
    index.add(items)
    exact.add(items)
    ids = index.search(queries, 1)[1][:, 0]
    assert (ids == np.arange(60)).mean() >= 0.95
    scores, ids = index.search(queries, 1, rerank=20)
    wanted, nearest = exact.search(queries, 1)
    np.testing.assert_array_equal(ids, nearest)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


def test_rerank_repairs_ties_and_ignores_repeats_in_sets() -> None:
    index = FlinngIndex(metric="jaccard", n_tables=16, bits=6, keep_vectors=True)
    index.add([[1, 2, 3, 4], [4, 3, 2, 1, 1], [1, 2, 3, 5]])
    scores, ids = index.search([[4, 4, 2, 3, 1]], 2, rerank=3)
    assert ids.tolist() == [[0, 1]] and scores.tolist() == [[1.0, 1.0]]


def test_nothing_near_gives_nothing() -> None:
    codes = np.zeros((3, 4), int)
    index = FlinngIndex.from_codes(codes, bits=2, ids=[10, 11, 12])
    scores, ids = index.search(np.full((1, 4), 3), 2)
    assert ids.tolist() == [[-1, -1]] and np.isnan(scores).all()
    scores, ids = index.search(codes[:1], 5)
    assert sorted(ids[0][:3].tolist()) == [10, 11, 12] and ids[0][3:].tolist() == [-1, -1]


def test_the_default_number_of_groups() -> None:
    assert [default_groups(n) for n in (0, 1, 2, 3, 200, 10_000, 204_800, 204_801)] == [1, 1, 2, 4, 64, 512, 2048, 4096]
    assert FlinngIndex(DIM, bits=4).add(_vectors(300)[0]).stats().n_groups == 128


def test_groups_are_balanced_and_independent() -> None:
    # 20,000 items in 50 groups twice: chi-square with 49 and, jointly, 2,499 degrees of freedom; false alarms < 1e-6.
    groups = _groups(20_000, 2, 50)
    for row in groups.T:
        counts = np.bincount(row, minlength=50)
        assert ((counts - 400) ** 2 / 400).sum() < 120
    joint = np.bincount(groups[:, 0] * 50 + groups[:, 1], minlength=2500)
    assert ((joint - 8) ** 2 / 8).sum() < 2499 + 6 * (2 * 2499) ** 0.5
    index = FlinngIndex(metric="codes", n_tables=1, bits=1, n_groups=50, n_rows=2).add(np.zeros((500, 1), int))
    np.testing.assert_array_equal(index._tests.groups, groups[:500])


def test_suggest_finds_a_setting_that_works() -> None:
    x, queries = _vectors(4000)
    chosen = FlinngIndex.suggest(x[:400], sim_near=0.98, n=4000)
    assert isinstance(chosen, FlinngSettings)
    assert chosen.near_count >= 9 and chosen.far_count < chosen.near_count / 3
    index = FlinngIndex(**chosen.arguments).add(x)
    assert (index.search(queries, 1)[1][:, 0] == np.arange(50)).mean() >= 0.9


@pytest.mark.parametrize("metric", ["l2", "jaccard"])
def test_suggest_for_other_metrics(metric: Any) -> None:
    draw = np.random.default_rng(4)
    if metric == "l2":
        sample: Any = draw.standard_normal((200, 32))
        chosen = FlinngIndex.suggest(sample, sim_near=0.5, n=20_000, metric="l2")
    else:
        sample = [draw.integers(0, 3000, 40) for _ in range(200)]
        chosen = FlinngIndex.suggest(sample, sim_near=0.8, n=20_000, metric="jaccard")
    index = FlinngIndex(**chosen.arguments).add(sample)
    assert (index.search(sample, 1)[1][:, 0] == np.arange(200)).mean() >= 0.99


def test_suggest_says_when_items_are_too_alike() -> None:
    alike = 100 + np.random.default_rng(0).standard_normal((100, 16))
    with pytest.warns(UserWarning, match="subtract their mean"):
        FlinngIndex.suggest(alike, sim_near=0.9, n=100_000)


def test_stats_show_useless_codes() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((500, 16)).astype(np.float32)
    good, bad = (FlinngIndex(16, bits=8).add(x + shift).stats() for shift in (0, 100))
    assert bad.longest_share > 0.9 > good.longest_share
    assert good.items == good.slots == 500 and good.entries <= 500 * 20 * 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"dim": None}, "dim must be given"),
        ({"dim": 4, "metric": "jaccard"}, "dim must be given"),
        ({"dim": 4, "metric": "ip"}, "metric"),
        ({"dim": 4, "metric": "l2"}, "width must be given"),
        ({"dim": 4, "width": 1.0}, "width is for"),
        ({"dim": 4, "n_concat": 2}, "n_concat is for"),
        ({"dim": 4, "n_rows": 0}, "n_rows"),
        ({"dim": 4, "n_rows": 256}, "n_rows"),
        ({"dim": 4, "n_groups": 0}, "n_groups"),
        ({"dim": 4, "bits": 31}, "bits"),
        ({"dim": 4, "directions": "cauchy"}, "directions"),
        ({"dim": None, "metric": "codes", "keep_vectors": True}, "keep_vectors"),
        ({"dim": 4, "budget_bytes": 10}, "budget_bytes"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        FlinngIndex(**arguments)


def test_bad_input() -> None:
    index = FlinngIndex(DIM, bits=4)
    index.add(_vectors(40)[0])
    with pytest.raises(QuernelError, match="rerank needs"):
        index.search(np.ones((1, DIM)), rerank=20)
    kept = FlinngIndex(DIM, bits=4, keep_vectors=True).add(_vectors(40)[0])
    with pytest.raises(QuernelError, match="at least k"):
        kept.search(np.ones((1, DIM)), k=10, rerank=5)
    with pytest.raises(QuernelError, match="at least k"):
        kept.search(np.ones((1, DIM)), k=np.int64(10), rerank=np.int64(5))
    with pytest.raises(QuernelError, match="is empty"):
        FlinngIndex(metric="jaccard").add([[1], []])
    with pytest.raises(QuernelError, match="negative"):
        FlinngIndex(metric="jaccard").add([[-1]])
    with pytest.raises(QuernelError, match=r"\[0, 4\)"):
        FlinngIndex.from_codes([[0, 1]], bits=2).search([[4, 0]])
    with pytest.raises(QuernelError, match="n_groups must be given"):
        FlinngIndex.from_codes([[0, 1]], [[0]])
    with pytest.raises(QuernelError, match="rows, one an item"):
        FlinngIndex.from_codes([[0, 1]], [[0], [0]], 1)
    with pytest.raises(QuernelError, match="groups of this index were given"):
        FlinngIndex.from_codes([[0, 1]], [[0]], 1).add([[0, 1]])
    with pytest.raises(QuernelError, match="at least 2"):
        FlinngIndex.suggest(np.ones((1, 3)))


def test_too_many_groups_warn_and_too_many_bytes_are_refused_before_anything_is_allocated() -> None:
    with pytest.warns(UserWarning, match="more than the 40 items"):
        FlinngIndex(DIM, bits=4, n_groups=64).add(_vectors(40)[0])
    small = FlinngIndex(DIM, bits=4, budget_bytes=60_000).add(_vectors(40)[0])
    # Broadcast: a million rows that take no memory themselves, as a file that is mapped.
    with pytest.raises(QuernelError, match=r"does not fit: 1000040 items .* budget_bytes"):
        small._check_budget(np.broadcast_to(np.float32(1), (1_000_000, DIM)))
    with pytest.raises(QuernelError, match="does not fit"):
        small.add(_vectors(2000)[0])
    assert len(small) == 40 and small.search(_vectors(40)[1], 1)[1][0, 0] == 0


def test_given_groups_are_saved(tmp_path: Any) -> None:
    draw = np.random.default_rng(0)
    codes, groups = draw.integers(0, 4, (30, 5)), draw.integers(0, 3, (30, 2))
    index = FlinngIndex.from_codes(codes, groups, 3, bits=2, ids=np.arange(30) + 100)
    index.remove([100, 110])
    twin = FlinngIndex.load(index.save(tmp_path / "ix"))
    _same(index, twin, codes)
    twin.compact()
    np.testing.assert_array_equal(index.search(codes, 5)[0], twin.search(codes, 5)[0])
    with pytest.raises(QuernelError, match="were given"):
        twin.add(codes)


@pytest.mark.parametrize("name", ["codes", "groups", "table_cells", "cell_items", "table_offsets", "cell_offsets"])
def test_arrays_that_point_outside_are_refused(name: str) -> None:
    index = FlinngIndex(DIM, bits=4).add(_vectors(40)[0])
    arrays = {key: array.copy() for key, array in index._arrays().items()}
    arrays[name][len(arrays[name]) // 2] = np.iinfo(arrays[name].dtype).max
    twin = FlinngIndex(DIM, bits=4)
    twin._ids = index._ids
    twin._restore(arrays)
    with pytest.raises(FormatError, match=name):
        twin._check_contents()
