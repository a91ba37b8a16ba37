"""``FunnelIndex``: a shortlist by short prefixes, reranked by longer ones (adaptive retrieval, arXiv 2205.13147).

For vectors whose every prefix is an embedding of its own. Stage i orders its candidates by

    <q[:m_i], x[:m_i]> / |x[:m_i]|,   m_1 < ... < m_G,

and keeps K_i of them; all N items enter the first stage, and the stored vectors order the last K_G. Cost of a query:
N m_1 + sum_i K_i m_(i+1) multiply-adds instead of N d, and 4 N m_1 bytes read instead of 4 N d.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import Arrays
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._threads import parallel_ranges
from quernel._validate import check_choice, check_increasing, check_int
from quernel.search._index import Ids, Index, Scores
from quernel.search._prefixes import PrefixPanels, VectorRows
from quernel.search._stored_numbers import VECTOR_TYPES, VectorType
from quernel.search._top_k import top_k
from quernel.search.flat import exact_scores, normalized

# Queries that share what is read of a panel.
_GRAIN = 4
# Scores of exact search held at a time, 16 MB.
_BLOCK = 2**22


def _example() -> dict[str, Any]:
    return {"make": lambda: FunnelIndex(12, dims=(6, 9), shortlist=(100, 60), metric="cosine")}


@register("matryoshka", pillar="search", contract="index", paper="2205.13147", status="stable", example=_example)
class FunnelIndex(Index):
    """Search with a short prefix of every vector and rerank with longer ones.

    Parameters
    ----------
    dim : int
        Coordinates of a vector.
    dims : sequence of int, default=(32,)
        Prefix lengths of the stages, increasing, at most ``dim``.
    shortlist : sequence of int, default=(200,)
        Items that each stage keeps, not increasing; the last ones are ordered by the stored vectors, so ``search``
        answers with at most ``shortlist[-1]`` of them.
    metric : {"ip", "cosine"}, default="ip"
        Scores are inner products with the stored vectors; "cosine" divides items and queries by their lengths.
    dtype : {"float32", "float16", "int8"}, default="float32"
        How vectors and prefixes are stored; int8 has a float32 scale a vector. Scores are those of stored numbers.

    Notes
    -----
    Every prefix is divided by its own length before it is compared: cut vectors of one length differ in theirs. The
    first prefix is kept as a matrix of its own; later stages read the stored vectors, of which few are left. Where
    ``shortlist`` reaches the number of items in every stage, the answer is that of exact search, and is found so.

    References
    ----------
    Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, 2022, section 4.3.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1000, 64)) / np.arange(1, 65)
    >>> index = FunnelIndex(64, dims=(8, 16), shortlist=(100, 20), metric="cosine").add(x)
    >>> index.search(x[:3], k=1)[1][:, 0].tolist()
    [0, 1, 2]
    """

    def __init__(
        self,
        dim: int,
        dims: Sequence[int] = (32,),
        shortlist: Sequence[int] = (200,),
        *,
        metric: Literal["ip", "cosine"] = "ip",
        dtype: VectorType = "float32",
    ) -> None:
        super().__init__()
        self.dim: int = check_int("dim", dim, low=1)
        self.dims = check_increasing("dims", dims, low=1, high=self.dim)
        self.shortlist = _check_shortlist(shortlist, len(self.dims))
        self.metric = check_choice("metric", metric, ("ip", "cosine"))
        self.dtype: VectorType = check_choice("dtype", dtype, VECTOR_TYPES)
        self._vectors = VectorRows(self.dim, self.dtype)
        self._prefixes = PrefixPanels(self.dims[0], self.dtype)

    def search(self, q: Any, k: int = 10, *, dim: int | None = None) -> tuple[Scores, Ids]:
        """Return the k closest items of each query, closest first.

        Parameters
        ----------
        q : array, shape (n, dim)
        k : int, default=10
            At most ``shortlist[-1]``.
        dim : int, optional
            Search all items by this length alone instead of through the stages: ``dims[0]``, by the inner product with
            the prefix of unit length, or the whole ``dim``, which is exact search.

        Returns
        -------
        scores : array, shape (n, k), float32
            Larger is closer; NaN where fewer than k items were found.
        ids : array, shape (n, k), int64
            -1 where fewer than k items were found.

        Raises
        ------
        QuernelError
            If fewer than ``k`` candidates reach the last stage, or prefixes of length ``dim`` are not stored.
        """
        k = check_int("k", k, low=1)
        if dim is None:
            if k > self.shortlist[-1]:
                raise QuernelError(
                    f"k must be at most shortlist[-1]={self.shortlist[-1]}, the items that reach the last stage; "
                    f"got {k}. Build the index with a longer shortlist"
                )
            return self._answer(q, k, self._search)
        if dim not in (self.dims[0], self.dim):
            raise QuernelError(
                f"dim must be a length that is stored, {self.dims[0]} or {self.dim}; got {dim!r}. "
                "Build an index with dims that begin with it"
            )
        return self._answer(q, k, self._exact if dim == self.dim else self._by_prefix)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The stored vectors by slot, deleted ones included."""
        return self._vectors.vectors()

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "dim": self.dim,
            "dims": list(self.dims),
            "shortlist": list(self.shortlist),
            "metric": self.metric,
            "dtype": self.dtype,
        }

    def _append(self, items: Any) -> None:
        rows = normalized(items) if self.metric == "cosine" else items
        self._vectors.append(rows)
        self._prefixes.append(rows)

    def _search(self, queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
        alive = self._ids.alive
        if self.shortlist[-1] >= len(alive):
            return self._exact(queries, k)
        return self._over_queries(queries, k, lambda asked: self._funnel(asked, k, alive))

    def _funnel(self, queries: Any, k: int, alive: NDArray[np.bool_]) -> tuple[Scores, NDArray[np.int64]]:
        slots = self._prefixes.shortlist(queries, self.shortlist[0], alive)
        for width, kept in zip(self.dims[1:], self.shortlist[1:], strict=True):
            _, slots = self._vectors.rerank(queries, slots, kept, width, unit=True)
        return self._vectors.rerank(queries, slots, k, self.dim, unit=False)

    def _by_prefix(self, queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
        alive = self._ids.alive
        return self._over_queries(queries, k, lambda asked: self._prefixes.top_k(asked, k, alive))

    def _exact(self, queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
        alive, asked = self._ids.alive, self._directed(queries)
        stored = self._vectors.vectors()[: len(alive)]
        step = max(1, _BLOCK // max(1, len(stored)))
        parts = [top_k(exact_scores(asked[i : i + step], stored, "ip"), k, alive) for i in range(0, len(asked), step)]
        return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])

    def _over_queries(self, queries: Any, k: int, answer: Any) -> tuple[Scores, NDArray[np.int64]]:
        asked = self._directed(queries)
        scores, slots = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)

        def work(start: int, stop: int) -> None:
            scores[start:stop], slots[start:stop] = answer(asked[start:stop])

        parallel_ranges(work, len(asked), grain=_GRAIN)
        return scores, slots

    def _directed(self, queries: Any) -> Any:
        return normalized(queries) if self.metric == "cosine" else queries

    def _arrays(self) -> Arrays:
        return self._vectors.arrays() | self._prefixes.arrays()

    def _restore(self, arrays: Arrays) -> None:
        for store in (self._vectors, self._prefixes):
            store.restore(arrays, self._ids.slots)


def _check_shortlist(shortlist: Any, stages: int) -> tuple[int, ...]:
    """Return the lengths if there is one a stage and none is longer than the one before."""
    held = tuple(shortlist) if isinstance(shortlist, Sequence) and not isinstance(shortlist, str) else None
    if held is None or len(held) != stages:
        raise QuernelError(f"shortlist must have {stages} lengths, one for each of dims; got {shortlist!r}")
    lengths = tuple(check_int("shortlist", length, low=1) for length in held)
    if any(later > earlier for earlier, later in itertools.pairwise(lengths)):
        raise QuernelError(f"shortlist must not increase: no stage keeps more than it gets; got {lengths}")
    return lengths
