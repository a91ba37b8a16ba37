"""``FlatIndex``: exact search, every item compared with every query. The reference that all others are held to.

Vectors: one matrix product a block of items and a running top k, O(n dim) a query, four bytes a coordinate stored.
Sets: intersections by a sparse product. Nothing to tune, nothing to build.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from quernel._array_folder import Arrays, readable, take
from quernel._errors import QuernelError
from quernel._growing import GrowingArray
from quernel._registry import register
from quernel._validate import check_choice, check_int
from quernel.hashing import Sets
from quernel.search._index import SET_METRICS, VECTOR_METRICS, Index, Scores
from quernel.search._top_k import top_k

# Scores held at a time: 16 MB, so that a block of them stays near the cache.
_BLOCK = 2**22

Metric = Literal["cosine", "l2", "ip", "jaccard"]


def _example() -> dict[str, Any]:
    return {"make": lambda: FlatIndex(12), "recall": 1.0}


@register("flat", pillar="search", contract="index", paper=None, status="stable", example=_example)
class FlatIndex(Index):
    """Find the closest items exactly.

    Parameters
    ----------
    dim : int, optional
        Coordinates of a vector; None for sets.
    metric : {"cosine", "l2", "ip", "jaccard"}, default="cosine"
        Scores are the cosine, minus the Euclidean distance, the inner product, or the Jaccard similarity of sets.

    Examples
    --------
    >>> import numpy as np
    >>> index = FlatIndex(dim=2, metric="l2").add([[0.0, 0.0], [3.0, 4.0]])
    >>> scores, ids = index.search([[0.0, 1.0]], k=2)
    >>> ids.tolist(), scores.astype(float).round(2).tolist()
    ([[0, 1]], [[-1.0, -4.24]])
    """

    def __init__(self, dim: int | None = None, metric: Metric = "cosine") -> None:
        super().__init__()
        self.metric = check_choice("metric", metric, (*VECTOR_METRICS, *SET_METRICS))
        if (dim is None) != (metric in SET_METRICS):
            raise QuernelError(f"dim must be given for vectors and not for sets; got dim={dim} and metric={metric!r}")
        self.dim = None if dim is None else check_int("dim", dim, low=1)
        self._rows = GrowingArray(np.zeros((0, self.dim or 0), np.float32))
        self._offsets, self._set_items = GrowingArray(np.zeros(1, np.int64)), GrowingArray(np.zeros(0, np.int64))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"dim": self.dim, "metric": self.metric}

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The stored vectors by slot, deleted ones included; normalised for the cosine."""
        rows: NDArray[np.float32] = self._rows.rows
        return rows

    @property
    def _sets(self) -> Sets:
        return Sets(self._offsets.rows, self._set_items.rows)

    def _append(self, items: Any) -> None:
        if isinstance(items, Sets):
            self._offsets.append(items.offsets[1:] + self._offsets.rows[-1])
            self._set_items.append(items.items)
        else:
            rows = normalized(items) if self.metric == "cosine" else items
            self._rows.append(rows)

    def _search(self, queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
        asked = normalized(queries) if self.metric == "cosine" else queries
        step = max(1, _BLOCK // max(1, self._ids.slots))
        parts = [top_k(self._scores(asked[i : i + step]), k, self._ids.alive) for i in range(0, len(asked), step)]
        return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])

    def _scores(self, asked: Any) -> Scores:
        if self.metric in SET_METRICS:
            return _jaccard(asked, self._sets)
        return exact_scores(asked, self.vectors, self.metric)

    def _arrays(self) -> Arrays:
        if self.metric in SET_METRICS:
            return {"offsets": self._offsets.rows, "items": self._set_items.rows}
        return {"vectors": self.vectors}

    def _restore(self, arrays: Arrays) -> None:
        if self.metric not in SET_METRICS:
            self._rows = GrowingArray(take(arrays, "vectors", np.float32, (self._ids.slots, self.dim)))
            return
        offsets = take(arrays, "offsets", np.int64, (self._ids.slots + 1,))
        sets = Sets(offsets, take(arrays, "items", np.int64, (None,)))
        self._offsets, self._set_items = GrowingArray(sets.offsets), GrowingArray(sets.items)


def normalized(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows divided by their lengths, which must not be zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / lengths).astype(np.float32)


def exact_scores(queries: NDArray[np.float32], vectors: NDArray[np.float32], metric: str) -> Scores:
    """Return the scores of all pairs, float32 (n, N); cosine expects normalised rows."""
    a, b = readable(queries), readable(vectors)
    if metric == "l2":
        return (-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")).numpy()
    return (a @ b.T).numpy()


def _jaccard(queries: Sets, sets: Sets) -> Scores:
    items, places = np.unique(np.concatenate([sets.items, queries.items]), return_inverse=True)
    held = _incidence(sets.offsets, places[: len(sets.items)], len(items))
    asked = _incidence(queries.offsets, places[len(sets.items) :], len(items))
    shared = (asked @ held.T).toarray()
    sizes = np.asarray(asked.sum(1)).reshape(-1, 1) + np.asarray(held.sum(1)).reshape(1, -1)
    return (shared / (sizes - shared)).astype(np.float32)


def _incidence(offsets: NDArray[np.int64], places: NDArray[Any], width: int) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix((np.ones(len(places), np.float32), places, offsets), shape=(len(offsets) - 1, width))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
