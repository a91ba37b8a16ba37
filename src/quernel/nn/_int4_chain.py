"""A 4-bit layer at few tokens in one call without Python inside: quantise, multiply, dequantise.

The quantiser and dequantiser are those of the int8 layers. A layer of 1024 x 1024 takes under 10 us and a step of
Python 1 us.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types

from quernel._threads import workspace
from quernel.nn._addresses import I64, make_caller, pointer
from quernel.nn._int4_packing import CHUNK, PLANE, ROWS
from quernel.nn._native_ranges import parts_for, run_ranges

# A thread gets at least this many bytes of codes: a team takes about 5 us to start, one core reads 100 bytes a ns.
GRAIN = 2**19
ALIGNMENT = 64

# What one call hands to its threads, all int64: addresses of passes and operands, sizes.
FIELDS = (
    *("quantise", "product", "dequantise"),
    *("x", "inverse", "levels", "alpha", "codes", "constants", "zeros", "scale", "bias", "out"),
    *("n", "k", "m", "size", "group", "chunks", "blocks", "scratch"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
i8, i32, u8 = np.int8, np.int32, np.uint8

_quantise = make_caller(*[I64] * 8, returns=ir.VoidType())
_product = make_caller(*[I64] * 11, returns=ir.VoidType())
_dequantise = make_caller(*[I64] * 7, returns=ir.VoidType())


def apply(passes: tuple[int, int, int], operands: tuple[int, ...], sizes: tuple[int, int, int, int, int]) -> None:
    """Run a layer.

    Parameters
    ----------
    passes : (quantise, product, dequantise)
        Addresses of the compiled passes.
    operands : (x, inverse, levels, alpha, codes, constants, zeros, scale, bias, out)
        Addresses of contiguous memory, but for the number ``levels`` and the bits of the double ``alpha``.
        ``constants`` are group scales with their ``zeros``, or the table.
    sizes : (n, k, m, size, group)
        Tokens, inputs, outputs, bytes of an element of ``x`` and ``out``, inputs a group or 0 for a table.
    """
    n, k, m, size, group = sizes
    chunks, blocks = -(-k // CHUNK), -(-m // ROWS)
    groups = chunks * CHUNK // group if group else 1
    room = ALIGNMENT + n * (chunks * CHUNK + 4 + 4 * groups + 4 * ROWS * blocks) + 16
    scratch = workspace("int4_linear", room, torch.int8).data_ptr()
    fields = (*passes, *operands, n, k, m, size, group, chunks, blocks, scratch)
    before, work, after = _steps()
    parts = parts_for(blocks, blocks * chunks * ROWS * PLANE, GRAIN)
    run_ranges(work, fields, blocks, parts, before=before, after=after)


@njit(nogil=True, cache=True, fastmath=False)
def _call(table: Any) -> Any:
    return carray(pointer(table), (1,), CALL)[0]


@njit(nogil=True, cache=True, fastmath=False)
def _places(call: Any) -> Any:
    """Return the addresses of the quantised tokens, their steps, the products, the sums by group, the table."""
    codes = (call.scratch + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    steps = codes + call.n * call.chunks * CHUNK
    sums = steps + 4 * call.n
    x_sums = sums + 4 * call.n * ROWS * call.blocks
    return codes, steps, sums, x_sums, x_sums + 4 * call.n * _groups(call)


@njit(nogil=True, cache=True, fastmath=False)
def _groups(call: Any) -> Any:
    return call.chunks * CHUNK // call.group if call.group else 1


def _begin(table: Any) -> None:
    """Quantise the tokens, sum them by group, and shift a table to unsigned bytes."""
    call = _call(table)
    codes, steps, _, x_sums, shifted = _places(call)
    width, groups = call.chunks * CHUNK, _groups(call)
    if call.k == width:
        _quantise(call.quantise, (call.x, call.inverse, call.levels, call.alpha, codes, steps, call.n, call.k))
    else:
        carray(pointer(codes), (call.n * width,), i8)[:] = 0
        for token in range(call.n):
            x, row = call.x + token * call.k * call.size, codes + token * width
            _quantise(call.quantise, (x, call.inverse, call.levels, call.alpha, row, steps + 4 * token, 1, call.k))
    x8, totals = carray(pointer(codes), (call.n, width), i8), carray(pointer(x_sums), (call.n, groups), i32)
    span = width // groups
    for token in range(call.n):
        for g in range(groups):
            total = i32(0)
            for k in range(g * span, (g + 1) * span):
                total += i32(x8[token, k])
            totals[token, g] = total
    if call.group == 0:
        values, unsigned = carray(pointer(call.constants), (16,), i8), carray(pointer(shifted), (16,), u8)
        call.zeros = values.min()
        for i in range(16):
            unsigned[i] = u8(i32(values[i]) - i32(call.zeros))
        call.constants = shifted


def _multiply(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Fill the sums of blocks ``start`` to ``stop`` of rows."""
    call = _call(table)
    codes, _, sums, x_sums, _ = _places(call)
    operands = (call.codes, codes, call.constants, call.zeros, x_sums, sums)
    _product(call.product, (*operands, call.chunks, call.n, call.blocks, start, stop))


def _end(table: Any) -> None:
    """Scale, shift and activate the sums; their rows are padded to whole blocks."""
    call = _call(table)
    _, steps, sums, _, _ = _places(call)
    height = call.blocks * ROWS
    rows, at_once = (1, call.n) if height == call.m else (call.n, 1)
    for row in range(rows):
        out = call.out + row * call.m * call.size
        operands = (sums + 4 * row * height, steps + 4 * row, call.scale, call.bias, out)
        _dequantise(call.dequantise, (*operands, at_once, call.m))


@functools.cache
def _compiled() -> tuple[Any, Any, Any]:
    around, ranges = types.void(types.int64), types.void(*[types.int64] * 4)
    steps = ((around, _begin), (ranges, _multiply), (around, _end))
    begin, multiply, end = (cfunc(kind, cache=True, fastmath=False)(step) for kind, step in steps)
    return begin, multiply, end


def _steps() -> tuple[int, int, int]:
    """Return the addresses of what runs before, over the ranges of rows, and after."""
    begin, multiply, end = _compiled()
    return begin.address, multiply.address, end.address
