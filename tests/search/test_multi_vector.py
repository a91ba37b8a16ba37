"""MultiVectorIndex against loops: ragged texts, dtypes, blocks, candidates, files, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernel._errors import FormatError, QuernelError
from quernel._timing import threads
from quernel.nn.functional import chamfer_scores
from quernel.search import Index, MultiVectorIndex, multi_vector
from tests.reference import crisp as reference

# float32 sums of a few products in another order.
SAME = 1e-5


def texts(n: int, seed: int, dim: int = 8, longest: int = 9) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [unit(draw.standard_normal((draw.integers(1, longest + 1), dim))) for _ in range(n)]


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def topics(n: int, dim: int, seed: int, vectors: int = 6) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return n texts, each about three of 60 topics, and 40 queries about two of the topics of a text."""
    draw = np.random.default_rng(seed)
    centres = unit(draw.standard_normal((60, dim)))
    own = draw.integers(0, 60, (n, 3))
    noisy = lambda which: unit(centres[which] + 0.08 * draw.standard_normal((len(which), dim)))  # noqa: E731
    held = [noisy(draw.choice(own[i], vectors)) for i in range(n)]
    return held, [noisy(draw.choice(own[i, :2], 4)) for i in range(40)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_equals_loops(dtype: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "many":
        monkeypatch.setattr(multi_vector, "_PRODUCTS", 150)  # a few vectors at a time, fewer than the longest text
        monkeypatch.setattr(multi_vector, "_COLUMNS", 6)  # a query or two at a time
        monkeypatch.setattr(multi_vector, "_SCORES", 64)
    held, asked = texts(50, 0), texts(12, 1)
    index = MultiVectorIndex(8, dtype).add(held[:20]).add(held[20:])
    scores, ids = index.search(asked, 7)
    store = index._store
    rounded = np.split(store.values(), store.offsets[1:-1])
    wanted, order = reference.best(asked, rounded, 7)
    np.testing.assert_allclose(scores, wanted, atol=SAME)
    np.testing.assert_array_equal(ids, order)
    error = {"float32": 0, "float16": 2**-11, "int8": 1 / 127}[dtype]
    for got, want in zip(rounded, held, strict=True):
        np.testing.assert_allclose(got, want, atol=error)


def test_scores_are_those_of_the_loss() -> None:
    held, asked = texts(9, 2), texts(4, 3)
    index = MultiVectorIndex(8).add(held)
    scores, ids = index.search(asked, 9)
    for i, query in enumerate(asked):
        for score, text in zip(scores[i], ids[i], strict=True):
            q, x = torch.from_numpy(query)[None], torch.from_numpy(held[text])[None]
            assert float(score) == pytest.approx(float(chamfer_scores(q, x)), abs=SAME)


def test_all_similarities_negative_is_no_zero() -> None:
    """A row of zeros, as padding would be, would win."""
    index = MultiVectorIndex(2).add([[[-1.0, 0.0]], [[-0.5, 0.0], [-0.25, 0.0]]])
    assert index.search([[[1.0, 0.0], [2.0, 0.0]]], 2)[0].tolist() == [[-0.75, -3.0]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_vectors_are_those_of_the_slots(dtype: str) -> None:
    held = texts(6, 0)
    index = MultiVectorIndex(8, dtype).add(held, [9, 4, 2, 7, 5, 1])
    index.remove([4, 1])
    assert index.alive.tolist() == [True, False, True, True, True, False]
    assert [len(x) for x in index.vectors] == [len(x) for x in held]
    for got, want in zip(index.vectors, held, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol={"float32": 0, "float16": 2**-11, "int8": 1 / 127}[dtype])
    living = [index.vectors[i] for i in np.flatnonzero(index.alive)]
    assert MultiVectorIndex(8).add(living).search(held, 1)[1][[0, 2, 3, 4], 0].tolist() == [0, 1, 2, 3]
    index.alive[:] = False
    assert len(index) == 4 and index.alive.sum() == 4, "it is a copy"
    assert MultiVectorIndex(8).vectors == []


def test_equal_scores_come_in_the_order_of_adding() -> None:
    one = [[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0], [0.0, 0.5]]]
    assert MultiVectorIndex(2).add(one, [9, 4, 2]).search([[[1.0, 0.0]]], 3)[1].tolist() == [[9, 2, 4]]


def test_tensors_padded_arrays_and_lists_are_taken() -> None:
    held = texts(6, 0, longest=1)
    for form in (held, np.stack(held), torch.from_numpy(np.stack(held)).to(torch.bfloat16), [t.tolist() for t in held]):
        index = MultiVectorIndex(8).add(form)
        assert index.search(held, 1)[1][:, 0].tolist() == list(range(6))


# -- approximate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_candidates_are_scored_exactly_and_most_of_the_best_are_among_them(dtype: str) -> None:
    held, asked = topics(1500, 16, 0)
    index = MultiVectorIndex(16, dtype).add(held)
    exact_scores, exact = index.search(asked, 10)
    scores, ids = index.search(asked, 10, mode="approximate", probes=8, candidates=150)
    shared = np.mean([np.isin(a, b).mean() for a, b in zip(ids, exact, strict=True)])
    assert shared >= 0.95
    # One list a vector and no more candidates than answers miss some: nothing else was looked at.
    few = index.search(asked, 10, mode="approximate", probes=1, candidates=10)[1]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(few, exact, strict=True)]) < shared
    every, order = index.search(asked, 1500)
    for i in range(len(asked)):
        true = dict(zip(order[i].tolist(), every[i].tolist(), strict=True))
        np.testing.assert_allclose(scores[i], [true[t] for t in ids[i]], atol=SAME)
    assert (scores <= exact_scores + SAME).all()
    with threads(1):
        again = index.search(asked, 10, mode="approximate", probes=8, candidates=150)
    np.testing.assert_array_equal(again[1], ids)


def test_all_lists_and_all_candidates_are_the_exact_search() -> None:
    held, asked = texts(80, 0), texts(10, 1)
    index = MultiVectorIndex(8).add(held)
    index.remove([3, 70])
    wanted = index.search(asked, 5)
    got = index.search(asked, 5, mode="approximate", probes=1000, candidates=1000)
    np.testing.assert_array_equal(got[1], wanted[1])
    np.testing.assert_allclose(got[0], wanted[0], atol=SAME)


def test_few_probes_give_short_answers_not_wrong_ones() -> None:
    held, asked = texts(300, 0, longest=1), texts(20, 1, longest=1)
    index = MultiVectorIndex(8).add(held)
    scores, ids = index.search(asked, 200, mode="approximate", probes=1)
    assert (ids[:, 0] >= 0).all()
    assert (ids[:, -1] == -1).all()
    np.testing.assert_array_equal(np.isnan(scores), ids == -1)


def test_later_texts_are_found_and_lists_are_built_anew_when_there_are_many() -> None:
    held, _ = topics(1200, 16, 1)
    index = MultiVectorIndex(16).add(held[:200]).optimize()
    before = index._lists.centers
    index.add(held[200:260])
    found = index.search(held[200:260], 1, mode="approximate")[1][:, 0]
    assert found.tolist() == list(range(200, 260))
    assert index._lists.centers is before
    index.add(held[260:])
    found = index.search(held[1000:1100], 1, mode="approximate")[1][:, 0]
    assert found.tolist() == list(range(1000, 1100))
    assert len(index._lists.centers) >= 2 * len(before)
    for c in range(len(index._lists.centers)):
        named = index._lists.texts[index._lists.offsets[c] : index._lists.offsets[c + 1]]
        assert (np.diff(named) > 0).all(), "each text once a list, in ascending order"


def test_equal_vectors_do_not_build_lists_again_and_again() -> None:
    index = MultiVectorIndex(8).add([np.ones((3, 8))] * 100)
    for _ in range(2):
        assert index.search([np.ones((1, 8))], 3, mode="approximate")[1].tolist() == [[0, 1, 2]]
        lists = index._lists
    index.search([np.ones((1, 8))], 3, mode="approximate")
    assert index._lists is lists and len(lists.centers) < 20


def test_lists_may_look_at_a_prefix_alone() -> None:
    held, asked = topics(800, 16, 2)
    for text in (*held, *asked):
        text[:, 12:] = 0  # four coordinates say nothing
    whole, first = (MultiVectorIndex(16, prefix=p).add(held) for p in (None, 12))
    exact = whole.search(asked, 10)
    scores, ids = first.search(asked, 10, mode="approximate", candidates=100)
    assert first._lists.centers.shape[1] == 12
    assert np.mean([np.isin(a, b).mean() for a, b in zip(ids, exact[1], strict=True)]) >= 0.95
    np.testing.assert_allclose(scores[:, 0], exact[0][:, 0], atol=SAME)


# -- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("mmap", [False, True])
def test_saved_indexes_answer_alike(dtype: str, mmap: bool, tmp_path) -> None:
    held, asked = topics(200, 16, 0)
    index = MultiVectorIndex(16, dtype).add(held).optimize()
    index.remove([5])
    twin = MultiVectorIndex.load(index.save(tmp_path / "ix"), mmap=mmap)
    assert twin.config() == index.config() and twin.nbytes == index.nbytes
    for mode in ("exact", "approximate"):
        for got, want in zip(twin.search(asked, 5, mode=mode), index.search(asked, 5, mode=mode), strict=True):
            np.testing.assert_array_equal(got, want)
    for one in (twin, index):
        one.add(held[5:6], [5])
    np.testing.assert_array_equal(twin.search(asked, 5)[1], index.search(asked, 5)[1])


def test_compact_drops_what_was_removed() -> None:
    held, asked = texts(40, 0), texts(6, 1)
    index = MultiVectorIndex(8).add(held, range(100, 140)).optimize()
    index.remove(range(100, 140, 3))
    wanted, bytes_before = index.search(asked, 5), index.nbytes
    np.testing.assert_array_equal(index.compact().search(asked, 5)[1], wanted[1])
    assert index.nbytes < 0.8 * bytes_before
    assert len(index) == 26 and index.search(asked, 30, mode="approximate", probes=99)[1].max() <= 139
    assert index.compact() is index


def test_bytes_are_those_of_the_vectors() -> None:
    held = [np.ones((32, 64), np.float32)] * 100
    sizes = {dtype: MultiVectorIndex(64, dtype).add(held).nbytes for dtype in ("float32", "float16", "int8")}
    ids_and_offsets = 100 * (8 + 1) + 101 * 8
    assert sizes["float32"] == 3200 * 256 + ids_and_offsets
    assert sizes["float16"] == 3200 * 128 + ids_and_offsets
    assert sizes["int8"] == 3200 * (64 + 4) + ids_and_offsets


def test_a_saved_text_count_or_offset_that_lies_is_refused(tmp_path) -> None:
    index = MultiVectorIndex(4).add(texts(5, 0, dim=4)).optimize()
    arrays = index._all_arrays()
    for name, change in (
        ("offsets", lambda a: np.where(np.arange(len(a)) == 2, 10**12, a)),
        ("offsets", lambda a: a[:-1]),
        ("vectors", lambda a: a[:-1]),
        ("list_texts", lambda a: a + 5),
        ("list_offsets", lambda a: a[::-1].copy()),
        ("centers", lambda a: a[:, :2]),
    ):
        with pytest.raises(FormatError, match=name.split("_")[0]):
            MultiVectorIndex(4)._restore_all(dict(arrays) | {name: change(arrays[name])})
    whole = MultiVectorIndex(4)
    whole._restore_all(dict(arrays))
    assert len(whole) == 5


def test_the_base_class_loads_it(tmp_path) -> None:
    index = MultiVectorIndex(4, "int8", prefix=2).add(texts(5, 0, dim=4))
    assert isinstance(Index.load(index.save(tmp_path / "ix")), MultiVectorIndex)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ix: ix.add([np.ones((2, 8)), np.ones((0, 8))]), r"x\[1\] has no vectors"),
        (lambda ix: ix.add([np.full((2, 8), np.nan)]), r"x\[0\] holds NaN"),
        (lambda ix: ix.add(np.ones((2, 3, 7))), r"x must have shape \(n, size, 8\); got \(2, 3, 7\)"),
        (lambda ix: ix.add(np.ones((2, 0, 8))), r"x\[0\] has no vectors"),
        (lambda ix: ix.add(np.full((2, 1, 8), np.inf)), "x holds NaN or infinity"),
        (lambda ix: ix.add([np.ones((2, 7))]), r"x\[0\] must have shape \(n, 8\); got \(2, 7\)"),
        (lambda ix: ix.add(np.ones((2, 8))), "Put a single text into a list"),
        (lambda ix: ix.add("text"), "x must be a list of arrays"),
        (lambda ix: ix.add([["a", "b"]]), r"x\[0\] must hold real numbers"),
        (lambda ix: ix.add(3), "x must be a list of arrays"),
        (lambda ix: ix.search([np.ones((1, 9))]), r"q\[0\] must have shape"),
        (lambda ix: ix.search([np.ones((1, 8))], mode="fast"), "mode must be one of"),
        (lambda ix: ix.search([np.ones((1, 8))], 10, mode="approximate", candidates=9), "at least k=10; got 9"),
        (lambda ix: ix.search([np.ones((1, 8))], mode="approximate", probes=0), "probes must be"),
        (lambda ix: MultiVectorIndex(8, "bfloat16"), "dtype must be one of"),
        (lambda ix: MultiVectorIndex(8, prefix=9), "prefix must be an integer in"),
        (lambda ix: MultiVectorIndex(8, "float16").add([np.full((1, 8), 1e6)]), "stored as float16"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    index = MultiVectorIndex(8).add(texts(3, 0))
    with pytest.raises(QuernelError, match=message):
        call(index)
    assert len(index) == 3


def test_an_empty_index_answers_in_both_modes() -> None:
    index = MultiVectorIndex(8)
    for mode in ("exact", "approximate"):
        scores, ids = index.search(texts(2, 0), 3, mode=mode)
        assert np.isnan(scores).all() and (ids == -1).all()
    assert np.isnan(index.vectors_per_text)
    index.add(texts(2, 0)).remove([0, 1])
    assert (index.search(texts(2, 0), 3, mode="approximate")[1] == -1).all()


def test_several_shards_answer_as_one() -> None:
    held, asked = texts(30, 0), texts(5, 1)
    whole = MultiVectorIndex(8).add(held)
    halves = [MultiVectorIndex(8).add(held[i::2], range(i, 30, 2)) for i in range(2)]
    ranked = [half.ranked(asked, 4) for half in halves]
    scores, ids = (np.concatenate([getattr(r, name) for r in ranked], 1) for name in ("scores", "ids"))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(np.take_along_axis(ids, order, 1), whole.search(asked, 4)[1])
