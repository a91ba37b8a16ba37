"""Inner products of queries with many short vectors, and of each query only those above a bar.

Vectors lie in panels of 64, one coordinate after the other, so that sixteen products advance in one register without a
sum across lanes; four queries share what is read of a panel. Products are compared while they are in registers' reach
and never written out. Every sum runs over the coordinates in order: a product does not depend on what is beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I8, I16, I64, LANES, Emitter, keyed
from quernel.search._best_keys import key_of, largest_first, score_of

# Vectors of a panel: four registers.
PANEL = 4 * LANES
ROWS = 4
_ELEMENTS = {types.float32: (F32, 4), types.int8: (I8, 1), types.uint16: (I16, 2)}


def _make_panel(rows: int) -> Any:
    """Return ``panel(out, out_pitch, x, x_pitch, g, dim, panels)``: ``rows`` queries times one panel; pitches in bytes.

    ``panels`` only says by its type what stands at ``g``: float32, int8, or uint16 for the bits of float16.
    """

    @intrinsic
    def panel(typing: Any, out: Any, out_pitch: Any, x: Any, x_pitch: Any, g: Any, dim: Any, panels: Any) -> Any:
        element, size = _ELEMENTS[panels.dtype]

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, out_pitch, x, x_pitch, g, dim, _ = args
            e = Emitter(builder)
            sources = [builder.add(x, builder.mul(x_pitch, I64(r))) for r in range(rows)]

            def step(c: Any, *sums: Any) -> list[Any]:
                line = e.offset(g, c, size * PANEL)
                parts = [builder.add(line, I64(size * LANES * v)) for v in range(4)]
                columns = [e.floats(e.load(part, ir.VectorType(element, LANES))) for part in parts]
                totals = []
                for r, source in enumerate(sources):
                    value = e.splat(e.load(e.offset(source, c, 4), F32, align=4))
                    totals += [e.fma(value, column, sums[4 * r + v]) for v, column in enumerate(columns)]
                return totals

            sums = e.loop(dim, [e.zeros(ir.VectorType(F32, LANES))] * (4 * rows), step)
            for r in range(rows):
                place = builder.add(out, builder.mul(out_pitch, I64(r)))
                for v in range(4):
                    e.store(sums[4 * r + v], builder.add(place, I64(4 * LANES * v)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6, panels), emit

    return panel


@intrinsic
def _above(typing: Any, address: Any, bar: Any) -> Any:
    """Bit i is set where float i of the sixteen at an address is larger than ``bar``."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        row = e.load(args[0], ir.VectorType(F32, LANES))
        return builder.zext(builder.bitcast(builder.fcmp_ordered(">", row, e.splat(args[1])), I16), I64)

    return types.int64(types.int64, types.float32), emit


@intrinsic
def _lowest(typing: Any, mask: Any) -> Any:
    """Place of the lowest bit that is set; there must be one."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(BIT, 1))

    return types.int64(types.int64), emit


_four, _one = _make_panel(ROWS), _make_panel(1)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def scan_panels(
    queries: Any, panels: Any, step: Any, scales: Any, first: Any, alive: Any, k: Any, keys: Any, held: Any, bars: Any
) -> None:
    """Take the items of every ``step``-th panel into each query's list of keys, if their product is above its bar.

    queries: (n, m) float32; panels: (P, m, 64) of slots from ``first`` on; scales: (N,) factors of the items, or empty;
    alive: (N,); keys: (n, capacity) int64, of which ``held`` (n,) are filled; bars: (n,) float32. A list that is full
    keeps its ``k`` best and raises the bar.
    """
    n, dim = queries.shape
    size = panels.itemsize * PANEL * dim
    out = np.empty((ROWS, PANEL), np.float32)
    place, pitch, source = out.ctypes.data, 4 * PANEL, queries.ctypes.data
    for p in range(0, panels.shape[0], step):
        base = first + p * PANEL
        real = min(PANEL, alive.shape[0] - base)
        panel = panels.ctypes.data + p * size
        for i in range(0, n, ROWS):
            rows = min(ROWS, n - i)
            if rows == ROWS:
                _four(place, pitch, source + 4 * dim * i, 4 * dim, panel, dim, panels)
            else:
                for r in range(rows):
                    _one(place + r * pitch, 0, source + 4 * dim * (i + r), 0, panel, dim, panels)
            for r in range(rows):
                if scales.shape[0] > 0:
                    for j in range(real):
                        out[r, j] *= scales[base + j]
                _collect(out[r], base, real, alive, k, keys[i + r], held, bars, i + r)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def _collect(scores: Any, base: Any, real: Any, alive: Any, k: Any, keys: Any, held: Any, bars: Any, i: Any) -> None:
    bits = scores.view(np.int32)
    for start in range(0, real, LANES):
        mask = _above(scores.ctypes.data + 4 * start, bars[i])
        while mask != 0:
            j = start + _lowest(mask)
            mask &= mask - 1
            if j < real and alive[base + j]:
                # -0.0 equals 0.0 and must have its bits.
                keys[held[i]] = key_of(bits[j] if scores[j] != 0 else np.int32(0), base + j)
                held[i] += 1
        if held[i] > keys.shape[0] - LANES:
            largest_first(keys, held[i], k)
            held[i] = k
            bars[i] = score_of(keys[k - 1])


def _warmup() -> None:
    """Compile the scan for what panels may hold; ``quernel warmup`` calls it."""
    keys, held, bars = np.zeros((1, 2 + LANES), np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32)
    for dtype in (np.float32, np.int8, np.uint16):
        panels = np.zeros((1, 1, PANEL), dtype)
        scan_panels(np.zeros((1, 1), np.float32), panels, 1, bars[:0], 0, np.ones(1, bool), 1, keys, held, bars)
