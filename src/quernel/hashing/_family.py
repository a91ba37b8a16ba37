"""``LSHFamily``: what every locality-sensitive hash answers, and the step from hash values to cells of a table.

An object holds L tables of K hashes each and is a pure function of its seed. ``raw`` gives the hash values themselves,
``codes`` one cell a table: the K values packed as bits where they are bits and no other range is asked for, else
mixed with the number of the table and mapped to ``n_cells``. Two inputs share a cell of a table with probability

    p = k^K  (packed),   p = k^K + (1 - k^K) / n_cells  (mixed),

with k the collision probability of one hash. ``debias`` undoes the second on sums of weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges
from quernel._validate import check_finite, check_int
from quernel.hashing.mixers import U64, as_u64, fastrange_small, mix64, mix64_step

#: Largest range of a code: codes are uint32.
MAX_CELLS = 2**32
# Rows worth a thread of their own.
GRAIN = 64

Codes = NDArray[np.uint32]
Raw = NDArray[np.int64]


class LSHFamily(ABC):
    """Base of the locality-sensitive hash families.

    Parameters
    ----------
    n_tables : int
        Codes L of an input.
    n_concat : int
        Hashes K of a code.
    n_cells : int, optional
        Range of the codes. None packs bits, for families whose hashes are bits and K <= 32.
    seed : int
        Selects the functions; non-negative.
    """

    #: Whether every hash is 0 or 1, so that K of them pack into a code.
    binary: ClassVar[bool] = False

    def __init__(self, n_tables: int, n_concat: int, n_cells: int | None, seed: int) -> None:
        self.n_tables = check_int("n_tables", n_tables, low=1)
        self.n_concat = check_int("n_concat", n_concat, low=1)
        self.seed = check_int("seed", seed, low=0, high=2**63 - 1)
        if n_cells is None and not (self.binary and self.n_concat <= 32):
            what = "n_concat above 32" if self.binary else f"{type(self).__name__}, whose hashes are not bits"
            raise QuernelError(f"n_cells must be given for {what}; got None. Take e.g. n_cells=2**16")
        self.n_cells = None if n_cells is None else check_int("n_cells", n_cells, low=2, high=MAX_CELLS)

    @property
    def n_codes(self) -> int:
        """Number of codes that a table can give."""
        return 2**self.n_concat if self.n_cells is None else self.n_cells

    def table_states(self) -> NDArray[np.uint64]:
        """Return the state of the mixer of every table, uint64 (L,), for ``mix_cell``."""
        states = mix64(self.seed, np.arange(self.n_tables))
        return np.asarray(states, dtype=U64)

    @abstractmethod
    def raw(self, X: Any) -> Raw:
        """Return the hash values of n inputs, int64 (n, L, K)."""

    def codes(self, X: Any) -> Codes:
        """Return the cell of n inputs in every table, uint32 (n, L), each below ``n_codes``."""
        values = self.raw(X)
        out = np.empty(values.shape[:2], np.uint32)
        if self.n_cells is None:
            _pack(values, out)
        else:
            _mix(values, self.table_states(), U64(self.n_cells), out)
        return out

    @abstractmethod
    def hash_probability(self, *similarity: Any) -> Any:
        """Return the probability k that one hash is equal for two inputs of this distance or similarity."""

    def collision_probability(self, *similarity: Any) -> Any:
        """Return the probability that two inputs share their cell of a table."""
        equal = np.asarray(self.hash_probability(*similarity)) ** self.n_concat
        equal = equal if self.n_cells is None else equal + (1 - equal) / self.n_cells
        return equal[()]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild the family from ``config()``."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.config() == other.config()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


@njit(nogil=True, cache=True, fastmath=False)
def mix_cell(state: Any, values: Any, n_cells: Any) -> Any:
    """Return the cell (uint64) of K hash values of one table; ``state`` is its entry of ``table_states``."""
    for value in values:
        state = mix64_step(state, U64(value))
    return fastrange_small(state, n_cells)


@njit(nogil=True, cache=True, fastmath=False)
def pack_bits(values: Any) -> Any:
    """Return the cell (uint64) of K bits of one table; the b-th has weight 2^b."""
    code = U64(0)
    for b in range(len(values)):
        code |= U64(values[b]) << U64(b)
    return code


@njit(nogil=True, cache=True, fastmath=False)
def _mix(raw: Any, states: Any, n_cells: Any, out: Any) -> None:
    for i in range(raw.shape[0]):
        for t in range(raw.shape[1]):
            out[i, t] = mix_cell(states[t], raw[i, t], n_cells)


@njit(nogil=True, cache=True, fastmath=False)
def _pack(raw: Any, out: Any) -> None:
    for i in range(raw.shape[0]):
        for t in range(raw.shape[1]):
            out[i, t] = pack_bits(raw[i, t])


def rehash_to_range(raw: Any, n_cells: int, seed: int) -> Codes:
    """Map hash values, int64 (n, L, K), to cells uint32 (n, L) by a mixer of (seed, table, values).

    Negative values count as their two's complement, so that -1 and 0 never share a cell by design.

    Examples
    --------
    >>> cells = rehash_to_range(np.array([[[3, -1], [3, -1]]]), n_cells=8, seed=0)
    >>> cells.shape, bool((cells < 8).all())
    ((1, 2), True)
    """
    values = np.ascontiguousarray(as_u64("raw", np.asarray(raw))).view(np.int64)
    if values.ndim != 3:
        raise QuernelError(f"raw must have shape (n, tables, hashes); got {values.shape}")
    check_int("n_cells", n_cells, low=2, high=MAX_CELLS)
    out = np.empty(values.shape[:2], np.uint32)
    states = np.asarray(mix64(check_int("seed", seed, low=0), np.arange(values.shape[1])), dtype=U64)
    _mix(values, states, U64(n_cells), out)
    return out


def debias(sums: Any, total: Any, n_cells: int) -> Any:
    """Return unbiased kernel sums from what mixed cells hold: (n_cells sums - total) / (n_cells - 1).

    Parameters
    ----------
    sums : array
        Weights found in the cells of a query.
    total : array or float
        Sum of all weights, of the same trailing shape.
    n_cells : int
        Range of the codes, at least 2.
    """
    check_int("n_cells", n_cells, low=2)
    return (n_cells * np.asarray(sums) - total) / (n_cells - 1)


def as_array(X: Any) -> NDArray[Any]:
    """Return an array of whatever holds numbers; a tensor of any device or dtype, with or without a gradient, too."""
    if hasattr(X, "detach"):
        X = X.detach().cpu()
        # NumPy has no bfloat16.
        X = X.float() if X.is_floating_point() else X
    return np.asarray(X)


def check_rows(name: str, X: Any, dim: int) -> NDArray[np.float32]:
    """Return rows as contiguous float32, shape (n, dim); one row alone is taken as (1, dim)."""
    rows = as_array(X)
    if rows.dtype.kind not in "fiu":
        raise QuernelError(f"{name} must hold real numbers; got {rows.dtype}")
    rows = np.ascontiguousarray(rows[None] if rows.ndim == 1 else rows, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise QuernelError(f"{name} must have shape (n, {dim}); got {np.shape(X)}")
    check_finite(name, rows)
    return rows


def over_rows(work: Callable[[int, int], None], n: int) -> None:
    """Run ``work(start, stop)`` over row ranges on the library's threads."""
    parallel_ranges(work, n, grain=GRAIN)


def _warmup() -> None:
    """Compile the step from hash values to cells; ``quernel warmup`` calls it."""
    raw, out = np.zeros((1, 1, 1), np.int64), np.empty((1, 1), np.uint32)
    _pack(raw, out)
    _mix(raw, np.zeros(1, U64), U64(2), out)
