"""Conformance of indexes: answers held against the exact ones, ids that cannot be mixed up, files that last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quernel._errors import FormatError, QuernelError
from quernel._load import load
from quernel._registry import example_of
from quernel._timing import threads
from quernel.hashing import Sets
from quernel.search import FlatIndex, Index
from quernel.testing._modules_shared import FORGED_FIELDS, damages
from quernel.testing._suite import global_generators_untouched, require, run_all

ITEMS, QUERIES, K = 200, 20, 5
# Queries are items with this much noise: what approximate indexes are made for.
NOISE = 0.05
# Bytes of a tensor file besides its numbers.
HEADER = 4096
# float32 products summed in another order.
SAME = 1e-5


def check_index(cls: type) -> None:
    """Run every check of the ``index`` contract.

    The registered ``example()`` returns ``{"make": () -> empty index}`` and optionally ``"recall"``: the share of
    near-duplicate queries whose nearest item must come first (default 0.9; 1.0 also compares whole answers with
    the reference), ``"exact_scores": False`` where scores are estimates, ``"items": (n) -> items`` and
    ``"queries": (n) -> queries``, query i next to item i, where random vectors of ``dim`` numbers will not do, and
    ``"reference": (items, queries) -> scores``, true scores of all pairs of shape (queries, items), where
    ``FlatIndex`` does not have the metric. Items are rows of an array, ``Sets``, or a list of arrays. Where items are a
    list of something else, ``"wrong_items": (items) -> [(what is wrong, value)]`` gives what ``add`` must refuse, and
    queries are rows of an array.
    """
    run_all(cls, "index")


def check_answers(cls: type) -> None:
    """Answers have their shapes, come best first without repeats, and find what is there to be found."""
    index, items, queries = _filled(cls)
    scores, ids = index.search(queries, K)
    _require_form(cls, scores, ids, QUERIES, K)
    recall = float((ids[:, 0] == np.arange(QUERIES)).mean())
    wanted, exact_scores = example_of(cls).get("recall", 0.9), example_of(cls).get("exact_scores", True)
    require(recall >= wanted, cls, f"finds {recall:.2f} of the nearest items first; {wanted} is promised")
    if not exact_scores and wanted < 1.0:
        return
    exact = _exact(cls, index, items, queries)
    if exact_scores:
        for row in range(QUERIES):
            found = ids[row] >= 0
            same = np.allclose(scores[row, found], exact[row, ids[row, found]], atol=SAME)
            require(bool(same), cls, "scores are not those of the items they stand beside")
    if wanted == 1.0:
        exact_ids = np.argsort(-exact, axis=1, kind="stable")[:, :K]
        require(np.array_equal(ids, exact_ids), cls, "answers differ from the exact ones")
        best = np.take_along_axis(exact, exact_ids, 1)
        require(bool(np.allclose(scores, best, atol=SAME)), cls, "scores differ from the exact ones")


def check_few_items(cls: type) -> None:
    """Where fewer than k items are found, ids are -1 and scores NaN, never an item; an empty index answers too."""
    index, items, queries = _empty(cls), *_data(cls)
    scores, ids = index.search(queries, 3)
    require(bool((ids == -1).all() and np.isnan(scores).all()), cls, "an empty index answers with items")
    index.add(items[:2])
    scores, ids = index.search(queries[:2], 6)
    _require_form(cls, scores, ids, 2, 6)
    require(bool((ids[:, 2:] == -1).all()), cls, "two items give more than two answers")
    scores, ids = index.search(queries[:0], 3)
    require(scores.shape == ids.shape == (0, 3), cls, f"no query gives shapes {scores.shape} and {ids.shape}")


def check_chunks(cls: type) -> None:
    """Items added in pieces answer as items added at once, on one thread as on several."""
    index, items, queries = _filled(cls)
    pieces = _empty(cls)
    for start, stop in ((0, 1), (1, 50), (50, 50), (50, ITEMS)):
        pieces.add(items[start:stop])
    _require_same(cls, "added in pieces", pieces, index, queries)
    wanted = index.search(queries, K)
    with threads(1):
        got = index.search(queries, K)
        again = _empty(cls).add(items).search(queries, K)
    for what, (scores, ids) in (("searched on one thread", got), ("built on one thread", again)):
        require(np.array_equal(ids, wanted[1]), cls, f"{what}: other ids")
        require(bool(np.allclose(scores, wanted[0], atol=SAME, equal_nan=True)), cls, f"{what}: other scores")


def check_ids(cls: type) -> None:
    """Users' ids come back; ids that are negative, twice there or taken are refused and nothing is added."""
    items, queries = _data(cls)
    names = np.arange(ITEMS)[::-1] * 7 + 3
    index = _empty(cls).add(items[:100], names[:100]).add(items[100:], ids=list(names[100:]))
    found = index.search(queries, K)[1]
    require(bool(np.isin(found[found >= 0], names).all()), cls, "answers hold ids that were never given")
    plain = _filled(cls)[0].search(queries, K)[1]
    require(np.array_equal(found, np.where(plain >= 0, names[plain], -1)), cls, "users' ids do not follow their items")
    for what, ids, word in (
        ("a taken id", [int(names[0]), 2], "already"),
        ("a repeated id", [1, 1], "once"),
        ("a negative id", [1, -4], "negative"),
        ("a missing id", [1], "2"),
        ("a fraction", [0.5, 1.5], "integers"),
    ):
        _require_error(cls, what, word, partial(index.add, items[:2], ids))
    require(len(index) == ITEMS, cls, f"refused items were added: {len(index)} of {ITEMS}")
    require(np.array_equal(index.search(queries, K)[1], found), cls, "a refused add changes answers")


def check_remove(cls: type) -> None:
    """A removed item is never found; others are as before; it can be added again; unknown ids are refused."""
    index, items, queries = _filled(cls)
    gone = list(range(0, QUERIES, 2))
    require(index.remove(gone) == len(gone), cls, "remove does not say how many")
    require(len(index) == ITEMS - len(gone), cls, f"len is {len(index)} after {len(gone)} of {ITEMS} were removed")
    found = index.search(queries, K)[1]
    require(not np.isin(found, gone).any(), cls, "a removed item is found")
    _require_error(cls, "removing what is gone", "not in the index", lambda: index.remove([1, gone[0]]))
    require(len(index) == ITEMS - len(gone), cls, "a refused remove removes")
    index.add(items[:1], [0])
    require(int(index.search(queries[:1], 1)[1][0, 0]) == 0, cls, "an item added again is not found")
    index.remove(index.ids)
    require(len(index) == 0 and bool((index.search(queries, 2)[1] == -1).all()), cls, "an emptied index answers")


def check_save_and_load(cls: type) -> None:
    """A saved index answers bit for bit, keeps ids and deletions, and can be added to."""
    index, items, queries = _filled(cls)
    index.remove([3, 11])
    with tempfile.TemporaryDirectory() as folder:
        path = index.save(folder)
        sizes = [file.stat().st_size for file in path.rglob("*.safetensors")]
        twins = load(path), cls.load(path), Index.load(path)  # type: ignore[attr-defined]
    fits = index.nbytes <= sum(sizes) <= index.nbytes + HEADER * len(sizes)
    require(fits, cls, f"nbytes is {index.nbytes}, the files have {sum(sizes)} bytes")
    for twin in twins:
        require(type(twin) is cls, cls, f"load returns a {type(twin).__name__}")
        require(twin.config() == index.config(), cls, "config() changes over save and load")
        _require_same(cls, "after save and load", twin, index, queries)
    for one in (index, twins[0]):
        one.add(items[3:4], [3])
    _require_same(cls, "after a loaded one went on", twins[0], index, queries)


def check_damaged_files(cls: type) -> None:
    """Truncated and altered files raise a ``FormatError`` or, where harmless, change nothing."""
    index, _, queries = _filled(cls)
    wanted = index.search(queries, K)
    with tempfile.TemporaryDirectory() as name:
        folder = index.save(name)
        for change in damages(folder, FORGED_FIELDS):
            _require_refused(cls, folder, change, queries, wanted)


def check_bad_input(cls: type) -> None:
    """Wrong widths, NaN, empty sets and lists and impossible k raise a Quernel error and lose nothing."""
    index, items, queries = _filled(cls)
    wanted = index.search(queries, K)
    own = example_of(cls).get("wrong_items")
    for what, value in own(items) if own else _wrong(items):
        _require_error(cls, f"add of {what}", "x", partial(index.add, value))
    for what, value in _wrong(queries):
        _require_error(
            cls, f"search of {what}", "q" if not isinstance(items, Sets) else "", partial(index.search, value)
        )
    for k in (0, -1, 2.5):
        _require_error(cls, f"k={k}", "k", partial(index.search, queries, k))
    got = index.search(queries, K)
    require(len(index) == ITEMS and np.array_equal(got[1], wanted[1]), cls, "a refused call changes the index")


def check_determinism(cls: type) -> None:
    """Two indexes of the same items are equal bit for bit, and nothing global is drawn from."""
    items, queries = _data(cls)
    with global_generators_untouched(cls, "building and searching"):
        first, second = (_empty(cls).add(items) for _ in range(2))
        first.search(queries, K)
    _require_same(cls, "built again", second, first, queries)


def _empty(cls: type) -> Any:
    return example_of(cls)["make"]()


def _data(cls: type) -> tuple[Any, Any]:
    """Return ITEMS items and QUERIES queries, query i being item i with a little noise."""
    example = example_of(cls)
    if "items" in example:
        return example["items"](ITEMS), example["queries"](QUERIES)
    draw = np.random.default_rng(0)
    items = draw.standard_normal((ITEMS, _empty(cls).dim)).astype(np.float32)
    queries = items[:QUERIES] + NOISE * draw.standard_normal((QUERIES, items.shape[1])).astype(np.float32)
    return items, queries


def _filled(cls: type) -> tuple[Any, Any, Any]:
    items, queries = _data(cls)
    return _empty(cls).add(items), items, queries


def _exact(cls: type, index: Any, items: Any, queries: Any) -> Any:
    """Return the true scores of all pairs, (queries, items)."""
    example = example_of(cls)
    if "reference" in example:
        exact = np.asarray(example["reference"](items, queries))
        require(exact.shape == (QUERIES, ITEMS), cls, f"the reference gives scores of shape {exact.shape}")
        return exact
    every, order = FlatIndex(index.dim, index.metric).add(items).search(queries, ITEMS)
    exact = np.empty((QUERIES, ITEMS), np.float32)
    np.put_along_axis(exact, order, every, 1)
    return exact


def _wrong(items: Any) -> list[tuple[str, Any]]:
    """Return what no index of such items may take, and what is wrong with it."""
    if isinstance(items, Sets):
        return [("an empty set", [[1, 2], []]), ("a negative item", [[1, -2]])]
    if isinstance(items, np.ndarray):
        broken = items[:2].copy()
        broken[1, 0] = np.nan
        return [("NaN", broken), ("a column too many", np.ones((2, items.shape[1] + 1))), ("text", [["a"] * 3])]
    first, second = (np.array(item) for item in items[:2])
    second[0, 0] = np.nan
    return [
        ("NaN", [first, second]),
        ("a column too many", [first, np.ones((2, first.shape[1] + 1))]),
        ("a list without vectors", [first, first[:0]]),
        ("one item that is not in a list", first),
        ("text", [[["a"] * 3]]),
    ]


def _require_form(cls: type, scores: Any, ids: Any, n: int, k: int) -> None:
    require(scores.shape == ids.shape == (n, k), cls, f"answers of shapes {scores.shape} and {ids.shape}, not {(n, k)}")
    require(scores.dtype == np.float32 and ids.dtype == np.int64, cls, f"answers are {scores.dtype} and {ids.dtype}")
    require(bool((np.isnan(scores) == (ids == -1)).all()), cls, "scores are not NaN exactly where ids are -1")
    for row_scores, row_ids in zip(scores, ids, strict=True):
        found = row_ids[row_ids >= 0]
        require(bool((row_ids[: len(found)] >= 0).all()), cls, "a missing answer stands before one that was found")
        require(len(np.unique(found)) == len(found), cls, "an item is found twice")
        require(bool((np.diff(row_scores[: len(found)]) <= 0).all()), cls, "answers do not come best first")


def _require_same(cls: type, what: str, got: Any, wanted: Any, queries: Any) -> None:
    for one, other in zip(got.search(queries, K), wanted.search(queries, K), strict=True):
        require(np.array_equal(one, other, equal_nan=True), cls, f"{what}: other answers")


def _require_error(cls: type, what: str, word: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except QuernelError as error:
        require(word in str(error), cls, f"{what}: the error does not mention {word!r}: {error}")
        return
    require(False, cls, f"{what} raises no QuernelError")


def _require_refused(cls: type, folder: Path, change: str, queries: Any, wanted: Any) -> None:
    try:
        twin = load(folder)
    except FormatError as error:
        require(str(folder) in str(error), cls, f"{change} is refused without naming the file: {error}")
        return
    try:
        got = twin.search(queries, K)
    except QuernelError as error:
        require(False, cls, f"{change} loads silently and then fails: {error}")
        return
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, wanted, strict=True))
    require(same, cls, f"{change} loads silently with other answers")


CHECKS = {
    "answers": check_answers,
    "few_items": check_few_items,
    "chunks": check_chunks,
    "ids": check_ids,
    "remove": check_remove,
    "save_and_load": check_save_and_load,
    "damaged_files": check_damaged_files,
    "bad_input": check_bad_input,
    "determinism": check_determinism,
}
