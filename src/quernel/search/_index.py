"""``Index``: the verbs of every search structure, and what they share: ids, checks, saving.

    add(x, ids=None)    search(q, k) -> (scores, ids)    remove(ids)    save(path), load(path)    len    nbytes

A larger score is closer: cosine and inner products as they are, distances negated. Where fewer than k items are
found, the rest of a row has id -1 and score NaN. A subclass holds its own arrays by slot and writes four methods.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import ArrayFolder, Arrays, take
from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.hashing import Sets
from quernel.hashing._family import check_rows
from quernel.search._ids import IdTable

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]
Items = NDArray[np.float32] | Sets

VECTOR_METRICS = ("cosine", "l2", "ip")
SET_METRICS = ("jaccard",)


class Ranking(NamedTuple):
    """An answer and what orders its equal scores: ``first``, then the shard, ``second`` and the id; all (n, k)."""

    scores: Scores
    ids: Ids
    first: Ids
    second: Ids


class Index(ArrayFolder):
    """Base of the search structures.

    A subclass sets ``metric`` and ``dim`` (None for sets), stores items in ``_append``, answers in ``_search`` with
    slots, and describes itself in ``config``, ``_arrays`` and ``_restore``.
    """

    kind: ClassVar[str] = "index"

    metric: str
    dim: int | None

    def __init__(self) -> None:
        self._ids = IdTable()

    def add(self, x: Any, ids: Any = None) -> Self:
        """Add items.

        Parameters
        ----------
        x : array, shape (n, dim), or sets
            Vectors, or what ``quernel.hashing.Sets.of`` takes.
        ids : sequence of int, optional
            A non-negative id an item; default counts on from the largest so far.

        Returns
        -------
        self

        Raises
        ------
        QuernelError
            If anything is wrong with an item or an id; then nothing was added.
        """
        items = self._items("x", x)
        checked = self._ids.checked(len(items), ids)
        if len(items):
            self._append(items)
            self._ids.append(checked)
        return self

    def search(self, q: Any, k: int = 10) -> tuple[Scores, Ids]:
        """Return the k closest items of each query, closest first.

        Parameters
        ----------
        q : array, shape (n, dim), or sets
        k : int, default=10

        Returns
        -------
        scores : array, shape (n, k), float32
            Larger is closer; NaN where fewer than k items were found.
        ids : array, shape (n, k), int64
            -1 where fewer than k items were found.
        """
        return self._answer(q, k, self._search)

    def remove(self, ids: Any) -> int:
        """Delete items by id and return how many.

        Raises
        ------
        QuernelError
            If an id is not there; then nothing was removed.
        """
        slots = self._ids.remove(ids)
        if len(slots):
            self._forget(slots)
        return len(slots)

    def __len__(self) -> int:
        """Items that can be found."""
        return len(self._ids)

    @property
    def ids(self) -> Ids:
        """Ids of the items that can be found, in the order they were added."""
        return self._ids.ids[self._ids.alive]

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Whether the item of each slot can still be found; ``ids`` are those of the slots that can."""
        held: NDArray[np.bool_] = self._ids.alive.copy()
        return held

    def ranked(self, queries: Any, k: int, **options: Any) -> Ranking:
        """Return what ``search`` returns and what decides between equal scores, to be merged with other indexes'."""
        scores, ids = self.search(queries, k, **options)
        return Ranking(scores, ids, ids, np.zeros(ids.shape, np.int64))

    @abstractmethod
    def _append(self, items: Any) -> None:
        """Store checked items in the next slots; called before the ids are."""

    @abstractmethod
    def _search(self, queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
        """Return scores and slots, both (n, k), slot -1 where fewer are found; deleted slots must not appear."""

    def _answer(self, q: Any, k: int, search: Callable[[Any, int], tuple[Scores, Ids]]) -> tuple[Scores, Ids]:
        """Check queries, let ``search`` find scores and slots, and turn slots into ids."""
        queries = self._items("q", q)
        check_int("k", k, low=1)
        if not len(queries) or not len(self):
            return np.full((len(queries), k), np.nan, np.float32), np.full((len(queries), k), -1, np.int64)
        scores, slots = search(queries, k)
        ids = self._ids.of_slots(slots)
        return np.where(ids >= 0, scores, np.nan).astype(np.float32), ids

    def _forget(self, slots: NDArray[np.int64]) -> None:
        """Be told of slots that are deleted now; ``self._ids.alive`` says so too."""

    def _items(self, name: str, x: Any) -> Any:
        """Return checked items: float32 rows, or sets."""
        if self.metric in SET_METRICS:
            return Sets.of(x)
        if isinstance(x, Sets):
            raise QuernelError(f"{name} holds sets; this index holds vectors of {self.dim} numbers ({self.metric})")
        rows = check_rows(name, x, self.dim or 0)
        if self.metric == "cosine" and len(rows) and not (np.abs(rows).max(axis=1) > 0).all():
            raise QuernelError(f"{name} holds a vector of zeros, which has no direction for the cosine")
        return rows

    def _all_arrays(self) -> Arrays:
        return {"ids": self._ids.ids, "alive": self._ids.alive, **self._arrays()}

    def _restore_all(self, arrays: Arrays) -> None:
        slots = (None,)
        self._ids = IdTable(take(arrays, "ids", np.int64, slots), take(arrays, "alive", np.bool_, slots))
        self._restore(arrays)
