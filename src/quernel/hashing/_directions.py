"""Random directions for hashes of vectors: Gaussian, Cauchy, random signs, or sparse signs, from a seed.

Dense ones are kept as float32 panels for ``_projection_kernels``. Sparse ones keep, for every direction, ``nnz``
coordinates and their signs, scaled so that a projection has the variance of a Gaussian one; they win where a vector
has far more coordinates than a direction uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel import _random
from quernel._validate import check_choice, check_float, check_int
from quernel.hashing._family import over_rows
from quernel.hashing._projection_kernels import PANEL, as_panels, project_rows

Directions = Literal["gaussian", "cauchy", "rademacher", "sparse"]


class Projections:
    """``n`` random directions in ``dim`` dimensions; nothing of them needs to be saved but the seed.

    Parameters
    ----------
    dim, n : int
        Coordinates and directions.
    kind : {"gaussian", "cauchy", "rademacher", "sparse"}
        Law of the entries. "sparse" has exactly ``max(1, round(density dim))`` random signs a direction.
    seed : int
    scale : float, default=1.0
        Multiplied into every direction.
    density : float, default=1/3
        For "sparse".
    """

    def __init__(
        self, dim: int, n: int, kind: Directions, seed: int, *, scale: float = 1.0, density: float = 1 / 3
    ) -> None:
        self.dim, self.n = check_int("dim", dim, low=1), n
        self.kind = check_choice("directions", kind, ("gaussian", "cauchy", "rademacher", "sparse"))
        check_float("density", density, low=0.0, high=1.0, open_low=True)
        draw = _random.generator(np.random.SeedSequence([seed, dim, n]))
        self.panels = np.zeros((0, dim, PANEL), np.float32)
        self.places = np.zeros((0, 0), np.int32)
        self.weights = np.zeros((0, 0), np.float32)
        if kind == "sparse":
            nnz = max(1, round(density * dim))
            keys = draw.random((n, dim), dtype=np.float32)
            self.places = np.sort(np.argpartition(keys, nnz - 1, axis=1)[:, :nnz], axis=1).astype(np.int32)
            signs = draw.integers(0, 2, (n, nnz), dtype=np.int8) * 2 - 1
            self.weights = (signs * (scale * (dim / nnz) ** 0.5)).astype(np.float32)
        else:
            law: dict[str, Callable[[], NDArray[Any]]] = {
                "gaussian": lambda: draw.standard_normal((n, dim), dtype=np.float32),
                "cauchy": lambda: draw.standard_cauchy((n, dim)),
                "rademacher": lambda: draw.integers(0, 2, (n, dim), dtype=np.int8) * 2 - 1,
            }
            self.panels = as_panels(law[kind]() * scale)

    @property
    def width(self) -> int:
        """Columns of a result: ``n``, rounded up to whole panels where directions are dense."""
        return self.n if self.kind == "sparse" else PANEL * len(self.panels)

    def dense(self) -> NDArray[np.float32]:
        """Return the directions as a matrix (n, dim)."""
        if self.kind != "sparse":
            return np.ascontiguousarray(self.panels.transpose(0, 2, 1).reshape(-1, self.dim)[: self.n])
        matrix = np.zeros((self.n, self.dim), np.float32)
        np.put_along_axis(matrix, self.places.astype(np.int64), self.weights, axis=1)
        return matrix

    def project(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the projections of rows (N, dim), shape (N, n); a row's do not depend on the others."""
        out = np.empty((len(rows), self.width), np.float32)
        over_rows(lambda start, stop: self.project_range(rows, out, start, stop), len(rows))
        return out[:, : self.n]

    def project_range(self, rows: NDArray[np.float32], out: NDArray[np.float32], start: int, stop: int) -> None:
        """Write the projections of rows [start, stop) to the same rows of ``out`` (N, width), on this thread."""
        if self.kind == "sparse":
            project_sparse(rows, self.places, self.weights, out, start, stop)
        else:
            project_rows(rows, self.panels, out[start:stop], start, stop)


@njit(nogil=True, cache=True, fastmath=False)
def project_sparse(x: Any, places: Any, weights: Any, out: Any, start: Any, stop: Any) -> None:
    """Write sparse projections of the rows of ``x`` in [start, stop) to ``out``.

    x: (n, dim), places: (m, nnz) int32, weights: (m, nnz), out: (n, >= m).
    """
    for i in range(start, stop):
        for p in range(places.shape[0]):
            total = np.float32(0.0)
            for j in range(places.shape[1]):
                total += weights[p, j] * x[i, places[p, j]]
            out[i, p] = total


def _warmup() -> None:
    """Compile dense and sparse projections; ``quernel warmup`` calls it."""
    rows = np.ones((5, 2), np.float32)  # four rows and one have code of their own
    Projections(2, 1, "gaussian", 0).project(rows)
    Projections(2, 1, "sparse", 0).project(rows)
