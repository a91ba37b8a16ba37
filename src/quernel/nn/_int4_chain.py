"""A 4-bit layer at few tokens in one call without Python inside: quantise, multiply, dequantise.

The quantiser and dequantiser are those of the int8 layers; the ranges of rows start on torch's OpenMP team directly,
because a layer of 1024 x 1024 takes under 10 us and a step of Python 1 us.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types

from quernel._threads import native_team, num_threads, parallel_ranges, workspace
from quernel.nn._addresses import I32, I64, make_caller, pointer
from quernel.nn._int4_packing import CHUNK, PLANE, ROWS

# A thread gets at least this many bytes of codes: a team takes about 5 us to start, one core reads 100 bytes a ns.
GRAIN = 2**19
ALIGNMENT = 64

# What one call hands to its threads, all int64: functions of OpenMP, addresses of passes and operands, sizes.
FIELDS = (
    *("rank", "granted", "quantise", "product", "dequantise"),
    *("x", "inverse", "levels", "alpha", "codes", "constants", "zeros", "scale", "bias", "out"),
    *("n", "k", "m", "size", "group", "chunks", "blocks", "parts", "scratch"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
i8, i32, u8 = np.int8, np.int32, np.uint8

_quantise = make_caller(*[I64] * 8, returns=ir.VoidType())
_product = make_caller(*[I64] * 11, returns=ir.VoidType())
_dequantise = make_caller(*[I64] * 7, returns=ir.VoidType())
_parallel = make_caller(I64, I64, I32, I32, returns=ir.VoidType())
_ask = make_caller(I64)  # OpenMP's questions take no argument; one in a register does no harm


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
    parts = max(1, min(num_threads(), blocks * chunks * ROWS * PLANE // GRAIN))
    team = native_team() if parts > 1 else None
    start, rank, granted = team or (0, 0, 0)
    groups = chunks * CHUNK // (group or CHUNK * chunks)
    room = ALIGNMENT + n * (chunks * CHUNK + 4 + 4 * groups + 4 * ROWS * blocks) + 16
    scratch = workspace("int4_linear", room, torch.int8).data_ptr()
    fields = (rank, granted, *passes, *operands, n, k, m, size, group, chunks, blocks, parts, scratch)
    if parts == 1 or team is not None:
        _linear(start, _share().address if start else 0, fields)
        return
    record = np.array(fields)
    table = record.ctypes.data
    _begin(table)
    parallel_ranges(lambda first, last: _multiply(table, first, last), blocks, threads=parts)
    _end(table)


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


@njit(nogil=True, cache=True, fastmath=False)
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


@njit(nogil=True, cache=True, fastmath=False)
def _multiply(table: Any, start: Any, stop: Any) -> None:
    """Fill the sums of blocks ``start`` to ``stop`` of rows."""
    call = _call(table)
    codes, _, sums, x_sums, _ = _places(call)
    operands = (call.codes, codes, call.constants, call.zeros, x_sums, sums)
    _product(call.product, (*operands, call.chunks, call.n, call.blocks, start, stop))


@njit(nogil=True, cache=True, fastmath=False)
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
def _share() -> Any:
    """Return the C function that each thread of the team runs."""

    @cfunc(types.void(types.int64), cache=True, fastmath=False)
    def run(table: Any) -> None:
        call = _call(table)
        # The runtime may grant fewer threads than asked for (nested regions, limits).
        for part in range(_ask(call.rank, (0,)), call.parts, _ask(call.granted, (0,))):
            _multiply(table, call.blocks * part // call.parts, call.blocks * (part + 1) // call.parts)

    return run


@njit(nogil=True, cache=True, fastmath=False)
def _linear(parallel: Any, run: Any, fields: Any) -> None:
    """Run one layer on this thread, or its product by ``run`` on the team that ``parallel`` starts."""
    memory = np.array(fields)
    table = memory.ctypes.data
    _begin(table)
    call = _call(table)
    if parallel == 0:
        _multiply(table, 0, call.blocks)
    else:
        _parallel(parallel, (run, table, call.parts, 0))
    _end(table)
    memory[0] = 0  # the last use: Numba frees an array right after it
