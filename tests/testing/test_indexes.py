"""The index suite finds what it is there to find: each broken class fails the check that is meant for it."""

from typing import Any

import numpy as np
import pytest

from quernel._errors import FormatError
from quernel._growing import GrowingArray
from quernel.search import FlatIndex, MultiVectorIndex
from quernel.testing import ConformanceError, check_index, checks_for


def registered(cls: type, **example: Any) -> type:
    """Give a class what the suite asks for."""
    example = {"make": lambda: cls(12), "recall": 1.0, **example}
    cls._quernel_example = staticmethod(lambda: example)  # type: ignore[attr-defined]
    return cls


class Blind(FlatIndex):
    def _search(self, queries, k):
        scores, slots = super()._search(queries, k + 1)
        return scores[:, 1:], slots[:, 1:]


class Guessing(FlatIndex):
    def _search(self, queries, k):
        scores, slots = super()._search(queries, k)
        return scores * 0.9, slots


class Backwards(FlatIndex):
    def _search(self, queries, k):
        scores, slots = super()._search(queries, k)
        return scores[:, ::-1], slots[:, ::-1]


class Repeating(FlatIndex):
    def _search(self, queries, k):
        scores, slots = super()._search(queries, k)
        slots[:, 1] = slots[:, 0]
        return scores, slots


class Eager(FlatIndex):
    def search(self, q, k=10):
        """Answer with item 0 where there is none."""
        scores, ids = super().search(q, k)
        return scores, np.where(ids < 0, 0, ids)


class Last(FlatIndex):
    def _append(self, items):
        self._rows = GrowingArray(np.concatenate([items, self.vectors]))


class Numbering(FlatIndex):
    def search(self, q, k=10):
        """Answer with slots."""
        scores, ids = super().search(q, k)
        table = self._ids.ids
        return scores, np.where(ids >= 0, np.searchsorted(np.sort(table), ids), -1)


class Greedy(FlatIndex):
    def add(self, x, ids=None):
        """Add the items before the ids are checked."""
        rows = self._items("x", x)
        self._append(rows)
        self._ids.append(np.arange(self._ids.slots, self._ids.slots + len(rows)))
        self._ids.ids[-len(rows) :] = self._ids.ids[-len(rows) :] if ids is None else ids
        return self


class Clinging(FlatIndex):
    def remove(self, ids):
        """Remove nothing."""
        return len(ids)


class Rounding(FlatIndex):
    def _arrays(self):
        return {"vectors": self.vectors.astype(np.float16).astype(np.float32)}


class Drawing(FlatIndex):
    def _append(self, items):
        super()._append(items + np.random.standard_normal(items.shape).astype(np.float32) * 0)  # noqa: NPY002


class Unseeded(FlatIndex):
    def _append(self, items):
        super()._append(items + np.random.default_rng().standard_normal(items.shape).astype(np.float32) * 1e-2)


class Trusting(FlatIndex):
    def _items(self, name, x):
        return np.nan_to_num(np.asarray(x, np.float32)).reshape(-1, 12)


class Fine(FlatIndex):
    pass


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (Blind, "answers", "finds 0.00 of the nearest items first"),
        (Guessing, "answers", "scores are not those of the items they stand beside"),
        (Backwards, "answers", "answers do not come best first"),
        (Repeating, "answers", "an item is found twice"),
        (Eager, "few_items", "an empty index answers with items"),
        (Last, "chunks", "added in pieces: other answers"),
        (Numbering, "ids", "users' ids do not follow|never given"),
        (Greedy, "ids", "a taken id raises no QuernelError"),
        (Clinging, "remove", "after 10 of 200 were removed"),
        (Drawing, "determinism", "draws from a global random generator"),
        (Unseeded, "determinism", "built again: other answers"),
        (Trusting, "bad_input", "add of NaN raises no QuernelError"),
    ],
)
def test_broken_indexes_are_found(cls: type, check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        checks_for("index")[check](registered(cls))


def test_estimated_scores_must_be_declared() -> None:
    checks_for("index")["answers"](registered(Guessing, recall=0.9, exact_scores=False))
    with pytest.raises(ConformanceError, match="scores are not those"):
        checks_for("index")["answers"](registered(Guessing, recall=0.9))


def _resolving(monkeypatch: pytest.MonkeyPatch, cls: type) -> type:
    def resolve(name: object, *, file: str, field: str) -> type:
        if name != cls.__name__:
            raise FormatError(f"{file}: field {field!r} names {name!r}")
        return cls

    for module in ("quernel._load", "quernel._array_folder"):
        monkeypatch.setattr(f"{module}.resolve_class", resolve)
    return registered(cls)


def test_a_file_that_rounds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConformanceError, match="after save and load: other answers"):
        checks_for("index")["save_and_load"](_resolving(monkeypatch, Rounding))


class Careless(FlatIndex):
    @classmethod
    def from_folder(cls, content, tensors, **options):
        """Answer something whatever the file says."""
        try:
            return super().from_folder(content, tensors, **options)
        except Exception:
            return cls(12).add(np.ones((3, 12)))


def test_lying_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConformanceError, match="loads silently with other answers"):
        checks_for("index")["damaged_files"](_resolving(monkeypatch, Careless))


def texts(n: int, noise: float = 0.0) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    rows = [draw.standard_normal((draw.integers(1, 5), 12)) for _ in range(n)]
    rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
    return [(x + noise * draw.standard_normal(x.shape)).astype(np.float32) for x in rows]


def by_loop(items, queries):
    return np.array([[sum((x @ q).max() for q in query) for x in items] for query in queries])


def of_texts(cls: type, **example: Any) -> type:
    """Give an index of lists of vectors what the suite asks for."""
    lists = {"items": texts, "queries": lambda n: texts(n, 0.01), "reference": by_loop}
    return registered(cls, **{**lists, **example})


class Lists(MultiVectorIndex):
    pass


class Averaging(MultiVectorIndex):
    def _search(self, queries, k):
        scores, slots = super()._search(queries, k)
        return scores / np.diff(queries.offsets)[:, None].astype(np.float32), slots


class Filling(MultiVectorIndex):
    def _items(self, name, x):
        return super()._items(name, [one if len(one) else np.zeros((1, 12)) for one in x])


class Forgiving(MultiVectorIndex):
    def _items(self, name, x):
        return super()._items(name, x if isinstance(x, list) else list(np.asarray(x)[None]))


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (Averaging, "answers", "scores are not those of the items they stand beside"),
        (Filling, "bad_input", "add of a list without vectors raises no QuernelError"),
        (Forgiving, "bad_input", "add of one item that is not in a list raises no QuernelError"),
    ],
)
def test_broken_indexes_of_lists_are_found(cls: type, check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        checks_for("index")[check](of_texts(cls))


def test_a_reference_is_held_to_its_shape_and_to_the_whole_answer() -> None:
    checks_for("index")["answers"](of_texts(Lists))
    with pytest.raises(ConformanceError, match=r"the reference gives scores of shape \(200, 20\)"):
        checks_for("index")["answers"](of_texts(Lists, reference=lambda x, q: by_loop(x, q).T))
    # Another order than the reference's among the best.
    worse = of_texts(Lists, reference=lambda x, q: -by_loop(x, q), exact_scores=False)
    with pytest.raises(ConformanceError, match="answers differ from the exact ones"):
        checks_for("index")["answers"](worse)


def test_the_public_name_runs_all() -> None:
    check_index(FlatIndex)
