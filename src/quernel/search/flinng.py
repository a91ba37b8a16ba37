"""``FlinngIndex``: near-duplicate search by group testing, without distances (arXiv 2106.11565).

In each of R repetitions every item is in one of B random groups. A group keeps which codes its members have in each of
L hash tables, and a query's count for a group is the number of tables where it has the query's code. Items are emitted
once all their R groups were visited, most counted groups first: by decreasing min over r of count(group_r(i)).
Build: one pass, O(N (hash + R L)), small integers only. Query: L lists and the members of the groups visited.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import Arrays
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._threads import parallel_ranges
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.hashing import LSHFamily
from quernel.hashing._family import GRAIN
from quernel.hashing.mixers import U64, mix64
from quernel.search._flinng_kernels import assign_groups
from quernel.search._flinng_settings import (
    FlinngSettings,
    FlinngStats,
    bytes_of,
    check_budget,
    default_groups,
    make_family,
    suggested,
)
from quernel.search._group_tests import GroupTests, code_rows, narrow
from quernel.search._index import Ids, Index, Ranking, Scores
from quernel.search._rescore import KeptSets, KeptVectors, best_scored

Metric = Literal["cosine", "l2", "jaccard", "codes"]


def _example() -> dict[str, Any]:
    return {"make": lambda: FlinngIndex(12, n_tables=24, bits=10), "exact_scores": False}


@register("flinng", pillar="search", contract="index", paper="2106.11565", status="stable", example=_example)
class FlinngIndex(Index):
    """Find near-duplicates among very many items by group tests over locality-sensitive hashes.

    For items much closer to their query than the rest are; for plain k-NN a graph or an inverted file is faster.

    Parameters
    ----------
    dim : int, optional
        Coordinates of a vector; None for sets and codes.
    metric : {"cosine", "l2", "jaccard", "codes"}, default="cosine"
        "codes": items are rows of ``n_tables`` hash codes below ``2 ** bits`` made elsewhere.
    n_rows : int, default=3
        Repetitions R; 2 to 4.
    n_groups : int, optional
        Groups B of a repetition. Default follows the number of items: the next power of two from
        max(N / 100, 4 sqrt(N)); all items are grouped anew when it doubles.
    n_parts : int, default=1
        Parts that share no group: item i is of part ``i % n_parts``. Such an index answers as a
        ``ShardedIndex`` of as many shards does, each with ``n_groups / n_parts`` groups.
    n_tables : int, default=20
        Hash tables L; more find more and cost more.
    bits : int, default=14
        A table has ``2 ** bits`` codes: for the cosine, sign bits.
    n_concat : int, optional
        Hash values K that a code mixes; default 4 for "l2", 2 for "jaccard".
    width : float, optional
        Width of a hash cell for "l2", a few times the distance of the pairs to find.
    directions : {"gaussian", "rademacher", "sparse"}, default="gaussian"
        Random directions for vectors; sparse ones read a third of the coordinates.
    seed : int, default=0
    keep_vectors : bool, default=False
        Keep the items themselves too, for ``search(..., rerank=m)``.
    budget_bytes : int, optional
        Refuse to grow beyond it; default is the memory of this machine.

    Notes
    -----
    Differs from the authors' code: cells with count 0 are never visited, so a short answer is not padded with arbitrary
    items; MinHash codes mix all their K values; groups, hashes and ties follow from the seed alone. A score is the
    smallest count of the item's groups over L: it estimates, from above, the probability that item and query share a
    code. The cosine hashes directions from the origin: subtract the mean of data that all points one way.

    References
    ----------
    Engels, Coleman, Shrivastava, "Practical Near Neighbor Search via Group Testing", arXiv 2106.11565, 2021.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    >>> index = FlinngIndex(dim=64).add(x)
    >>> scores, ids = index.search(x[:3] + 0.01, k=1)
    >>> ids[:, 0].tolist()
    [0, 1, 2]
    """

    def __init__(
        self,
        dim: int | None = None,
        metric: Metric = "cosine",
        *,
        n_rows: int = 3,
        n_groups: int | None = None,
        n_parts: int = 1,
        n_tables: int = 20,
        bits: int = 14,
        n_concat: int | None = None,
        width: float | None = None,
        directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian",
        seed: int = 0,
        keep_vectors: bool = False,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.metric = check_choice("metric", metric, ("cosine", "l2", "jaccard", "codes"))
        if (dim is None) != (metric in ("jaccard", "codes")):
            raise QuernelError(f"dim must be given for vectors and not for sets or codes; got {dim} and {metric!r}")
        self.dim = None if dim is None else check_int("dim", dim, low=1)
        self.n_rows = check_int("n_rows", n_rows, low=1, high=255)
        self.n_groups = None if n_groups is None else check_int("n_groups", n_groups, low=1, high=2**31 // self.n_rows)
        self.n_parts = check_int("n_parts", n_parts, low=1)
        if self.n_parts > 1 and (self.n_groups is None or self.n_groups % self.n_parts):
            raise QuernelError(f"n_groups must be a multiple of n_parts={n_parts}; got {n_groups}")
        self.n_tables = check_int("n_tables", n_tables, low=1, high=2**16 - 1)
        self.bits = check_int("bits", bits, low=1, high=30)
        self.n_concat = n_concat
        self.directions = check_choice("directions", directions, ("gaussian", "rademacher", "sparse"))
        self.width = None if width is None else check_float("width", width, low=0.0, open_low=True)
        self.seed = check_int("seed", seed, low=0, high=2**63 - 1)
        self.keep_vectors = check_type("keep_vectors", keep_vectors, bool)
        if keep_vectors and metric == "codes":
            raise QuernelError('keep_vectors has nothing to keep for metric="codes"')
        self.budget_bytes = None if budget_bytes is None else check_int("budget_bytes", budget_bytes, low=1)
        self._kept: KeptVectors | KeptSets | None = None
        self._check_budget()
        self._family: LSHFamily | None = make_family(
            metric, self.dim, self.n_tables, self.bits, n_concat, self.width, directions, self.seed
        )
        self._given_groups = False
        self._tests = GroupTests(self.n_rows, self._groups_for(0), self.n_tables, 2**self.bits)
        if keep_vectors:
            self._kept = KeptSets() if metric == "jaccard" else KeptVectors(self.dim or 0, metric)

    @classmethod
    def from_codes(
        cls,
        codes: Any,
        groups: Any = None,
        n_groups: int | None = None,
        *,
        bits: int | None = None,
        ids: Any = None,
        n_rows: int = 3,
        seed: int = 0,
    ) -> Self:
        """Build an index of items whose hash codes, and perhaps groups, are given: the core without a hash family.

        Parameters
        ----------
        codes : array, shape (n, L), integer
            Code of every item in every table.
        groups : array, shape (n, R), integer, optional
            Group of every item in every repetition, below ``n_groups``; nothing can be added later then. Default
            draws them as for any other index.
        n_groups : int, optional
            Needed with ``groups``.
        bits : int, optional
            Codes are below ``2 ** bits``; default is what the largest one needs.
        ids : sequence of int, optional
        n_rows, seed : int
            Used where ``groups`` is not given.

        Returns
        -------
        index : FlinngIndex
            Of metric "codes": its queries are rows of L codes.
        """
        most = 30 if bits is None else check_int("bits", bits, low=1, high=30)
        held = code_rows("codes", codes, None, 2**most)
        bits = max(1, int(held.max(initial=0)).bit_length()) if bits is None else bits
        if groups is None:
            made = cls(metric="codes", n_rows=n_rows, n_groups=n_groups, n_tables=held.shape[1], bits=bits, seed=seed)
            return made.add(held, ids)
        if n_groups is None:
            raise QuernelError("n_groups must be given with groups")
        own = code_rows("groups", groups, None, check_int("n_groups", n_groups, low=1))
        if len(own) != len(held):
            raise QuernelError(f"groups must have {len(held)} rows, one an item; got {len(own)}")
        made = cls(metric="codes", n_rows=own.shape[1], n_groups=n_groups, n_tables=held.shape[1], bits=bits, seed=seed)
        checked = made._ids.checked(len(held), ids)
        made._given_groups = True
        if len(held):
            made._check_budget(held)
            made._tests.append(held, own)
            made._ids.append(checked)
        return made

    @classmethod
    def suggest(
        cls, X_sample: Any, sim_near: float = 0.95, n: int | None = None, *, metric: Metric = "cosine", seed: int = 0
    ) -> FlinngSettings:
        """Choose settings from a sample of the items.

        Parameters
        ----------
        X_sample : array, shape (m, dim), or sets
            A few hundred to a thousand items; all pairs are compared.
        sim_near : float, default=0.95
            Similarity of the pairs to find; for "l2" their distance.
        n : int, optional
            Items that the index will hold; default is the size of the sample.
        metric : {"cosine", "l2", "jaccard"}, default="cosine"
        seed : int, default=0

        Returns
        -------
        settings : FlinngSettings
            ``FlinngIndex(**settings.arguments)`` is the index.

        Examples
        --------
        >>> import numpy as np
        >>> sample = np.random.default_rng(0).standard_normal((300, 64))
        >>> settings = FlinngIndex.suggest(sample, sim_near=0.98, n=100_000)
        >>> index = FlinngIndex(**settings.arguments)
        """
        check_choice("metric", metric, ("cosine", "l2", "jaccard"))
        dim = None if metric == "jaccard" else int(np.shape(X_sample)[-1])
        near = check_float("sim_near", sim_near, low=0.0, high=None if metric == "l2" else 1.0, open_low=True)
        probe = cls(dim, metric, width=near if metric == "l2" else None, bits=1, n_tables=1)
        return suggested(probe._items("X_sample", X_sample), near, n, metric, dim, seed)

    def search(self, q: Any, k: int = 10, *, rerank: int = 0) -> tuple[Scores, Ids]:
        """Return up to k items of each query, closest first.

        Parameters
        ----------
        q : array, shape (n, dim), or sets, or codes
        k : int, default=10
        rerank : int, default=0
            Score the first this many items exactly and return the k best of them; needs ``keep_vectors=True``.

        Returns
        -------
        scores : array, shape (n, k), float32
            Smallest count of the item's groups over L; with ``rerank`` the true similarity. NaN where fewer were found.
        ids : array, shape (n, k), int64
            -1 where fewer were found: items that share a group with nothing like the query are never met.
        """
        k, rerank = check_int("k", k, low=1), check_int("rerank", rerank, low=0)
        if rerank and self._kept is None:
            raise QuernelError("rerank needs the items themselves; build the index with keep_vectors=True")
        if rerank and rerank < k:
            raise QuernelError(f"rerank must be at least k={k}; got {rerank}")
        return self._answer(q, k, functools.partial(self._search, rerank=rerank))

    def ranked(self, queries: Any, k: int, *, rerank: int = 0, **options: Any) -> Ranking:
        """Return what ``search`` returns, and in which order cells were visited: what decides between equal scores."""
        if rerank or options:
            return super().ranked(queries, k, rerank=rerank, **options)
        decided = np.zeros((0, k), np.int64)

        def ask(items: Any, k: int) -> tuple[Scores, Ids]:
            nonlocal decided
            scores, slots, decided = self._tests.answer(self._codes(items), k, self._ids.alive)
            return scores, slots

        scores, ids = self._answer(queries, k, ask)
        cells = decided if len(decided) else np.zeros(ids.shape, np.int64)
        return Ranking(scores, ids, *np.divmod(cells, self._tests.n_groups))

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The kept vectors by slot, deleted ones included; needs ``keep_vectors=True``."""
        if not isinstance(self._kept, KeptVectors):
            raise QuernelError("vectors needs vectors that are kept; build the index with keep_vectors=True")
        return self._kept.rows

    def compact(self) -> Self:
        """Drop deleted items for good; the rest is as if it had been added to an empty index in the same order."""
        alive = self._ids.alive
        if alive.all():
            return self
        codes, groups = self._tests.codes[alive], self._tests.groups[alive]
        n = len(codes)
        n_groups = self._groups_for(n)
        self._tests = GroupTests(self.n_rows, n_groups, self.n_tables, 2**self.bits)
        if n:
            self._tests.append(codes, groups if self._given_groups else self._hashed_groups(0, n, n_groups))
        if self._kept is not None:
            self._kept.keep(alive)
        self._ids = type(self._ids)(self._ids.ids[alive])
        return self

    def stats(self) -> FlinngStats:
        """Return sizes and how evenly codes are spread."""
        lengths = self._tests.list_lengths()
        slots, groups = len(self._tests), self._tests.n_groups
        longest = float(lengths.max(initial=0)) / (self.n_rows * groups)
        entries = int(lengths.sum())
        return FlinngStats(len(self), slots, groups, slots / groups, entries, longest, self._tests.waiting, self.nbytes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder, sorting in first what waits; see ``Index.save``."""
        if self._tests.waiting:
            self._tests.sort()
        return super().save(path)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, and whether groups were given."""
        names = (
            "dim metric n_rows n_groups n_parts n_tables bits n_concat width directions seed keep_vectors budget_bytes"
        )
        return {name: getattr(self, name) for name in names.split()} | {"given_groups": self._given_groups}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an empty index from ``config()``."""
        given = dict(config)
        own = check_type("given_groups", given.pop("given_groups", None), bool)
        index = cls(**given)
        index._given_groups = own
        return index

    def _items(self, name: str, x: Any) -> Any:
        if self.metric == "codes":
            return code_rows(name, x, self.n_tables, 2**self.bits)
        return super()._items(name, x)

    def _append(self, items: Any) -> None:
        if self._given_groups:
            raise QuernelError("x cannot be added: the groups of this index were given; build it anew with from_codes")
        before, n = len(self._tests), len(self._tests) + len(items)
        self._check_budget(items)
        if self.n_groups is not None and self.n_groups > n:
            warnings.warn(
                f"n_groups={self.n_groups} is more than the {n} items there are: most groups are empty. Leave n_groups "
                "out, or ignore this while items are still to come",
                stacklevel=3,
            )
        codes, n_groups = self._codes(items), self._groups_for(n)
        if n_groups != self._tests.n_groups:
            self._tests.regroup(self._hashed_groups(0, before, n_groups), n_groups)
        self._tests.append(codes, self._hashed_groups(before, n, n_groups))
        if self._kept is not None:
            self._kept.append(items)

    def _search(self, queries: Any, k: int, rerank: int = 0) -> tuple[Scores, NDArray[np.int64]]:
        scores, slots, _ = self._tests.answer(self._codes(queries), max(k, rerank), self._ids.alive)
        if not rerank or self._kept is None:
            return scores, slots
        return best_scored(self._kept.scores(queries, slots), slots, k)

    def _arrays(self) -> Arrays:
        return self._tests.arrays() | ({} if self._kept is None else self._kept.arrays())

    def _restore(self, arrays: Arrays) -> None:
        n = self._ids.slots
        self._tests = GroupTests(self.n_rows, self._groups_for(n), self.n_tables, 2**self.bits)
        self._tests.restore(arrays, n)
        if self._kept is not None:
            self._kept.restore(arrays, n)

    def _check_contents(self) -> None:
        self._tests.check()
        if self._kept is not None:
            self._kept.check()

    def _codes(self, items: Any) -> NDArray[Any]:
        codes = items if self._family is None else self._family.codes(items)
        return codes.astype(narrow(2**self.bits), copy=False)

    def _groups_for(self, n: int) -> int:
        return default_groups(n) if self.n_groups is None else self.n_groups

    def _hashed_groups(self, first: int, stop: int, n_groups: int) -> NDArray[Any]:
        """Return the groups of slots [first, stop): pure functions of seed, slot and repetition."""
        out = np.empty((stop - first, self.n_rows), narrow(n_groups))
        state = U64(mix64(self.seed))
        each = U64(n_groups // self.n_parts)
        parts = np.int64(self.n_parts)
        parallel_ranges(lambda a, b: assign_groups(state, each, parts, first, out, a, b), len(out), grain=GRAIN)
        return out

    def _check_budget(self, more: Any = ()) -> None:
        """Refuse, before anything is allocated, items that would not fit."""
        kept = bytes_of(more) if self.keep_vectors and len(more) else 0
        kept += 0 if self._kept is None else sum(array.nbytes for array in self._kept.arrays().values())
        n = self._ids.slots + len(more)
        check_budget(n, self.n_rows, self._groups_for(n), self.n_tables, self.bits, kept, self.budget_bytes)
