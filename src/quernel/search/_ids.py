"""Ids of an index: which user id stands in which slot, which slots are deleted, and every complaint about ids.

Slots are numbered as items were added and never move, so a deletion only marks one. Lookups go through a sorted copy
that is made when it is first needed: sixteen bytes an item, no Python objects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._growing import GrowingArray

Ids = NDArray[np.int64]


class IdTable:
    """User ids by slot.

    Parameters
    ----------
    ids : array, int64, optional
        Id of every slot.
    alive : array, bool, optional
        Which slots are not deleted; default all.
    """

    def __init__(self, ids: Ids | None = None, alive: NDArray[np.bool_] | None = None) -> None:
        ids = np.zeros(0, np.int64) if ids is None else np.asarray(ids, np.int64)
        alive = np.ones(len(ids), bool) if alive is None else np.asarray(alive, bool)
        if ids.shape != alive.shape or ids.ndim != 1:
            raise QuernelError(f"ids and alive must have one length; got {ids.shape} and {alive.shape}")
        self._ids, self._alive = GrowingArray(ids), GrowingArray(alive)
        # Found when something is added: an index that stays in its file is not read for it.
        self._next_id: int | None = None
        self._sorted: tuple[Ids, Ids] | None = None
        # Kept, not counted when it is asked for: a search that counts may be overtaken by an addition.
        self._live = int(np.count_nonzero(alive))

    def __len__(self) -> int:
        """Slots that are not deleted."""
        return self._live

    @property
    def ids(self) -> Ids:
        """Id of every slot."""
        found: Ids = self._ids.rows
        return found

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Which slots are not deleted."""
        found: NDArray[np.bool_] = self._alive.rows
        return found

    @property
    def slots(self) -> int:
        """All slots, deleted ones included."""
        return len(self._ids)

    @property
    def _next(self) -> int:
        """Return the number after the largest id so far, deleted ones included."""
        if self._next_id is None:
            self._next_id = int(self.ids.max(initial=-1)) + 1
        return self._next_id

    @property
    def nbytes(self) -> int:
        """Bytes of the two arrays."""
        return self.ids.nbytes + self.alive.nbytes

    def checked(self, n: int, ids: Any = None) -> Ids:
        """Return the ids for ``n`` new items: those given, or the next numbers; nothing is changed yet.

        Raises
        ------
        QuernelError
            If there are not ``n`` of them, one is negative, twice there, or in the index already.
        """
        if ids is None:
            first = self._next
            if first + n > 2**63:
                raise QuernelError(f"ids must be given: counting on from {first - 1} leaves the 63 bits of an id")
            return np.arange(first, first + n, dtype=np.int64)
        given = as_ids(ids)
        if len(given) != n:
            raise QuernelError(f"ids must be {n} integers, one an item; got {len(given)}")
        if given.size and given.min() < 0:
            raise QuernelError(f"ids must not be negative; got {given.min()}")
        values, counts = np.unique(given, return_counts=True)
        if (counts > 1).any():
            raise QuernelError(f"ids holds {values[counts > 1][0]} more than once")
        # Larger than all so far, as counted ones are: nothing to look up.
        known = self._find(given) >= 0 if given.size and given.min() < self._next else np.zeros(len(given), bool)
        if known.any():
            raise QuernelError(f"ids holds {given[known][0]}, which is in the index already; remove it first")
        return given

    def append(self, ids: Ids) -> None:
        """Give the next slots these ids, which ``checked`` returned."""
        self._next_id = max(self._next, int(ids.max(initial=-1)) + 1)
        self._ids.append(ids)
        self._alive.append(np.ones(len(ids), bool))
        self._live += len(ids)
        self._sorted = None

    def truncate(self, slots: int) -> None:
        """Take back the slots from number ``slots`` on, which nothing else was told of."""
        self._ids, self._alive = GrowingArray(self.ids[:slots].copy()), GrowingArray(self.alive[:slots].copy())
        self._next_id = None
        self._live = int(np.count_nonzero(self.alive))
        self._sorted = None

    def remove(self, ids: Any) -> Ids:
        """Mark the slots of these ids as deleted and return them.

        Raises
        ------
        QuernelError
            If an id is not in the index; then nothing is removed.
        """
        given = np.unique(as_ids(ids))
        slots = self._find(given)
        if (slots < 0).any():
            raise QuernelError(f"ids holds {given[slots < 0][0]}, which is not in the index; nothing was removed")
        # Another array: a search that is under way keeps the one it began with.
        alive = self.alive.copy()
        alive[slots] = False
        self._alive = GrowingArray(alive)
        self._live -= len(slots)
        self._sorted = None
        return slots

    def of_slots(self, slots: NDArray[Any]) -> Ids:
        """Return the ids of slots of any shape; -1 for a slot of -1, and for one that was taken back by now."""
        ids = self.ids  # read once: another thread may be adding
        found = np.full(slots.shape, -1, np.int64)
        known = (slots >= 0) & (slots < len(ids))
        found[known] = ids[slots[known]]
        return found

    def _find(self, ids: Ids) -> Ids:
        """Return the slot of each id, -1 where it is not there."""
        if self._sorted is None:
            slots = np.flatnonzero(self.alive)
            order = np.argsort(self.ids[slots], kind="stable")
            self._sorted = self.ids[slots][order], slots[order].astype(np.int64)
        known, slots = self._sorted
        if not known.size:
            return np.full(len(ids), -1, np.int64)
        place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[place] == ids, slots[place], -1)


def as_ids(ids: Any) -> Ids:
    """Return ids as a one-dimensional int64 array."""
    array = np.asarray(ids)
    if array.ndim == 0:
        array = array[None]
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise QuernelError(f"ids must be a sequence of integers; got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
