"""``SignProjection``: the sign of a random projection, a locality-sensitive hash of the angle (Charikar, 2002).

h(x) = 1 if <a, x> >= 0 else 0;  two vectors at angle s agree with probability 1 - s / pi.
Lengths do not matter. Vectors that all point the same way share every code: centre data whose mean is far from zero.
Cost: dim L K multiply-adds a row with dense directions, nnz L K with sparse ones.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numba import njit

from quernel._errors import QuernelError
from quernel._validate import check_choice
from quernel.hashing._directions import Projections
from quernel.hashing._family import Codes, LSHFamily, Raw, check_rows, over_rows

KINDS = ("gaussian", "rademacher", "sparse")
_CHUNK = 256


class SignProjection(LSHFamily):
    """L codes of K sign bits of random projections; bit b of a packed code has weight 2^b.

    Parameters
    ----------
    dim : int
        Coordinates of a vector.
    n_tables, n_concat : int
        L and K; packed codes need K <= 32.
    n_cells : int, optional
        Range of mixed codes; default packs bits.
    directions : {"gaussian", "rademacher", "sparse"}, default="gaussian"
        The law 1 - s / pi is exact for Gaussian directions and a good approximation for the others in many dimensions.
    density : float, default=1/3
        Share of the coordinates that a sparse direction reads.
    seed : int, default=0

    Examples
    --------
    >>> import numpy as np
    >>> family = SignProjection(dim=8, n_tables=4, n_concat=3)
    >>> codes = family.codes(np.eye(8))
    >>> codes.shape, family.n_codes, round(float(family.collision_probability(np.pi / 2)), 3)
    ((8, 4), 8, 0.125)
    """

    binary = True

    def __init__(
        self,
        dim: int,
        n_tables: int,
        n_concat: int,
        n_cells: int | None = None,
        *,
        directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian",
        density: float = 1 / 3,
        seed: int = 0,
    ) -> None:
        super().__init__(n_tables, n_concat, n_cells, seed)
        check_choice("directions", directions, KINDS)
        self.density = density
        self.projections = Projections(dim, self.n_tables * self.n_concat, directions, self.seed, density=density)
        self.dim, self.directions = self.projections.dim, directions

    def margins(self, X: Any) -> np.ndarray:
        """Return the projections themselves, float32 (n, L, K): the smaller one is, the likelier its bit differs."""
        rows = check_rows("X", X, self.dim)
        return np.ascontiguousarray(self.projections.project(rows)).reshape(len(rows), self.n_tables, self.n_concat)

    def raw(self, X: Any) -> Raw:
        """Return the bits, int64 (n, L, K)."""
        return (self.margins(X) >= 0).astype(np.int64)

    def codes(self, X: Any) -> Codes:
        """Return the cell of n rows in every table, uint32 (n, L)."""
        if self.n_cells is not None:
            return super().codes(X)
        rows = check_rows("X", X, self.dim)
        out = np.empty((len(rows), self.n_tables), np.uint32)

        def work(start: int, stop: int) -> None:
            # A few rows at a time: projections of all would be larger than the cache, and fault in afresh.
            values = np.empty((min(_CHUNK, stop - start), self.projections.width), np.float32)
            for first in range(start, stop, _CHUNK):
                part = rows[first : min(first + _CHUNK, stop)]
                self.projections.project_range(part, values, 0, len(part))
                pack_signs(values[: len(part)], self.n_concat, out, first)

        over_rows(work, len(rows))
        return out

    def hash_probability(self, *similarity: Any) -> Any:
        """Return 1 - angle / pi; the angle in radians."""
        (angle,) = similarity
        angles = np.asarray(angle, dtype=float)
        if not ((angles >= 0) & (angles <= np.pi)).all():
            raise QuernelError(f"angle must lie in [0, pi]; got {angle!r}")
        return 1 - angles / np.pi

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "dim": self.dim,
            "n_tables": self.n_tables,
            "n_concat": self.n_concat,
            "n_cells": self.n_cells,
            "directions": self.directions,
            "density": self.density,
            "seed": self.seed,
        }


@njit(nogil=True, cache=True, fastmath=False)
def pack_signs(projections: Any, n_concat: Any, out: Any, start: Any) -> None:
    """Write the packed sign bits of projections (n, >= L K) to the rows of ``out`` (N, L) from ``start`` on."""
    for i in range(projections.shape[0]):
        for t in range(out.shape[1]):
            code = np.uint32(0)
            for b in range(n_concat):
                if projections[i, t * n_concat + b] >= 0:
                    code |= np.uint32(1) << np.uint32(b)
            out[start + i, t] = code


def angle_between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the angle in radians of paired vectors along the last axis; float64.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(angle_between(np.array([1.0, 0.0]), np.array([0.0, 2.0])) / np.pi), 3)
    0.5
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    if not (lengths > 0).all():
        raise QuernelError("x and y must have no zero vector, which has no angle")
    return np.asarray(np.arccos(np.clip((a * b).sum(-1) / lengths, -1, 1)))


def _warmup() -> None:
    """Compile the packing of signs; ``quernel warmup`` calls it."""
    SignProjection(1, 1, 1).codes(np.ones((1, 1)))
