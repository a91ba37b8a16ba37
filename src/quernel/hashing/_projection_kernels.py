"""Many projections of a few rows: ``out[i, p] = sum_k x[i, k] g[k, p]``, the same bits for a row in any company.

A BLAS product sums in an order that depends on how many rows it gets, so a hash of a row could change with the rows
beside it. Here every sum runs over k in order, one fused multiply-add at a time: 64 projections (four vectors) of up
to four rows stay in registers while k advances, which reads a panel of g once for four rows. float32 throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I64, LANES, Emitter, keyed

# Projections of a panel: four vectors.
PANEL = 4 * LANES
ROWS = 4


def _make_panel(rows: int) -> Any:
    """Return ``panel(out, out_pitch, x, x_pitch, g, dim)``: one panel of ``rows`` rows; pitches in bytes."""
    vector = ir.VectorType(F32, LANES)

    @intrinsic
    def panel(typing: Any, out: Any, out_pitch: Any, x: Any, x_pitch: Any, g: Any, dim: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, out_pitch, x, x_pitch, g, dim = args
            e = Emitter(builder)
            sources = [builder.add(x, builder.mul(x_pitch, I64(r))) for r in range(rows)]

            def step(k: Any, *sums: Any) -> list[Any]:
                line = e.offset(g, k, 4 * PANEL)
                columns = [e.load(builder.add(line, I64(64 * c)), vector) for c in range(4)]
                totals = []
                for r, source in enumerate(sources):
                    value = e.splat(e.load(e.offset(source, k, 4), F32, align=4))
                    totals += [e.fma(value, columns[c], sums[4 * r + c]) for c in range(4)]
                return totals

            sums = e.loop(dim, [e.zeros(vector)] * (4 * rows), step)
            for r in range(rows):
                place = builder.add(out, builder.mul(out_pitch, I64(r)))
                for c in range(4):
                    e.store(sums[4 * r + c], builder.add(place, I64(64 * c)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), emit

    return panel


_four, _one = _make_panel(ROWS), _make_panel(1)


def as_panels(directions: np.ndarray) -> np.ndarray:
    """Return directions, shape (n, dim), as float32 panels (ceil(n / 64), dim, 64), zeros behind the last one."""
    n, dim = directions.shape
    count = -(-n // PANEL)
    wide = np.zeros((count * PANEL, dim), np.float32)
    wide[:n] = directions
    return np.ascontiguousarray(wide.reshape(count, PANEL, dim).transpose(0, 2, 1))


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def project_rows(x: Any, panels: Any, out: Any, start: Any, stop: Any) -> None:
    """Write projections of the rows of ``x`` in [start, stop) to the first rows of ``out``.

    x: (n, dim), panels: (P, dim, 64), out: (>= stop - start, 64 P); all float32 and contiguous.
    """
    dim, width = x.shape[1], out.shape[1]
    x_pitch, out_pitch, size = 4 * dim, 4 * width, 4 * PANEL
    x_base, out_base, g_base = x.ctypes.data + start * x_pitch, out.ctypes.data, panels.ctypes.data
    n = stop - start
    for i in range(0, n - n % 4, 4):
        for p in range(panels.shape[0]):
            place = out_base + i * out_pitch + p * size
            _four(place, out_pitch, x_base + i * x_pitch, x_pitch, g_base + p * dim * size, dim)
    for i in range(n - n % 4, n):
        for p in range(panels.shape[0]):
            place = out_base + i * out_pitch + p * size
            _one(place, out_pitch, x_base + i * x_pitch, x_pitch, g_base + p * dim * size, dim)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def project_row(x: Any, panels: Any, out: Any) -> None:
    """Write the projections of one row ``x`` (dim,) to ``out`` (64 P,)."""
    dim = x.shape[0]
    for p in range(panels.shape[0]):
        _one(out.ctypes.data + p * 4 * PANEL, 0, x.ctypes.data, 0, panels.ctypes.data + p * dim * 4 * PANEL, dim)
