"""``MaxIPIndex``: the items of largest inner product, by sign projections on a sphere (arXiv 2111.15139).

Items are moved by their mean c, which changes no order under one query, and put on a sphere one dimension up,

    y -> [ (y - c) / R ; sqrt(1 - |y - c|^2 / R^2) ],   R = max |y - c|,      q -> [ q / |q| ; 0 ],

where the angle falls as the inner product grows. L tables of K sign bits are probed at the query's code and at those
that differ in its least certain bits; every item found is scored exactly. Cost of a query: d L K multiply-adds and
d for each item found. The items are vectors of 4 d bytes, and 4 L bytes of tables.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quernel import _random
from quernel._array_folder import Arrays, take
from quernel._errors import FormatError
from quernel._growing import GrowingArray
from quernel._registry import register
from quernel._threads import parallel_ranges
from quernel._validate import check_int, check_type
from quernel.hashing import BucketTables, SignProjection, sphere_items
from quernel.hashing._family import as_array, check_rows
from quernel.search._index import Index, Scores
from quernel.search._max_ip_kernels import MAX_PROBES, probe_masks, search_rows

# Items put on the sphere at a time.
_BLOCK = 2**15
# Items a bucket has on average where ``bits`` is not given.
_LEAF = 24
_MAX_BITS = 24

Vectors = NDArray[np.float32]


class _Tables(NamedTuple):
    """What a query needs besides the vectors."""

    bits: int
    panels: Vectors
    masks: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    items: NDArray[np.int32]


def _unit_rows(n: int, noise: float) -> Vectors:
    """Return n vectors of one length, for which the nearest item has the largest inner product."""
    rows = _random.generator(0).standard_normal((n, 12))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows + noise * _random.generator(1).standard_normal(rows.shape), dtype=np.float32)


def _example() -> dict[str, Any]:
    return {
        "make": lambda: MaxIPIndex(12, n_tables=16, bits=4),
        "items": lambda n: _unit_rows(n, 0.0),
        "queries": lambda n: _unit_rows(n, 0.02),
    }


@register("lsh-frank-wolfe", pillar="search", contract="index", paper="2111.15139", status="stable", example=_example)
class MaxIPIndex(Index):
    """Find the items of largest inner product in sub-linear time.

    Scores are exact inner products; which items are found is a matter of luck that grows with ``n_tables`` and
    ``probes``. The tables are built by the first search after ``add``, over everything that was added.

    Parameters
    ----------
    dim : int
        Coordinates of a vector.
    n_tables : int, default=32
        Hash tables L.
    bits : int, optional
        Bits K of a code, at most 24; default grows with the number of items, about 24 of them a bucket.
    probes : int, default=8
        Buckets that a query looks into in every table.
    center : bool, default=True
        Move items by their mean before hashing. Without it, items that all point one way share their codes.
    max_bucket : int, default=512
        Items taken from a bucket at most, so that no query costs more than L * probes * max_bucket of them.
    seed : int, default=0
        Selects the projections.

    References
    ----------
    Xu, Song, Shrivastava, "Breaking the Linear Iteration Cost Barrier for Some Well-known Conditional Gradient Methods
    Using MaxIP Data-structures", arXiv 2111.15139, 2021.
    Neyshabur and Srebro, "On Symmetric and Asymmetric LSHs for Inner Product Search", arXiv 1410.5518, 2015.

    Examples
    --------
    >>> import numpy as np
    >>> items = np.random.default_rng(0).standard_normal((1000, 16))
    >>> index = MaxIPIndex(16).add(items)
    >>> scores, ids = index.search(items[:1] * 5, k=1)
    >>> ids.tolist(), bool(np.isclose(scores[0, 0], 5 * items[0] @ items[0]))
    ([[0]], True)
    """

    metric = "ip"

    def __init__(
        self,
        dim: int,
        *,
        n_tables: int = 32,
        bits: int | None = None,
        probes: int = 8,
        center: bool = True,
        max_bucket: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dim: int = check_int("dim", dim, low=1)
        self.n_tables = check_int("n_tables", n_tables, low=1, high=2**16)
        self.bits = None if bits is None else check_int("bits", bits, low=1, high=_MAX_BITS)
        self.probes = check_int("probes", probes, low=1, high=MAX_PROBES)
        self.center = check_type("center", center, bool)
        self.max_bucket = check_int("max_bucket", max_bucket, low=1)
        self.seed = check_int("seed", seed, low=0, high=2**63 - 1)
        self._rows = GrowingArray(np.zeros((0, self.dim), np.float32))
        self._built: _Tables | None = None

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("dim", "n_tables", "bits", "probes", "center", "max_bucket", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def vectors(self) -> Vectors:
        """The stored vectors by slot, deleted ones included."""
        rows: Vectors = self._rows.rows
        return rows

    def best(self, q: Any) -> tuple[int, float]:
        """Return id and inner product of the best item found for one query of shape (dim,); -1 and NaN if none.

        The same as ``search`` with k=1, with fewer checks; for loops that ask one query at a time.
        """
        query = np.ascontiguousarray(as_array(q), dtype=np.float32).reshape(1, -1)
        if query.shape[1] != self.dim or not len(self):
            query = check_rows("q", q, self.dim)
            return -1, float("nan")
        scores, slots = self._search(query, 1)
        slot = int(slots[0, 0])
        return (int(self._ids.ids[slot]) if slot >= 0 else -1), float(scores[0, 0])

    def _append(self, items: Vectors) -> None:
        self._rows.append(items)
        self._built = None

    def _search(self, queries: Vectors, k: int) -> tuple[Scores, NDArray[np.int64]]:
        tables = self._tables()
        lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
        directed = np.zeros((len(queries), self.dim + 1), np.float32)
        directed[:, :-1] = queries / np.where(lengths > 0, lengths, 1.0)[:, None]
        best = np.full((len(queries), k), np.nan, np.float32)
        slots = np.full((len(queries), k), -1, np.int64)

        def work(start: int, stop: int) -> None:
            search_rows(
                queries, directed, tables.panels, tables.bits, tables.masks, tables.offsets, tables.items,
                self._ids.alive, self.vectors, self.max_bucket, best, slots, start, stop,
            )  # fmt: skip

        parallel_ranges(work, len(queries))
        return best, slots

    def _tables(self) -> _Tables:
        """Return the tables, built if items were added since."""
        if self._built is None:
            slots = len(self.vectors)
            bits = self.bits or int(np.clip(np.round(np.log2(max(slots, 1) / _LEAF)), 1, _MAX_BITS))
            family = self._family(bits)
            middle = self.vectors.mean(0, dtype=np.float64) if self.center and slots else np.zeros(self.dim)
            mean = middle.astype(np.float32)
            parts = [slice(i, i + _BLOCK) for i in range(0, slots, _BLOCK)]
            radius = max((float(np.linalg.norm(self.vectors[p] - mean, axis=1).max()) for p in parts), default=1.0)
            codes = np.empty((slots, self.n_tables), np.uint32)
            for p in parts:
                # The last coordinate of the map is for queries of another length than their own: none here.
                codes[p] = family.codes(sphere_items(self.vectors[p] - mean, radius)[:, :-1])
            built = BucketTables.build(codes, 2**bits)
            self._built = self._ready(bits, family, built.offsets, built.items)
        return self._built

    def _family(self, bits: int) -> SignProjection:
        return SignProjection(self.dim + 1, self.n_tables, bits, seed=self.seed)

    def _ready(
        self, bits: int, family: SignProjection, offsets: NDArray[np.int64], items: NDArray[np.int32]
    ) -> _Tables:
        return _Tables(bits, family.projections.panels, probe_masks(bits, self.probes), offsets, items)

    def _arrays(self) -> Arrays:
        tables = self._tables()
        return {"vectors": self.vectors, "offsets": tables.offsets, "items": tables.items}

    def _restore(self, arrays: Arrays) -> None:
        slots = self._ids.slots
        self._rows = GrowingArray(take(arrays, "vectors", np.float32, (slots, self.dim)))
        offsets = take(arrays, "offsets", np.int64, (None,))
        items = take(arrays, "items", np.int32, (slots * self.n_tables,))
        bits = ((len(offsets) - 1) // self.n_tables).bit_length() - 1
        if not 1 <= bits <= _MAX_BITS or len(offsets) != self.n_tables * 2**bits + 1 or bits != (self.bits or bits):
            raise FormatError(f"array 'offsets' has {len(offsets)} numbers, which do not fit {self.n_tables} tables")
        # A bad number would be read as an address.
        if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
            raise FormatError("array 'offsets' does not divide array 'items' into buckets")
        if items.size and (items.min() < 0 or items.max() >= slots):
            raise FormatError("array 'items' names vectors that are not there")
        self._built = self._ready(bits, self._family(bits), offsets, items)
