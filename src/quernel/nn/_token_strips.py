"""Sparse weights on rows of features: strips of 64 tokens are turned to channel-major, multiplied, and turned back.

x: (tokens, features), a token's features contiguous. The kernels of ``_spmm`` want the tokens of a feature contiguous,
so sixteen tokens times sixteen features are loaded at a time and transposed in registers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from quernel._intrinsics import I16, I64, LANES, Emitter, keyed
from quernel.nn._addresses import make_caller, pointer
from quernel.nn._spmm import ALL_LANES, CALL, LINE, ROW, STRIP, kept

# Bytes from one feature to the next in the turned strip.
STEP = 4 * STRIP


def room(inputs: int, outputs: int) -> int:
    """Return the bytes that a thread needs: the turned strips of ``x`` and of the result, whole blocks of each."""
    return (-(-inputs // LANES) + -(-outputs // LANES)) * LANES * STEP + LINE


@intrinsic
def _transpose(
    typing: Any, source: Any, source_step: Any, rows: Any, target: Any, target_step: Any, columns: Any
) -> Any:
    """Transpose ``rows`` x ``columns`` floats, at most 16 of each; nothing else is read or written."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_step, rows, target, target_step, columns = args
        e = Emitter(builder)

        def mask(count: Any) -> Any:
            return builder.trunc(builder.sub(builder.shl(I64(1), count), I64(1)), I16)

        def rows_of(address: Any, step: Any, count: Any, lanes: Any) -> list[tuple[Any, Any]]:
            """Return address and mask of sixteen rows; beyond the count nothing is left of the mask."""
            some = mask(lanes)
            there = [builder.icmp_signed("<", I64(r), count) for r in range(LANES)]
            places = [builder.add(address, builder.mul(step, I64(r))) for r in range(LANES)]
            return [(p, builder.select(t, some, I16(0))) for p, t in zip(places, there, strict=True)]

        vectors = [e.load_some(p, ROW, m) for p, m in rows_of(source, source_step, rows, columns)]
        for half in (8, 4, 2, 1):
            low = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
            high = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
            for r in (r for r in range(LANES) if not r & half):
                pair = vectors[r], vectors[r + half]
                vectors[r], vectors[r + half] = e.shuffle(*pair, low), e.shuffle(*pair, high)
        for vector, (place, some) in zip(vectors, rows_of(target, target_step, columns, rows), strict=True):
            e.store_some(vector, place, some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


_call_rows = make_caller(*[I64] * 11, returns=ir.VoidType())


@functools.cache
def strips() -> int:
    """Return the address of the C function over items for ``run_ranges``.

    Its fields are those of ``_spmm``, with tokens for pixels: ``x_channel`` and ``out_image`` are the bytes from one
    token to the next, ``out_channel`` is ``STEP``.
    """
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(keyed(_strips)))


def _strips(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Compute the items from ``start`` to ``stop``: a strip of tokens and a part of the rows each."""
    call = carray(pointer(table), (1,), CALL)[0]
    block, parts, tokens, inputs, values = call.block, call.row_parts, call.pixels, call.inputs, call.values
    groups = call.outputs // block
    stored = groups + call.outputs - groups * block
    shared = np.int64(carray(pointer(call.pointers), (stored + 1,), np.int32)[groups])
    singles, shift = values + 4 * (block - 1) * shared, groups * (block - 1)
    turned = (call.scratch + part * call.room + LINE - 1) // LINE * LINE
    result = turned + (inputs + LANES - 1) // LANES * LANES * STEP
    for item in range(start, stop):
        begin = tokens * (item // parts) // call.strips
        count = tokens * (item // parts + 1) // call.strips - begin
        x, y = call.x + begin * call.x_channel, call.out + begin * call.out_image
        for t in range(0, count, LANES):
            for k in range(0, inputs, LANES):
                place, target = x + t * call.x_channel + 4 * k, turned + k * STEP + 4 * t
                _transpose(place, call.x_channel, min(LANES, count - t), target, STEP, min(LANES, inputs - k))
        vectors = (count + LANES - 1) // LANES
        place = (vectors, ALL_LANES, turned, STEP, result, 0)
        first, last = stored * (item % parts) // parts, stored * (item % parts + 1) // parts
        if first < groups:
            _call_rows(call.rows, (table, first, min(last, groups), 0, values, *place))
        if groups < last:
            _call_rows(call.single_rows, (table, max(first, groups), last, shift, singles, *place))
        top, bottom = min(first, groups) * block + max(first - groups, 0), min(last, groups) * block
        bottom += max(last - groups, 0)
        for o in range(top, bottom, LANES):
            for t in range(0, count, LANES):
                place, target = result + o * STEP + 4 * t, y + t * call.out_image + 4 * o
                _transpose(place, STEP, min(LANES, bottom - o), target, call.out_image, min(LANES, count - t))
