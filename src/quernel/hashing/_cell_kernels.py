"""Rows to cells to sums in one pass: project, floor or take signs, mix, look up, add. Nothing of it is kept.

Directions come k-major (hash k of table t in column k L + t), so that every loop over tables runs over neighbours and
becomes vector code. A row's cells are those of ``LSHFamily.codes`` bit for bit, in any company of other rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quernel._intrinsics import keyed
from quernel.hashing._directions import project_sparse
from quernel.hashing._projection_kernels import PANEL, project_rows
from quernel.hashing.mixers import U64, fastrange_small, mix64_step

# Rows projected at a time: 16 rows of 512 projections are 32 KB.
_BLOCK = 16
_NONE = U64(0)
# Sums of look-ups may be taken in another order, so that they become vector code; NaN and infinity stay what they are.
REORDERED = {"reassoc", "nsz"}


@njit(nogil=True, cache=True, fastmath=False)
def _hash_row(values: Any, offsets: Any, states: Any, n_concat: Any, n_cells: Any, cells: Any) -> None:
    """Write the cells (uint64) of one row; ``offsets`` is empty for signs, ``n_cells`` 0 for packed bits."""
    tables = cells.shape[0]
    if n_cells == _NONE:
        cells[:] = _NONE
    else:
        cells[:] = states
    for k in range(n_concat):
        projected = values[k * tables : (k + 1) * tables]
        if offsets.shape[0] > 0:
            shifts = offsets[k * tables : (k + 1) * tables]
            for t in range(tables):
                cells[t] = mix64_step(cells[t], U64(np.int64(np.floor(projected[t] + shifts[t]))))
        elif n_cells == _NONE:
            for t in range(tables):
                cells[t] |= U64(projected[t] >= 0) << U64(k)
        else:
            for t in range(tables):
                cells[t] = mix64_step(cells[t], U64(projected[t] >= 0))
    if n_cells != _NONE:
        for t in range(tables):
            cells[t] = fastrange_small(cells[t], n_cells)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def _project(
    x: Any, first: Any, shift: Any, panels: Any, places: Any, weights: Any, limit: Any, hidden: Any, values: Any,
    start: Any, stop: Any,
) -> Any:  # fmt: skip
    """Write projections of the rows [start, stop); return a row beyond ``limit`` or not finite, or -1."""
    n, dim = stop - start, hidden.shape[1]
    if first.shape[0] > 0:
        project_rows(x, first, values, start, stop)
        # ``values`` is read as rows of the first projection's width, which it is wide enough for.
        wide = values.reshape(-1)
        pitch = values.shape[1]
        for i in range(n):
            for j in range(dim):
                hidden[i, j] = wide[i * pitch + j] + shift[j]
    else:
        for i in range(n):
            for j in range(dim):
                hidden[i, j] = x[start + i, j]
    for i in range(n):
        reach = np.float32(0.0)
        for j in range(dim):
            reach += abs(hidden[i, j])
        if not reach < limit:
            return start + i
    if places.shape[0] > 0:
        project_sparse(hidden, places, weights, values, 0, n)
    else:
        project_rows(hidden, panels, values, 0, n)
    return -1


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def hash_rows(
    x: Any, first: Any, shift: Any, panels: Any, places: Any, weights: Any, offsets: Any, states: Any, n_concat: Any,
    n_cells: Any, limit: Any, out: Any, start: Any, stop: Any,
) -> Any:  # fmt: skip
    """Write the cells of the rows [start, stop) to the same rows of ``out`` (N, L) uint32; return a bad row or -1.

    x: (N, d); first: panels (P, d, 64) of a projection that comes before, or (0, d, 64); shift: (p,), added after it.
    """
    block = min(_BLOCK, stop - start)
    hidden = np.empty((block, shift.shape[0]), np.float32)
    values = np.empty((block, PANEL * max(first.shape[0], _width(panels, places))), np.float32)
    cells = np.empty(states.shape[0], np.uint64)
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        bad = _project(x, first, shift, panels, places, weights, limit, hidden[: end - begin], values, begin, end)
        if bad >= 0:
            return bad
        for i in range(end - begin):
            _hash_row(values[i], offsets, states, n_concat, n_cells, cells)
            for t in range(cells.shape[0]):
                out[begin + i, t] = np.uint32(cells[t])
    return -1


@njit(nogil=True, cache=True, fastmath=REORDERED)
@keyed
def sum_rows(
    x: Any, first: Any, shift: Any, panels: Any, places: Any, weights: Any, offsets: Any, states: Any, n_concat: Any,
    n_cells: Any, limit: Any, table: Any, scales: Any, out: Any, start: Any, stop: Any,
) -> Any:  # fmt: skip
    """Write sums over groups of tables of what the cells of the rows [start, stop) hold; return a bad row or -1.

    table: (L, R, C) numbers, scales: (L,), out: (N, G, C), G contiguous groups of L / G tables.
    """
    block = min(_BLOCK, stop - start)
    hidden = np.empty((block, shift.shape[0]), np.float32)
    values = np.empty((block, PANEL * max(first.shape[0], _width(panels, places))), np.float32)
    cells = np.empty(states.shape[0], np.uint64)
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        bad = _project(x, first, shift, panels, places, weights, limit, hidden[: end - begin], values, begin, end)
        if bad >= 0:
            return bad
        for i in range(end - begin):
            _hash_row(values[i], offsets, states, n_concat, n_cells, cells)
            add_cells(cells, table, scales, out[begin + i])
    return -1


@njit(nogil=True, cache=True, fastmath=REORDERED)
def add_cells(cells: Any, table: Any, scales: Any, out: Any) -> None:
    """Write the sums of one row's cells to ``out`` (G, C); cells: (L,) unsigned."""
    groups, outputs = out.shape
    each = table.shape[0] // groups
    # Sums stay in the precision of ``out``: beside an integer Numba would take float64.
    number = out.dtype.type
    for g in range(groups):
        if outputs == 1:
            total = number(0)
            for t in range(g * each, (g + 1) * each):
                total += number(scales[t]) * number(table[t, cells[t], 0])
            out[g, 0] = total
            continue
        out[g] = 0
        for t in range(g * each, (g + 1) * each):
            held, scale = table[t, cells[t]], number(scales[t])
            for c in range(outputs):
                out[g, c] += scale * number(held[c])


@njit(nogil=True, cache=True, fastmath=REORDERED)
def sum_codes(codes: Any, table: Any, scales: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the same sums for cells that are known, codes: (N, L) uint32; for families without vectors."""
    for i in range(start, stop):
        add_cells(codes[i], table, scales, out[i])


@njit(nogil=True, cache=True, fastmath=False)
def scatter(codes: Any, weights: Any, table: Any) -> None:
    """Add the weights (n, C) of n items to their cells; codes: (n, L), table: (L, R, C). In order of the items."""
    for i in range(codes.shape[0]):
        for t in range(codes.shape[1]):
            held = table[t, codes[i, t]]
            for c in range(held.shape[0]):
                held[c] += weights[i, c]


@njit(nogil=True, cache=True, fastmath=False)
def _width(panels: Any, places: Any) -> Any:
    """Return the panels that the projections of a row fill."""
    return max(panels.shape[0], (places.shape[0] + PANEL - 1) // PANEL)
