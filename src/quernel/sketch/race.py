"""``RACE``: repeated array-of-counts estimators: sums of kernels from a few array look-ups (arXiv 1912.02283).

L rows of R cells. An item x of weight a adds a to cell H_l(x) of every row l; what a query q finds in its cells is

    E Z_l(q) = sum_i a_i (k_i + (1 - k_i) / R),    k_i = k(x_i, q)^K,

where rehashed codes collide by chance too, hence the estimate (R Z_l - sum_i a_i) / (R - 1); packed sign bits index
cells directly and need no correction. Standard error of the mean at most sum_i |a_i| sqrt(k_i) / sqrt(L), about.
Cost: d L K multiply-adds and L look-ups an item or query, 8 L R C bytes, whatever the number of items.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int
from quernel.hashing import PStable, Sets, SignProjection, debias
from quernel.hashing._cell_kernels import scatter, sum_codes
from quernel.hashing._family import Codes
from quernel.hashing._fused_cells import FusedCells
from quernel.kernels.lsh_kernel import Kernel, LSHKernel
from quernel.sketch._sketch import Sketch

# Items hashed at a time: their codes stay within a cache.
_BLOCK = 4096


def _example() -> dict[str, Any]:
    def make(**other: Any) -> RACE:
        return RACE(6, **{"n_rows": 1024, "n_cells": 16, "width": 3.0, **other})

    def exact(items: Any, weights: Any, queries: Any) -> Any:
        return LSHKernel("l2", 3.0).sums(queries, items, weights)

    # Six standard errors: sum_i w_i^2 k_i = 300 * 6.7 * 0.15 a row, over 1,024 rows.
    return {"make": make, "dim": 6, "exact": exact, "tolerance": 3.5, "other": ({"seed": 1}, {"n_cells": 8})}


@register(
    "representer-sketch",
    pillar="sketch",
    contract="sketch",
    paper="1912.02283",
    status="stable",
    headline=False,
    example=_example,
)
class RACE(Sketch):
    """Weighted sums of LSH kernels over a stream, in one small array.

    ``query(q)`` estimates sum_i weight_i k(x_i, q)^K over all items of ``update``; divided by ``total`` it is a kernel
    density. Items can be taken back with a negative weight, and sketches of parts of a stream add up exactly.

    Parameters
    ----------
    dim : int, optional
        Coordinates of an item; None for sets (``kernel="jaccard"``).
    n_rows : int, default=256
        Rows L: the error falls like 1 / sqrt(L).
    n_cells : int or None, default=32
        Cells R of a row, at least 2. None with ``kernel="angular"``: 2^K cells, indexed by the sign bits themselves.
    kernel : {"l2", "l1", "angular", "jaccard"}, default="l2"
        What is hashed; see ``quernel.kernels.LSHKernel``, which gives the exact kernel.
    n_concat : int, default=2
        Hashes K of a code.
    width : float, default=4.0
        Width of a cell for "l2" and "l1", in units of distance.
    n_outputs : int, default=1
        Sums C that are kept side by side, each with weights of its own.
    directions : {"gaussian", "rademacher", "sparse"}, default="gaussian"
        For "l2" and "angular": sparse directions turn most multiplications into nothing.
    seed : int, default=0

    Notes
    -----
    The array is float64, so that integer weights are exact up to 2^53 and merging and taking back leave no trace. The
    sum of all weights is that of any row; it is not stored apart.

    References
    ----------
    Coleman and Shrivastava, "Sub-linear RACE Sketches for Approximate Kernel Density Estimation on Streaming Data",
    arXiv 1912.02283, 2020.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((5000, 3))
    >>> sketch = RACE(3, n_rows=400).update(x)
    >>> near, far = sketch.query([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]) / sketch.total
    >>> bool(near > 0.3), bool(far < 0.1), sketch.nbytes
    (True, True, 102400)
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        n_rows: int = 256,
        n_cells: int | None = 32,
        kernel: Kernel = "l2",
        n_concat: int = 2,
        width: float = 4.0,
        n_outputs: int = 1,
        directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian",
        seed: int = 0,
    ) -> None:
        self.kernel = LSHKernel(kernel, width, n_concat)
        self.n_outputs = check_int("n_outputs", n_outputs, low=1)
        check_int("n_rows", n_rows, low=1)
        if n_cells is not None:
            check_int("n_cells", n_cells, low=2, high=2**24)
        elif kernel != "angular" or n_concat > 24:
            raise QuernelError(f'n_cells may be None for kernel="angular" with n_concat <= 24 only; got {kernel!r}')
        self.dim, self.n_rows, self.n_cells, self.directions, self.seed = dim, n_rows, n_cells, directions, seed
        self.family = self.kernel.family(dim, n_rows, n_cells, directions=directions, seed=seed)
        vectors = isinstance(self.family, PStable | SignProjection)
        self._fused = FusedCells(self.family) if vectors else None
        self._table = np.zeros((n_rows, self.family.n_codes, n_outputs))
        self._scales = np.ones(n_rows)

    def update(self, x: Any, weight: ArrayLike = 1) -> Self:
        """Add items.

        Parameters
        ----------
        x : array, shape (n, dim), or sets
        weight : float or array, shape (n,) or (n, C), default=1
            Negative weights take items back.

        Returns
        -------
        self

        Raises
        ------
        QuernelError
            If anything is wrong with an item or a weight; then nothing was added.
        """
        items = self._items("x", x)
        weights = self._weights(weight, len(items))
        if self._fused is not None:
            self._fused.check(items)  # before the first one is added, so that a bad one changes nothing
        for start in range(0, len(items), _BLOCK):
            codes = self._codes(items[start : start + _BLOCK])
            scatter(codes, weights[start : start + len(codes)], self._table)
        return self

    def query(self, q: Any, agg: Literal["mean", "mom"] = "mean", *, n_groups: int = 8) -> NDArray[np.float64]:
        """Return estimates of the weighted kernel sums.

        Parameters
        ----------
        q : array, shape (n, dim), or sets
        agg : {"mean", "mom"}, default="mean"
            Mean of the rows, or median of the means of ``n_groups`` contiguous groups of them: a little noisier, but
            proof against a few rows that are far off.
        n_groups : int, default=8
            For "mom": a divisor of ``n_rows``; about 8 log(1 / delta) for a failure probability of delta.

        Returns
        -------
        sums : array, shape (n,) for one output, else (n, C)
        """
        check_choice("agg", agg, ("mean", "mom"))
        groups = 1
        if agg == "mom":
            groups = check_int("n_groups", n_groups, low=1, high=self.n_rows)
            if self.n_rows % groups:
                raise QuernelError(f"n_groups must divide n_rows={self.n_rows}; got {groups}")
        items = self._items("q", q)
        if self._fused is not None:
            sums = self._fused.sums(items, self._table, self._scales, n_groups=groups)
        else:
            sums = np.empty((len(items), groups, self.n_outputs))
            sum_codes(self._codes(items), self._table, self._scales, sums, 0, len(items))
        means = sums[:, 0] if groups == 1 else sums
        means = means * (groups / self.n_rows)
        if self.n_cells is not None:
            means = debias(means, self._totals, self.n_cells)
        means = means if groups == 1 else np.median(means, axis=1)
        return means[:, 0] if self.n_outputs == 1 else means

    @property
    def total(self) -> Any:
        """Sum of all weights: a float for one output, else an array (C,)."""
        return self._totals[0] if self.n_outputs == 1 else self._totals

    @property
    def table(self) -> NDArray[np.float64]:
        """The array of counts, shape (L, R, C): a view that may not be written."""
        view = self._table.view()
        view.flags.writeable = False
        return view

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "dim": self.dim,
            "n_rows": self.n_rows,
            "n_cells": self.n_cells,
            **self.kernel.config(),
            "n_outputs": self.n_outputs,
            "directions": self.directions,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        return f"RACE({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"

    @property
    def _totals(self) -> NDArray[np.float64]:
        return np.asarray(self._table[0].sum(axis=0))

    def _items(self, name: str, x: Any) -> Any:
        if self.dim is None:
            return Sets.of(x)
        rows = np.asarray(x)
        if rows.dtype.kind not in "fiu":
            raise QuernelError(f"{name} must hold real numbers; got {rows.dtype}")
        with np.errstate(over="ignore"):  # beyond float32 is infinity, which hashing refuses
            rows = np.ascontiguousarray(rows[None] if rows.ndim == 1 else rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise QuernelError(f"{name} must have shape (n, {self.dim}); got {np.shape(x)}")
        return rows

    def _weights(self, weight: ArrayLike, n: int) -> NDArray[np.float64]:
        held = np.asarray(weight)
        if held.dtype.kind not in "fiu":
            raise QuernelError(f"weight must hold real numbers; got {held.dtype}")
        check_finite("weight", held)
        held = held[:, None] if held.ndim == 1 else held
        fits = held.ndim == 0 or held.shape in ((n, 1), (n, self.n_outputs))
        if not fits:
            raise QuernelError(
                f"weight must be a number or have shape ({n},) or ({n}, {self.n_outputs}); got {np.shape(weight)}"
            )
        return np.ascontiguousarray(np.broadcast_to(held, (n, self.n_outputs)), dtype=np.float64)

    def _codes(self, items: Any) -> Codes:
        return self.family.codes(items) if self._fused is None else self._fused.cells(items)

    def _add(self, other: Self) -> None:
        self._table += other._table

    def _arrays(self) -> Arrays:
        return {"table": self._table}

    def _restore(self, arrays: Arrays) -> None:
        table = take(arrays, "table", np.float64, self._table.shape)
        check_finite("array 'table'", table)
        self._table = table
