"""``LSHKernel``: the similarity that a locality-sensitive hash stands for, exactly (arXiv 2106.11426).

k(x, y) = P(h(x) = h(y)) for one hash, k^K for K of them: of the Euclidean or L1 distance, the angle, or the Jaccard
similarity of sets. All are positive definite, so they serve support vector machines and Gaussian processes as they
are; a sketch of L tables estimates sums of them without touching the data again. Cost: O(n m d) for n x m pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int
from quernel.hashing import LSHFamily, MinHash, Sets
from quernel.hashing._fused_cells import vector_family
from quernel.kernels._collision import VECTOR_KERNELS, collision

Kernel = Literal["l2", "l1", "angular", "jaccard"]
KERNELS = (*VECTOR_KERNELS, "jaccard")
# Pairs evaluated at a time: 16 MB of float64.
_BLOCK = 2**21


@dataclass(frozen=True)
class LSHKernel:
    """An exact kernel of hash collisions.

    Parameters
    ----------
    kernel : {"l2", "l1", "angular", "jaccard"}, default="l2"
        What is hashed: Euclidean or L1 distance, angle, or similarity of sets.
    width : float, default=4.0
        Width w of a cell for "l2" and "l1", in units of distance: half the points at distance w collide in one hash.
    n_concat : int, default=2
        Hashes K of a code: the kernel is raised to this power.

    Notes
    -----
    An object is callable on two sets of rows, as scikit-learn takes for ``SVC(kernel=...)``.

    References
    ----------
    Coleman et al., "Efficient Inference via Universal LSH Kernel", arXiv 2106.11426, 2021.
    Datar et al., "Locality-Sensitive Hashing Scheme Based on p-Stable Distributions", 2004.

    Examples
    --------
    >>> kernel = LSHKernel("l2", width=4.0, n_concat=2)
    >>> kernel([[0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0], [3.0, 4.0]]).round(4).tolist()
    [[1.0, 0.3715, 0.0919]]
    >>> LSHKernel("jaccard", n_concat=1)([[1, 2, 3]], [[2, 3, 4]]).tolist()
    [[0.5]]
    """

    kernel: Kernel = "l2"
    width: float = 4.0
    n_concat: int = 2

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, KERNELS)
        check_float("width", self.width, low=0.0, open_low=True)
        check_int("n_concat", self.n_concat, low=1)

    def __call__(self, X: Any, Y: Any = None) -> Any:
        """Return the kernel of all pairs of rows.

        Parameters
        ----------
        X, Y : array or Tensor, shapes (n, d) and (m, d), or sets
            Tensors give a tensor, differentiable in both; ``Y`` defaults to ``X``.

        Returns
        -------
        K : array or Tensor, shape (n, m)
            float32 if both are, else float64.
        """
        Y = X if Y is None else Y
        if self.kernel == "jaccard":
            values: NDArray[np.float64] = _jaccard(Sets.of(X), Sets.of(Y)) ** self.n_concat
            return values
        if isinstance(X, Tensor) and isinstance(Y, Tensor):
            return collision(self.kernel, X, Y, self.width, self.n_concat, exact=True)
        x, y = _rows("X", X), _rows("Y", Y)
        if x.shape[1] != y.shape[1]:
            raise QuernelError(f"Y must have {x.shape[1]} columns like X; got {y.shape[1]}")
        dtype = np.promote_types(x.dtype, y.dtype)
        pair = (torch.from_numpy(np.ascontiguousarray(one, dtype=dtype)) for one in (x, y))
        return self(*pair).numpy()

    def sums(self, Q: Any, X: Any, weights: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Return sum_i weights_i k(x_i, q) for every query, in blocks: what a sketch estimates.

        Parameters
        ----------
        Q, X : array, shapes (m, d) and (n, d), or sets
        weights : float or array, shape (n,) or (n, C), default=1.0

        Returns
        -------
        sums : array, shape (m,) or (m, C)
        """
        queries, items = (Sets.of(Q), Sets.of(X)) if self.kernel == "jaccard" else (_rows("Q", Q), _rows("X", X))
        held = np.asarray(weights, np.float64)
        held = np.broadcast_to(held, (len(items),)) if held.ndim == 0 else held
        if held.ndim > 2 or len(held) != len(items):
            raise QuernelError(f"weights must have {len(items)} rows, one an item; got shape {held.shape}")
        total = np.zeros((len(queries), *held.shape[1:]))
        step = max(1, _BLOCK // max(1, len(queries)))
        for start in range(0, len(items), step):
            total += self(queries, items[start : start + step]) @ held[start : start + step]
        return total

    def family(
        self,
        dim: int | None,
        n_tables: int,
        n_cells: int | None,
        *,
        directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian",
        seed: int = 0,
    ) -> LSHFamily:
        """Return hashes that collide with this probability; ``dim`` is None for sets."""
        if (dim is None) != (self.kernel == "jaccard"):
            raise QuernelError(f"dim must be given for vectors and not for sets; got {dim!r} and {self.kernel!r}")
        check_choice("directions", directions, ("gaussian", "rademacher", "sparse"))
        if self.kernel in ("l1", "jaccard") and directions != "gaussian":
            raise QuernelError(f"directions must be left alone for kernel={self.kernel!r}; got {directions!r}")
        if dim is None:
            return MinHash(n_tables, self.n_concat, 2**32 if n_cells is None else n_cells, seed=seed)
        return vector_family(self.kernel, dim, n_tables, self.n_concat, n_cells, self.width, directions, seed)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return asdict(self)


def _rows(name: str, values: Any) -> NDArray[Any]:
    rows = np.asarray(values)
    if rows.dtype.kind not in "fiu" or rows.ndim != 2:
        raise QuernelError(f"{name} must be numbers of shape (n, d); got {rows.dtype} of shape {rows.shape}")
    check_finite(name, rows)
    return rows if rows.dtype == np.float32 else rows.astype(np.float64, copy=False)


def _jaccard(x: Sets, y: Sets) -> NDArray[np.float64]:
    """Return the Jaccard similarity of all pairs by a sparse product."""
    items, places = np.unique(np.concatenate([x.items, y.items]), return_inverse=True)
    parts = (places[: len(x.items)], places[len(x.items) :])
    first, second = (
        sparse.csr_matrix((np.ones(len(columns)), columns, one.offsets), shape=(len(one), len(items)))
        for one, columns in zip((x, y), parts, strict=True)
    )
    for matrix in (first, second):
        matrix.sum_duplicates()
        matrix.data[:] = 1
    shared = (first @ second.T).toarray()
    sizes = np.asarray(first.sum(1)).reshape(-1, 1) + np.asarray(second.sum(1)).reshape(1, -1)
    return np.asarray(shared / (sizes - shared))
