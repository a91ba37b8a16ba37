"""Conformance of sketches: linear in what they are given, merged like with like only, saved without loss."""

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
from quernel.sketch import Sketch
from quernel.testing._modules_shared import FORGED_FIELDS, damages
from quernel.testing._suite import global_generators_untouched, require, run_all

ITEMS, QUERIES = 300, 20


def check_sketch(cls: type) -> None:
    """Run every check of the ``sketch`` contract.

    The registered ``example()`` returns ``{"make": (**arguments) -> empty sketch, "other": arguments of which each
    mapping makes a sketch of other functions, "exact": (items, weights, queries) -> what queries are answers of,
    "tolerance": largest error of an answer}`` and either ``"dim"``, for rows of normal numbers, or ``"items": (n) ->
    items`` and ``"queries": (n) -> queries``. Weights are whole numbers from -4 to 4.
    """
    run_all(cls, "sketch")


def check_answers(cls: type) -> None:
    """Answers are near the exact ones, one a query; an empty sketch answers with zeros."""
    items, weights, queries = _data(cls)
    example = example_of(cls)
    require(not np.any(_made(cls).query(queries)), cls, "an empty sketch answers with something else than 0")
    got = _made(cls).update(items, weights).query(queries)
    wanted = np.asarray(example["exact"](items, weights, queries))
    require(got.shape == wanted.shape, cls, f"answers of shape {got.shape}, exact ones of {wanted.shape}")
    worst = float(np.abs(got - wanted).max())
    require(worst <= example["tolerance"], cls, f"answers are off by {worst:.3g}; {example['tolerance']} is promised")
    require(len(_made(cls).query(queries[:0])) == 0, cls, "no query gives answers")


def check_linear(cls: type) -> None:
    """Pieces of a stream, on any number of threads, and merged parts give what the stream gives, bit for bit."""
    items, weights, queries = _data(cls)
    wanted = _made(cls).update(items, weights)
    pieces = _made(cls)
    for start in range(0, ITEMS, 70):
        require(
            pieces.update(items[start : start + 70], weights[start : start + 70]) is pieces, cls, "update is not fluent"
        )
    _require_same(cls, "fed in pieces", pieces, wanted, queries)
    halves = [_made(cls).update(items[part], weights[part]) for part in (slice(0, 90), slice(90, None))]
    _require_same(cls, "merged", halves[0].merge(halves[1]), wanted, queries)
    with threads(1):
        _require_same(cls, "on one thread", _made(cls).update(items, weights), wanted, queries)
    _require_same(cls, "after no items", wanted.update(items[:0]), pieces, queries)


def check_take_back(cls: type) -> None:
    """What is inserted and taken back leaves no trace; a weight counts as so many items."""
    items, weights, queries = _data(cls)
    kept = _made(cls).update(items[:50])
    wanted = _made(cls).update(items[:50])
    kept.update(items, weights).update(items, -weights)
    _require_same(cls, "after taking back", kept, wanted, queries)
    twice = _made(cls).update(items, 2)
    _require_same(cls, "with weight 2", twice, _made(cls).update(items).update(items), queries)


def check_merge_refusals(cls: type) -> None:
    """A sketch of other functions is refused, and nothing changes."""
    items, weights, queries = _data(cls)
    held, wanted = (_made(cls).update(items, weights) for _ in range(2))
    for arguments in example_of(cls)["other"]:
        other = example_of(cls)["make"](**arguments).update(items)
        _require_error(cls, f"merging a sketch with {arguments}", "other", partial(held.merge, other))
    _require_error(cls, "merging no sketch", "other", lambda: held.merge("sketch"))
    _require_same(cls, "after a refused merge", held, wanted, queries)


def check_save_and_load(cls: type) -> None:
    """A saved sketch answers bit for bit, and can be updated and merged."""
    items, weights, queries = _data(cls)
    sketch = _made(cls).update(items, weights)
    with tempfile.TemporaryDirectory() as folder:
        path = sketch.save(folder)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        twins: list[Any] = [load(path), cls.load(path), Sketch.load(path)]  # type: ignore[attr-defined]
    require(sketch.nbytes <= size <= sketch.nbytes + 4096, cls, f"nbytes is {sketch.nbytes}, the file has {size}")
    for twin in twins:
        require(twin.config() == sketch.config(), cls, "config() changes over save and load")
        require(type(twin) is cls, cls, f"load returns a {type(twin).__name__}")
        _require_same(cls, "after save and load", twin, sketch, queries)
    for one in (sketch, twins[0]):
        one.update(items[:9])
    _require_same(cls, "after a loaded one went on", twins[0], sketch, queries)
    twins[1].merge(_made(cls).update(items[:9]))
    _require_same(cls, "after a loaded one was merged", twins[1], sketch, queries)


def check_damaged_files(cls: type) -> None:
    """Truncated and altered files raise a ``FormatError`` or, where harmless, change nothing."""
    items, weights, queries = _data(cls)
    sketch = _made(cls).update(items, weights)
    wanted = sketch.query(queries)
    with tempfile.TemporaryDirectory() as name:
        folder = sketch.save(name)
        for change in damages(folder, FORGED_FIELDS):
            _require_refused(cls, folder, change, queries, wanted)


def check_bad_input(cls: type) -> None:
    """Items, weights and queries that cannot be right raise a Quernel error that names them, and change nothing."""
    items, weights, queries = _data(cls)
    held, wanted = (_made(cls).update(items, weights) for _ in range(2))
    broken = np.array(weights, float)
    broken[7] = np.nan
    for what, value in (("NaN", broken), ("one too few", weights[:-1]), ("text", ["a"] * ITEMS)):
        _require_error(cls, f"a weight of {what}", "weight", partial(held.update, items, value))
    if "dim" in example_of(cls):
        rows = np.array(items)
        rows[5, 0] = np.nan
        wrong: list[tuple[str, Any]] = [("NaN", rows), ("a column too many", np.ones((2, rows.shape[1] + 1)))]
        wrong += [("text", [["a"] * rows.shape[1]]), ("numbers beyond float32", np.full((2, rows.shape[1]), 1e300))]
        for what, value in wrong:
            _require_error(cls, f"update with {what}", "", partial(held.update, value))
            _require_error(cls, f"query with {what}", "", partial(held.query, value))
    _require_same(cls, "after refused calls", held, wanted, queries)


def check_determinism(cls: type) -> None:
    """Two sketches of the same items are equal bit for bit, and nothing global is drawn from."""
    items, weights, queries = _data(cls)
    with global_generators_untouched(cls, "updating and querying"):
        first, second = (_made(cls).update(items, weights) for _ in range(2))
        first.query(queries)
    _require_same(cls, "built again", second, first, queries)


def _made(cls: type) -> Any:
    return example_of(cls)["make"]()


def _data(cls: type) -> tuple[Any, Any, Any]:
    """Return ITEMS items, whole weights and QUERIES queries, some of them near items."""
    example, draw = example_of(cls), np.random.default_rng(0)
    weights = draw.integers(-4, 5, ITEMS)
    if "items" in example:
        return example["items"](ITEMS), weights, example["queries"](QUERIES)
    items = draw.standard_normal((ITEMS, example["dim"])).astype(np.float32)
    return items, weights, items[:QUERIES] + np.float32(0.1)


def _require_same(cls: type, what: str, got: Any, wanted: Any, queries: Any) -> None:
    require(np.array_equal(got.query(queries), wanted.query(queries)), cls, f"{what}: other answers")


def _require_error(cls: type, what: str, word: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except QuernelError as error:
        require(word in str(error), cls, f"{what}: the error does not mention {word!r}: {error}")
        return
    require(False, cls, f"{what} raises no QuernelError")


def _require_refused(cls: type, folder: Path, change: str, queries: Any, wanted: Any) -> None:
    try:
        got = load(folder).query(queries)
    except FormatError as error:
        require(str(folder) in str(error), cls, f"{change} is refused without naming the file: {error}")
        return
    require(np.array_equal(got, wanted), cls, f"{change} loads silently with other answers")


CHECKS = {
    "answers": check_answers,
    "linear": check_linear,
    "take_back": check_take_back,
    "merge_refusals": check_merge_refusals,
    "save_and_load": check_save_and_load,
    "damaged_files": check_damaged_files,
    "bad_input": check_bad_input,
    "determinism": check_determinism,
}
