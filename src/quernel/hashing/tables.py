"""``BucketTables``: for every table and code the items that have it, as one array built once.

Bucket (t, c) is ``items[offsets[t n_codes + c] : offsets[t n_codes + c + 1]]``, items ascending: a counting sort over
the codes, O(n L + L n_codes) time, four bytes an entry (two for values given as uint16) and eight a bucket. Everything
after is reading; rows that come later wait in ``_chains.Chains``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges
from quernel._validate import check_int

# Codes and values of two bytes are kept so: half the memory, and half of what a query reads.
_NARROW = np.dtype(np.uint16)


@dataclass(frozen=True, eq=False)
class BucketTables:
    """Buckets of L hash tables over codes in ``range(n_codes)``.

    Attributes
    ----------
    offsets : array, shape (L * n_codes + 1,), int64
    items : array, int32 or uint16
        The items of all buckets, ascending within each; uint16 where ``build`` was given such values.
    n_codes : int

    Examples
    --------
    >>> import numpy as np
    >>> tables = BucketTables.build(np.array([[0, 1], [2, 1], [0, 3]], np.uint32), n_codes=4)
    >>> tables.bucket(0, 0).tolist(), tables.bucket(1, 1).tolist(), tables.bucket(1, 0).tolist()
    ([0, 2], [0, 1], [])
    """

    offsets: NDArray[np.int64]
    items: NDArray[Any]
    n_codes: int

    @classmethod
    def build(cls, codes: Any, n_codes: int, values: Any = None) -> Self:
        """Sort items into buckets.

        Parameters
        ----------
        codes : array, shape (n, L), unsigned
            Code of every item in every table, each below ``n_codes``.
        n_codes : int
            Range of the codes.
        values : array, shape (n, V), int32 or uint16, optional
            What an item leaves in its buckets, e.g. the groups it belongs to; default is its own number. A bucket holds
            every value once: several items that leave the same one count as one.
        """
        check_int("n_codes", n_codes, low=1, high=2**32)
        given = np.asarray(codes)
        if given.ndim != 2 or given.dtype.kind not in "iu":
            raise QuernelError(f"codes must have shape (n, tables); got {given.shape}, {given.dtype}")
        if given.size and not (int(given.min()) >= 0 and int(given.max()) < n_codes):
            wrong = int(given.max()) if given.min() >= 0 else int(given.min())
            raise QuernelError(f"codes must be below n_codes={n_codes}; got {wrong}")
        held = np.ascontiguousarray(given, dtype=_NARROW if given.dtype == _NARROW else np.uint32)
        offsets = np.zeros(held.shape[1] * n_codes + 1, np.int64)
        kind = _NARROW if getattr(values, "dtype", None) == _NARROW else np.dtype(np.int32)
        if not held.size:
            # Untouched zeros: an index that is loaded or still empty costs no memory for its buckets.
            return cls(offsets, np.zeros(0, kind), n_codes)
        if values is None:
            items = np.empty(held.size, np.int32)
            _sort_items(held, n_codes, offsets, items)
            return cls(offsets, items, n_codes)
        left = np.ascontiguousarray(values, dtype=kind)
        if left.ndim != 2 or len(left) != len(held):
            raise QuernelError(f"values must have shape ({len(held)}, values); got {left.shape}")
        return cls(offsets, _sort_values(held, n_codes, left, offsets), n_codes)

    @property
    def n_tables(self) -> int:
        """Number of tables L."""
        return (len(self.offsets) - 1) // self.n_codes

    @property
    def nbytes(self) -> int:
        """Bytes of the two arrays."""
        return self.offsets.nbytes + self.items.nbytes

    def bucket(self, table: int, code: int) -> NDArray[Any]:
        """Return the items of one bucket, a view."""
        place = table * self.n_codes + code
        return self.items[self.offsets[place] : self.offsets[place + 1]]


@njit(nogil=True, cache=True, fastmath=False)
def _sort_items(codes: Any, n_codes: Any, offsets: Any, items: Any) -> None:
    n, tables = codes.shape
    for i in range(n):
        for t in range(tables):
            offsets[t * n_codes + np.int64(codes[i, t]) + 1] += 1
    for b in range(1, len(offsets)):
        offsets[b] += offsets[b - 1]
    # Filling from the back leaves each offset at its bucket's beginning again, and items in ascending order.
    ends = offsets[1:].copy()
    for i in range(n - 1, -1, -1):
        for t in range(tables):
            b = t * n_codes + np.int64(codes[i, t])
            ends[b] -= 1
            items[ends[b]] = i


def _sort_values(codes: NDArray[Any], n_codes: int, values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """Fill ``offsets`` and return the distinct values of every bucket.

    Pairs of value and item are brought into the order of their values once. Every table then reads them in that order,
    so its buckets fill in ascending order and a repeated value is the last one written: no bucket is sorted.
    """
    order = np.argsort(values, axis=None, kind="stable")
    owners, ascending = (order // max(1, values.shape[1])).astype(np.int32), values.reshape(-1)[order]
    tables = codes.shape[1]
    parallel_ranges(lambda a, b: _count_distinct(codes, owners, ascending, n_codes, offsets, a, b), tables)
    np.cumsum(offsets, out=offsets)
    items = np.empty(int(offsets[-1]), values.dtype)
    parallel_ranges(lambda a, b: _fill_distinct(codes, owners, ascending, n_codes, offsets, items, a, b), tables)
    return items


# Below every value.
_NONE = np.int64(-(2**63))


@njit(nogil=True, cache=True, fastmath=False)
def _count_distinct(codes: Any, owners: Any, values: Any, n_codes: Any, offsets: Any, start: Any, stop: Any) -> None:
    last = np.empty(n_codes, np.int64)
    for t in range(start, stop):
        column, first = codes[:, t].copy(), t * n_codes + 1
        last[:] = _NONE
        for p in range(len(values)):
            c, value = np.int64(column[owners[p]]), np.int64(values[p])
            if last[c] != value:
                last[c] = value
                offsets[first + c] += 1


@njit(nogil=True, cache=True, fastmath=False)
def _fill_distinct(
    codes: Any, owners: Any, values: Any, n_codes: Any, offsets: Any, items: Any, start: Any, stop: Any
) -> None:
    last = np.empty(n_codes, np.int64)
    for t in range(start, stop):
        column, ends = codes[:, t].copy(), offsets[t * n_codes : (t + 1) * n_codes].copy()
        last[:] = _NONE
        for p in range(len(values)):
            c, value = np.int64(column[owners[p]]), np.int64(values[p])
            if last[c] != value:
                last[c] = value
                items[ends[c]] = values[p]
                ends[c] += 1


def _warmup() -> None:
    """Compile both sorts; ``quernel warmup`` calls it."""
    codes = np.zeros((1, 1), np.uint32)
    BucketTables.build(codes, 1)
    BucketTables.build(codes, 1, np.zeros((1, 1), np.int32))
