"""``MultiVectorIndex``: texts of several vectors each, searched by the Chamfer score (arXiv 2505.11471).

    S(Q, D) = sum over q in Q of max over x in D of <q, x>,

also called MaxSim or late interaction. Exact: products of all query vectors with a block of stored vectors and the
maxima of each text over them, taken while the products are in the cache; O(|Q| dim) a stored vector. Approximate:
inverted lists over all vectors pick candidates, which are then scored exactly.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel import _random
from quernel._array_folder import Arrays, readable
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._threads import parallel_ranges, workspace
from quernel._validate import check_choice, check_int
from quernel.search._index import Ids, Index, Scores
from quernel.search._inverted_lists import InvertedLists, build_lists, restored_lists, suitable
from quernel.search._multi_vector_kernels import add_maxima, clear_votes, vote
from quernel.search._ragged import Ragged, RaggedVectors, as_float
from quernel.search._screening import possible, rough_scores, worth_it
from quernel.search._stored_numbers import VECTOR_TYPES, VectorType
from quernel.search._top_k import top_k

Mode = Literal["exact", "approximate"]

# Query vectors asked together, and products held at a time: 512 KB, so that they never leave the second-level cache.
_COLUMNS, _PRODUCTS = 512, 2**17
# Vectors of a block at most: what is converted to float32 stays in the cache too.
_ROWS = 2**12
# Scores held at a time, 64 MB.
_SCORES = 2**24
# Stored vectors gathered at a time when candidates are scored.
_GATHERED = 2**11
_CANDIDATES = 512
# Screening is given up where it leaves more than this share of the texts.
_POSSIBLE = 0.125


def _texts(n: int, noise: float) -> list[NDArray[np.float32]]:
    """Return n lists of one to seven unit vectors, moved by a little noise."""
    sizes = _random.generator(0).integers(1, 8, n)
    rows = _random.generator(1).standard_normal((int(sizes.sum()), 12))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows += noise * _random.generator(2).standard_normal(rows.shape)
    return np.split(rows.astype(np.float32), np.cumsum(sizes)[:-1])


def _by_loop(texts: Any, queries: Any) -> NDArray[np.float64]:
    return np.array([[sum(max(x @ q for x in text) for q in query) for text in texts] for query in queries])


def _example() -> dict[str, Any]:
    return {
        "make": lambda: MultiVectorIndex(12),
        "items": functools.partial(_texts, noise=0.0),
        "queries": functools.partial(_texts, noise=0.02),
        "reference": _by_loop,
        "recall": 1.0,
    }


@register(
    "crisp",
    pillar="search",
    contract="index",
    paper="2505.11471",
    status="stable",
    headline=False,
    example=_example,
)
class MultiVectorIndex(Index):
    """Find the texts whose sets of vectors have the largest Chamfer score with those of a query.

    Parameters
    ----------
    dim : int
        Coordinates of a vector.
    dtype : {"float32", "float16", "int8"}, default="float32"
        How vectors are kept; scores are those of the rounded ones. float16 halves the bytes, int8 quarters them and
        keeps a float32 scale a vector.
    prefix : int, optional
        Coordinates that the inverted lists look at, the first of each vector; default all. For vectors whose prefixes
        were trained to be used alone. The final scores always take all coordinates.

    Notes
    -----
    A query's scores are sums over its vectors: compare them within one query only.

    References
    ----------
    Veneroso et al., "CRISP: Clustering Multi-Vector Representations for Denoising and Pruning", arXiv 2505.11471, 2025.
    Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
    BERT", arXiv 2004.12832, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> index = MultiVectorIndex(dim=2).add([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6]]])
    >>> scores, ids = index.search([[[1.0, 0.0], [0.0, 1.0]]], k=2)
    >>> ids.tolist(), scores.round(2).tolist()
    ([[0, 1]], [[2.0, 1.399999976158142]])
    """

    metric = "chamfer"

    def __init__(self, dim: int, dtype: VectorType = "float32", *, prefix: int | None = None) -> None:
        super().__init__()
        self.dim: int = check_int("dim", dim, low=1)
        self.prefix = None if prefix is None else check_int("prefix", prefix, low=1, high=self.dim)
        self._store = RaggedVectors(self.dim, dtype)
        self._lists: InvertedLists | None = None
        # Texts that the lists name, and how many lists suited when they were built.
        self._listed, self._suited = 0, 0

    @property
    def dtype(self) -> VectorType:
        """How vectors are kept."""
        return self._store.dtype

    @property
    def vectors_per_text(self) -> float:
        """Mean number of vectors of a text, deleted ones included; NaN in an empty index."""
        return len(self._store.rows) / len(self._store) if len(self._store) else float("nan")

    @property
    def vectors(self) -> list[NDArray[np.float32]]:
        """The stored vectors of each text by slot, (n_i, dim), deleted ones included."""
        return [self._store.values(a, b) for a, b in itertools.pairwise(self._store.offsets.tolist())]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"dim": self.dim, "dtype": self.dtype, "prefix": self.prefix}

    def search(
        self, q: Any, k: int = 10, *, mode: Mode = "exact", probes: int = 16, candidates: int | None = None
    ) -> tuple[Scores, Ids]:
        """Return the k best texts of each query, best first.

        Parameters
        ----------
        q : sequence of arrays, shape (n_i, dim)
            The vectors of each query.
        k : int, default=10
        mode : {"exact", "approximate"}, default="exact"
            "approximate" scores only candidates; the first such search builds the inverted lists (see ``optimize``).
        probes : int, default=16
            Lists visited for each query vector.
        candidates : int, optional
            Texts scored exactly for each query; default 512 or 4 k, the larger.

        Returns
        -------
        scores : array, shape (n, k), float32
            Chamfer scores, exact in both modes; NaN where fewer were found.
        ids : array, shape (n, k), int64
            -1 where fewer were found: with "approximate", texts in none of the lists visited are never met.
        """
        check_choice("mode", mode, ("exact", "approximate"))
        check_int("probes", probes, low=1)
        if mode == "exact":
            return self._answer(q, k, self._search)
        k = check_int("k", k, low=1)
        room = max(_CANDIDATES, 4 * k) if candidates is None else check_int("candidates", candidates, low=1)
        if room < k:
            raise QuernelError(f"candidates must be at least k={k}; got {candidates}")
        return self._answer(q, k, functools.partial(self._search_lists, probes=probes, candidates=room))

    def optimize(self) -> Self:
        """Build the inverted lists for approximate search, anew if there are some.

        A search builds them itself where they are missing; texts that come later are put into the lists there are,
        and the lists are built anew when four times as many vectors are stored as when they were built or loaded.
        """
        self._lists = None
        self._current_lists()
        return self

    def compact(self) -> Self:
        """Drop deleted texts for good; the rest keeps its order and its ids."""
        alive = self._ids.alive
        if not alive.all():
            self._store.keep(alive)
            self._ids = type(self._ids)(self._ids.ids[alive])
            self._lists = None
        return self

    def _items(self, name: str, x: Any) -> Ragged:
        return Ragged.of(name, x, self.dim)

    def _append(self, items: Ragged) -> None:
        self._store.append(items)

    def _search(self, queries: Ragged, k: int) -> tuple[Scores, NDArray[np.int64]]:
        parts = [self._best(queries[a:b], k) for a, b in self._groups(queries)]
        return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])

    def _best(self, queries: Ragged, k: int) -> tuple[Scores, NDArray[np.int64]]:
        """Return scores and slots of the k best texts, exactly."""
        alive = self._ids.alive
        if worth_it(self._store, len(queries.rows)):
            chosen = possible(self._store, queries, rough_scores(self._store, queries), k, alive)
            if sum(map(len, chosen)) <= _POSSIBLE * len(queries) * len(alive):
                return self._best_of(queries, chosen, k)
        return top_k(self._scores(queries), k, alive)

    def _groups(self, queries: Ragged) -> list[tuple[int, int]]:
        """Cut queries into groups of at most so many vectors and scores, at least one query each."""
        most = max(1, _SCORES // max(1, len(self._store)))
        groups, a = [], 0
        while a < len(queries):
            b = int(np.searchsorted(queries.offsets, queries.offsets[a] + _COLUMNS, side="right")) - 1
            b = max(a + 1, min(b, a + most))
            groups.append((a, b))
            a = b
        return groups

    def _scores(self, queries: Ragged) -> Scores:
        """Return the scores of all texts, (n, slots)."""
        offsets, asked = self._store.offsets, torch.from_numpy(queries.rows).T
        out = np.empty((len(queries), len(self._store)), np.float32)
        # Blocks end where a text ends; the same ones whatever the number of threads.
        cuts = self._store.blocks(min(_ROWS, max(1, _PRODUCTS // len(queries.rows))))

        def work(start: int, stop: int) -> None:
            for a, b in zip(cuts[start:stop], cuts[start + 1 : stop + 1], strict=True):
                held = slice(offsets[a], offsets[b])
                score_block(
                    self._store.rows[held], self._store.scales[held], offsets, asked, queries.offsets, out, a, b
                )

        parallel_ranges(work, len(cuts) - 1)
        return out

    def _search_lists(self, queries: Ragged, k: int, probes: int, candidates: int) -> tuple[Scores, NDArray[np.int64]]:
        lists = self._current_lists()
        width = lists.centers.shape[1]
        similar = torch.from_numpy(queries.rows[:, :width]) @ readable(lists.centers).T
        best = similar.topk(min(probes, len(lists.centers)), dim=1)
        near, nearest = best.values.numpy(), best.indices.numpy()
        chosen = [np.zeros(0, np.int64)] * len(queries)

        def work(start: int, stop: int) -> None:
            n = len(self._store)
            votes = workspace("votes", n, torch.float32, zeroed=True).numpy()
            stamps = workspace("vote stamps", n, torch.int32, zeroed=True).numpy()
            touched = workspace("voted texts", n, torch.int64).numpy()
            for i in range(start, stop):
                own = slice(queries.offsets[i], queries.offsets[i + 1])
                met = vote(nearest[own], near[own], lists.offsets, lists.texts, self._ids.alive, votes, stamps, touched)
                found = touched[:met].copy()
                if met > candidates:
                    found = found[np.argpartition(-votes[found], candidates)[:candidates]]
                clear_votes(votes, stamps, touched, met)
                chosen[i] = np.sort(found)

        parallel_ranges(work, len(queries))
        return self._best_of(queries, chosen, k)

    def _best_of(self, queries: Ragged, chosen: list[NDArray[np.int64]], k: int) -> tuple[Scores, NDArray[np.int64]]:
        """Return scores and slots of the k best of the texts chosen for each query, which ascend."""
        scores, slots = np.full((len(queries), k), np.nan, np.float32), np.full((len(queries), k), -1, np.int64)

        def work(start: int, stop: int) -> None:
            for i in range(start, stop):
                if len(chosen[i]):
                    own = slice(queries.offsets[i], queries.offsets[i + 1])
                    found = self._scores_of(torch.from_numpy(queries.rows[own]).T, chosen[i])
                    scores[i], places = (part[0] for part in top_k(found, k, np.ones(len(chosen[i]), bool)))
                    slots[i] = np.where(places >= 0, chosen[i][places], -1)

        parallel_ranges(work, len(queries))
        return scores, slots

    def _scores_of(self, asked: Tensor, slots: NDArray[np.int64]) -> Scores:
        """Return the scores of these texts for one query, (1, texts)."""
        out, whole = np.empty((1, len(slots)), np.float32), np.array([0, asked.shape[1]])
        step = max(1, int(_GATHERED / max(1.0, self.vectors_per_text)))
        for a in range(0, len(slots), step):
            offsets, rows, scales = self._store.gathered(slots[a : a + step])
            score_block(rows, scales, offsets, asked, whole, out[:, a : a + step], 0, len(offsets) - 1)
        return out

    def _current_lists(self) -> InvertedLists:
        """Return inverted lists of all texts."""
        lists, n, suits = self._lists, len(self._store), suitable(len(self._store.rows))
        if lists is None or suits >= 2 * self._suited:
            lists, self._suited = build_lists(self._store, self.prefix or self.dim), suits
        elif self._listed < n:
            lists = lists.extended(self._store, self._listed)
        self._lists, self._listed = lists, n
        return lists

    def _arrays(self) -> Arrays:
        lists = {} if self._lists is None else self._current_lists().arrays()
        return self._store.arrays() | lists

    def _restore(self, arrays: Arrays) -> None:
        self._store.restore(arrays, self._ids.slots)
        self._lists = restored_lists(arrays, len(self._store), self.prefix or self.dim)
        self._listed, self._suited = len(self._store), suitable(len(self._store.rows))


def score_block(
    rows: NDArray[Any],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int64],
    asked: Tensor,
    queries: NDArray[np.int64],
    out: Scores,
    a: int,
    b: int,
) -> None:
    """Write the scores of texts [a, b), whose vectors are ``rows``, into columns [a, b) of ``out``.

    Parameters
    ----------
    rows : array, shape (offsets[b] - offsets[a], dim)
        As they are kept.
    scales : array, shape (rows,) or (0,)
    offsets : array, shape (texts + 1,)
    asked : Tensor, shape (dim, M)
    queries : array, shape (n + 1,)
        Where each query begins among the M columns.
    out : array, shape (n, texts), float32
    """
    n, columns = len(rows), asked.shape[1]
    room = None if rows.dtype == np.float32 else workspace("vectors", rows.size, torch.float32).view(n, -1)
    products = workspace("products", n * columns, torch.float32).view(n, columns)
    torch.mm(as_float(rows, room), asked, out=products)
    best = workspace("maxima", columns, torch.float32).numpy()
    add_maxima(products.numpy(), scales, offsets, offsets[a], queries, best, out, a, b)


def _warmup() -> None:
    """Compile the kernels for every kind of vectors (see ``quernel warmup``)."""
    x = np.eye(4, dtype=np.float32)[None]
    for dtype in VECTOR_TYPES:
        index = MultiVectorIndex(4, dtype).add(x).compact()
        index.search(x, 1)
        index.search(x, 1, mode="approximate")
        rough_scores(index._store, Ragged.of("x", x, 4))
