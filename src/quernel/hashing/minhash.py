"""``MinHash``: densified one-permutation hashing of sets, for Jaccard similarity (Li et al., 2012; Shrivastava, 2017).

Every item is hashed once; its hash picks one of L K bins and the value that competes for the bin's minimum. A bin that
no item fell into borrows the minimum of a bin that mix64(bin, attempt) names, the first that is not empty. Two sets
agree in one hash with probability |A & B| / |A u B|. Cost: one hash an item and L K a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.hashing._family import LSHFamily, Raw, over_rows
from quernel.hashing.mixers import U64, fastrange_small, mix64, mix64_step

_LOW = U64(0xFFFFFFFF)
_BORROW = U64(0xB0)
_EMPTY = np.int64(-1)


@dataclass(frozen=True, eq=False)
class Sets:
    """n sets of item ids as one array: set i is ``items[offsets[i]:offsets[i + 1]]``.

    Attributes
    ----------
    offsets : array, shape (n + 1,), int64
    items : array, int64
        Non-negative; duplicates within a set are harmless.

    Raises
    ------
    QuernelError
        If the offsets do not divide the items, a set is empty, or an item is negative.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]

    def __post_init__(self) -> None:
        # Checked whoever makes one: a hash of an empty set would look for its smallest item for ever.
        offsets, items = np.asarray(self.offsets), np.asarray(self.items)
        fits = offsets.ndim == items.ndim == 1 and len(offsets) and offsets.dtype.kind == items.dtype.kind == "i"
        if not fits or offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
            raise QuernelError("offsets must rise from 0 to the number of items; both must be arrays of integers")
        empty = np.flatnonzero(np.diff(offsets) == 0)
        if empty.size:
            raise QuernelError(f"X[{empty[0]}] is empty; the Jaccard similarity of an empty set is undefined")
        if items.size and items.min() < 0:
            raise QuernelError(f"X holds the item id {items.min()}; ids must not be negative")
        object.__setattr__(self, "offsets", np.ascontiguousarray(offsets, np.int64))
        object.__setattr__(self, "items", np.ascontiguousarray(items, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> Sets:
        start, stop, _ = rows.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return Sets(offsets - offsets[0], self.items[offsets[0] : offsets[-1]])

    def take(self, rows: NDArray[np.integer[Any]]) -> Sets:
        """Return the sets with these numbers, in this order."""
        sizes = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], sizes)
        return Sets(offsets, self.items[places])

    @classmethod
    def of(cls, X: Any) -> Sets:
        """Take a list of integer arrays or Python sets, a scipy sparse matrix (its columns are the items), or ``Sets``.

        Raises
        ------
        QuernelError
            If a set is empty, or an item is negative or no integer.
        """
        if isinstance(X, Sets):
            return X
        if isinstance(X, set | frozenset):
            raise QuernelError("X must be a list of sets; got one set. Put it in a list, [X]")
        if hasattr(X, "tocsr"):
            rows = X.tocsr()
            if (rows.data == 0).any():  # stored zeros: the item is not in the set
                rows = rows.copy()
                rows.eliminate_zeros()
            offsets, items = np.asarray(rows.indptr, np.int64), np.asarray(rows.indices, np.int64)
        else:
            arrays = [np.asarray(list(one) if isinstance(one, set | frozenset) else one).reshape(-1) for one in X]
            wrong = next((i for i, a in enumerate(arrays) if a.size and a.dtype.kind not in "iu"), None)
            if wrong is not None:
                raise QuernelError(f"X[{wrong}] must hold integer item ids; got {arrays[wrong].dtype}")
            offsets = np.concatenate([[0], np.cumsum([a.size for a in arrays], dtype=np.int64)]).astype(np.int64)
            items = np.concatenate([a.astype(np.int64) for a in arrays]) if arrays else np.zeros(0, np.int64)
        return cls(offsets, items)


class MinHash(LSHFamily):
    """L codes of K minimum hashes of sets.

    Parameters
    ----------
    n_tables, n_concat : int
        L and K.
    n_cells : int, default=2**32
        Range of the mixed codes.
    seed : int, default=0

    Examples
    --------
    >>> family = MinHash(n_tables=64, n_concat=1)
    >>> codes = family.codes([[1, 2, 3, 4], [1, 2, 3, 5], [7, 8, 9]])
    >>> float((codes[0] == codes[1]).mean()) > float((codes[0] == codes[2]).mean())
    True
    """

    def __init__(self, n_tables: int, n_concat: int, n_cells: int = 2**32, *, seed: int = 0) -> None:
        super().__init__(n_tables, n_concat, n_cells, seed)
        check_int("n_tables * n_concat", self.n_tables * self.n_concat, high=2**31)

    def raw(self, X: Any) -> Raw:
        """Return the minimum hashes of n sets, int64 (n, L, K)."""
        sets = Sets.of(X)
        bins = self.n_tables * self.n_concat
        out = np.empty((len(sets), bins), np.int64)
        state = U64(mix64(self.seed))
        over_rows(lambda start, stop: min_hashes(sets.offsets, sets.items, state, out, start, stop), len(sets))
        return out.reshape(len(sets), self.n_tables, self.n_concat)

    def hash_probability(self, *similarity: Any) -> Any:
        """Return the Jaccard similarity itself."""
        (jaccard,) = similarity
        values = np.asarray(jaccard, dtype=float)
        if not ((values >= 0) & (values <= 1)).all():
            raise QuernelError(f"jaccard must lie in [0, 1]; got {jaccard!r}")
        return values[()]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        described = {"n_tables": self.n_tables, "n_concat": self.n_concat, "n_cells": self.n_cells}
        return described | {"seed": self.seed}


@njit(nogil=True, cache=True, fastmath=False)
def min_hashes(offsets: Any, items: Any, state: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the bins' minima of sets [start, stop) to ``out`` (n, bins); ``state`` is ``mix64_seed(seed)``."""
    bins = U64(out.shape[1])
    for i in range(start, stop):
        row = out[i]
        row[:] = _EMPTY
        for j in range(offsets[i], offsets[i + 1]):
            h = mix64_step(state, U64(items[j]))
            # The bin comes from the high bits, the competing value from the low ones.
            place, value = np.int64(fastrange_small(h, bins)), np.int64(h & _LOW)
            if row[place] == _EMPTY or value < row[place]:
                row[place] = value
        _fill(row, state, bins)


@njit(nogil=True, cache=True, fastmath=False)
def _fill(row: Any, state: Any, bins: Any) -> None:
    """Let empty bins borrow from full ones; borrowed values are marked until all are found."""
    own = row != _EMPTY
    for place in range(row.shape[0]):
        if own[place]:
            continue
        at = mix64_step(mix64_step(state, _BORROW), U64(place))
        attempt = U64(0)
        source = np.int64(fastrange_small(at, bins))
        # A set is not empty, so some bin is full and a uniform sequence meets it.
        while not own[source]:
            attempt += U64(1)
            source = np.int64(fastrange_small(mix64_step(at, attempt), bins))
        row[place] = row[source]


def jaccard_similarity(a: Any, b: Any) -> float:
    """Return |A & B| / |A u B| of two sets of integers.

    Examples
    --------
    >>> jaccard_similarity([1, 2, 3], [2, 3, 4])
    0.5
    """
    one, other = np.unique(np.asarray(a)), np.unique(np.asarray(b))
    if not one.size and not other.size:
        raise QuernelError("a and b are both empty; their Jaccard similarity is undefined")
    shared = np.intersect1d(one, other, assume_unique=True).size
    return shared / (one.size + other.size - shared)


def _warmup() -> None:
    """Compile the hashes of sets; ``quernel warmup`` calls it."""
    MinHash(1, 1).codes([[0]])
