"""``FusedCells``: a family of vector hashes laid out for one pass from rows to sums of what their cells hold.

Arrays are prepared once; a call from Python is one call of one compiled function, for a single row or a hundred
thousand. A projection (and a shift) may come before the hashes: x -> A x + s -> cells -> sums.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges
from quernel.hashing._cell_kernels import hash_rows, sum_rows
from quernel.hashing._directions import Projections
from quernel.hashing._family import Codes
from quernel.hashing._projection_kernels import PANEL, as_panels
from quernel.hashing.mixers import U64
from quernel.hashing.pstable import PStable
from quernel.hashing.simhash import SignProjection

# Rows worth a thread of their own; fewer stay on the caller's without asking torch.
_GRAIN = 256
# Cells from zero where float32 begins to lose them, less the largest direction that is likely.
_LARGEST = 2.0**21

Rows = NDArray[np.float32]


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that is contiguous, aligned and writable, a copy if need be.

    Numba compiles a form of its own for any other, which takes seconds and may sum in another order.
    """
    return array if array.flags.carray else np.array(array, order="C")


class Projection(NamedTuple):
    """A linear map before the hashes: panels of A (p, d), and what is added to A x."""

    panels: NDArray[np.float32]
    shift: NDArray[np.float32]

    @classmethod
    def of(cls, matrix: Rows, shift: Rows) -> Projection:
        """Prepare A, shape (p, d), and the shift, shape (p,)."""
        return cls(as_panels(matrix), plain(np.asarray(shift, dtype=np.float32)))

    @property
    def dim(self) -> int:
        """Columns d of A."""
        return self.panels.shape[1]


class FusedCells:
    """The arrays of a family of vector hashes, k-major.

    Parameters
    ----------
    family : PStable or SignProjection
        Whose cells these are, bit for bit.
    """

    def __init__(self, family: PStable | SignProjection) -> None:
        self.dim, self.n_tables, self.n_codes = family.dim, family.n_tables, family.n_codes
        order = np.arange(family.n_tables * family.n_concat).reshape(family.n_tables, family.n_concat).T.reshape(-1)
        offsets, limit = np.zeros(0, np.float32), np.inf
        if isinstance(family, PStable):
            offsets, limit = family.offsets[order], _LARGEST * family.width
        self._limit = limit
        self._plain = Projection(np.zeros((0, self.dim, PANEL), np.float32), np.zeros(self.dim, np.float32))
        self._arrays = (
            *_reordered(family.projections, order),
            offsets,
            family.table_states(),
            family.n_concat,
            U64(family.n_cells or 0),
            np.float32(limit),
        )

    def check(self, rows: Rows) -> None:
        """Raise unless all rows (n, d), before any projection, can be hashed."""
        if len(rows):
            reach = np.abs(rows).sum(axis=1)
            bad = np.flatnonzero(~(reach < self._limit))
            self._check(int(bad[0]) if bad.size else -1)

    def cells(self, rows: Rows, before: Projection | None = None) -> Codes:
        """Return the cells of rows (n, d), uint32 (n, L)."""
        rows, first = self._checked(rows, before)
        out = np.empty((len(rows), self.n_tables), np.uint32)
        self._run(lambda start, stop: hash_rows(rows, *first, *self._arrays, out, start, stop), len(rows))
        return out

    def sums(
        self, rows: Rows, table: Any, scales: Any, *, n_groups: int = 1, before: Projection | None = None
    ) -> NDArray[Any]:
        """Return the sums, over each of the groups of tables, of ``scales[t] table[t, cell]``.

        Parameters
        ----------
        rows : array, shape (n, d), float32
        table : array, shape (L, R, C)
            As ``plain`` returns it.
        scales : array, shape (L,)
            Likewise. Its dtype is that of the sums.
        n_groups : int, default=1
            A divisor of L.
        before : Projection, optional

        Returns
        -------
        sums : array, shape (n, n_groups, C)
        """
        rows, first = self._checked(rows, before)
        if table.shape[:2] != (self.n_tables, self.n_codes) or scales.shape != (self.n_tables,):
            raise QuernelError(f"table must have shape ({self.n_tables}, {self.n_codes}, C); got {table.shape}")
        n = len(rows)
        out = np.empty((n, n_groups, table.shape[2]), scales.dtype)
        if n < 2 * _GRAIN:
            self._check(sum_rows(rows, *first, *self._arrays, table, scales, out, 0, n))
            return out
        self._run(lambda a, b: sum_rows(rows, *first, *self._arrays, table, scales, out, a, b), n)
        return out

    def _checked(self, rows: Rows, before: Projection | None) -> tuple[Rows, Projection]:
        # The kernels read without bounds checks.
        first = self._plain if before is None else before
        dim = self.dim if before is None else first.dim
        if rows.ndim != 2 or rows.shape[1] != dim or rows.dtype != np.float32:
            raise QuernelError(f"rows must have shape (n, {dim}) and be float32; got {rows.shape} of {rows.dtype}")
        return plain(rows), first

    def _run(self, work: Any, n: int) -> None:
        parallel_ranges(lambda start, stop: self._check(work(start, stop)), n, grain=_GRAIN)

    @staticmethod
    def _check(bad: int) -> None:
        if bad >= 0:
            raise QuernelError(
                f"row {bad} holds NaN or infinity, or lies so far from zero that float32 cannot tell its cells apart; "
                "clean it, centre or scale the data, or take a larger width"
            )


def _reordered(held: Projections, order: NDArray[Any]) -> tuple[Any, Any, Any]:
    """Return panels, places and weights of directions in another order; those of one kind are empty."""
    if held.kind == "sparse":
        return held.panels, np.ascontiguousarray(held.places[order]), np.ascontiguousarray(held.weights[order])
    return as_panels(held.dense()[order]), held.places, held.weights


@functools.lru_cache(maxsize=64)
def fused_cells(
    kernel: str, dim: int, n_tables: int, n_concat: int, n_cells: int | None, width: float, directions: str, seed: int
) -> FusedCells:
    """Return the prepared family of these arguments; the same ones share their arrays."""
    return FusedCells(vector_family(kernel, dim, n_tables, n_concat, n_cells, width, directions, seed))


def vector_family(
    kernel: str, dim: int, n_tables: int, n_concat: int, n_cells: int | None, width: float, directions: str, seed: int
) -> PStable | SignProjection:
    """Return the family whose hashes collide with the kernel "l2", "l1" or "angular".

    ``n_cells=None`` packs bits, for "angular"; ``directions`` are "gaussian", "rademacher" or "sparse" ("l1" has
    Cauchy ones whatever it says).
    """
    kind: Any = directions
    if kernel == "angular":
        return SignProjection(dim, n_tables, n_concat, n_cells, directions=kind, seed=seed)
    if n_cells is None:
        raise QuernelError(f"n_cells must be given for kernel={kernel!r}, whose hashes are not bits; got None")
    kind = None if kernel == "l1" else kind
    norm: Any = kernel
    return PStable(dim, n_tables, n_concat, width, n_cells, norm=norm, directions=kind, seed=seed)
