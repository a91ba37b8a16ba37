"""Compiled kernels of 4-bit weights: products of packed codes with int8 activations, and their expansion to int8.

Two decoders share the loop.  Affine (groups of inputs with an integer scale s and zero point z, DGQ):

    Z[o] = sum_G s[o,G] (sum_{k in G} q[o,k] x[k])  -  sum_G s[o,G] z[o,G] (sum_{k in G} x[k])

Table (code -> byte, shift codes): Z[o] = sum_k (T[q] - min T) x[k] + min T sum_k x[k].  Both inner sums are unsigned
times signed bytes, the operand order of ``vpdpbusd``.  All sums are int32 and exact modulo 2^32, so the vector path,
the portable one and any number of threads give the same integers.

Everything takes int64 addresses of contiguous memory; ``x`` has rows of ``chunks * 128`` bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import I8, I16, I32, I64, LANES, Emitter, keyed, portable
from quernel.nn._addresses import pointer
from quernel.nn._int4_packing import CHUNK, PLANE, ROWS

i8, i16, i32, u8 = np.int8, np.int16, np.int32, np.uint8

# Tokens that share one load of the weight: ROWS * TOKENS sums and the unpacked operands fill the 32 registers.
TOKENS = 4
# Blocks of rows that all tokens pass before the next ones: their codes stay in L2, the tokens at hand in L1.
TILE = 16
OCTETS, WORDS = ir.VectorType(I8, 4 * LANES), ir.VectorType(I32, LANES)


@intrinsic(prefer_literal=True)
def _block(
    typing: Any,
    group: Any,
    tokens: Any,
    plain: Any,
    codes: Any,
    x: Any,
    constants: Any,
    stride: Any,
    sums: Any,
    step: Any,
    chunks: Any,
) -> Any:
    """Multiply ROWS rows with ``tokens`` tokens; group, tokens and plain (the portable form) are known while compiling.

    ``group`` is the group size of the affine form, and ``constants`` are the int8 scales of the rows, ``stride`` bytes
    apart.  0 is the table form, and ``constants`` are its 16 bytes.  ``sums``
    (int32) are ``step`` bytes apart by token.
    """
    group_size, n, portable = (literal.literal_value for literal in (group, tokens, plain))

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, x, constants, stride, sums, step, chunks = args[3:]
        e = Emitter(builder, bool(portable))
        row_bytes = builder.mul(chunks, I64(CHUNK))
        table = None
        if not group_size:
            once = e.load(constants, ir.VectorType(I8, 16))
            table = builder.shuffle_vector(once, once, _lanes([i % 16 for i in range(64)]))

        def chunk(index: Any, *totals: Any) -> list[Any]:
            inputs = []
            for token in range(n):
                place = builder.add(e.offset(x, index, CHUNK), builder.mul(row_bytes, I64(token)))
                inputs.append([e.load(builder.add(place, I64(half * PLANE)), OCTETS) for half in range(2)])
            following = list(totals)
            for row in range(ROWS):
                place = builder.add(e.offset(codes, index, ROWS * PLANE), I64(row * PLANE))
                halves = _nibbles(e, e.load(place, ir.VectorType(I16, 2 * LANES)))
                factors = None
                if table is None:
                    scales = builder.add(constants, builder.mul(stride, I64(row)))
                    factors = _scales(e, e.offset(scales, index, CHUNK // group_size), group_size)
                else:
                    halves = [e.lookup16(table, half) for half in halves]
                for token, x_halves in enumerate(inputs):
                    total = row * n + token
                    following[total] = _accumulate(e, following[total], halves, x_halves, factors)
            return following

        totals = e.loop(chunks, [e.zeros(WORDS)] * (ROWS * n), chunk)
        for row in range(ROWS):
            for token in range(n):
                place = builder.add(builder.add(sums, builder.mul(step, I64(token))), I64(4 * row))
                e.store(e.reduce_add(totals[row * n + token]), place)
        return context.get_dummy_value()

    return types.void(group, tokens, plain, *[types.int64] * 7), emit


def _lanes(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(I32, len(places)), places)


def _nibbles(e: Emitter, pairs: Any) -> list[Any]:
    """Return the low and the high nibbles of 64 bytes, loaded as 32 x i16 because bytes cannot be shifted."""
    mask = ir.Constant(pairs.type, [0x0F0F] * 32)
    high = e.builder.lshr(pairs, ir.Constant(pairs.type, [4] * 32))
    return [e.builder.bitcast(e.builder.and_(part, mask), OCTETS) for part in (pairs, high)]


def _scales(e: Emitter, address: Any, group: int) -> list[Any]:
    """Return one vector of scales for both halves of a chunk, or one each, as 16 x i32."""
    count = CHUNK // group
    if count == 1:
        return [e.splat(e.builder.sext(e.load(address, I8), I32))]
    wide = e.builder.sext(e.load(address, ir.VectorType(I8, count)), ir.VectorType(I32, count))
    # A lane of a product holds four inputs, so half a chunk of 64 has count / 2 groups of group / 4 lanes.
    return [
        e.builder.shuffle_vector(wide, wide, _lanes([half * count // 2 + 4 * lane // group for lane in range(LANES)]))
        for half in range(2)
    ]


def _accumulate(e: Emitter, total: Any, halves: list[Any], x_halves: list[Any], factors: list[Any] | None) -> Any:
    if factors is None:
        for codes, x in zip(halves, x_halves, strict=True):
            total = e.dot4_u8s8(total, codes, x)
        return total
    products, zero = [], e.zeros(WORDS)
    if len(factors) == 1:
        products = [e.dot4_u8s8(e.dot4_u8s8(zero, halves[0], x_halves[0]), halves[1], x_halves[1])]
    else:
        products = [e.dot4_u8s8(zero, codes, x) for codes, x in zip(halves, x_halves, strict=True)]
    for product, factor in zip(products, factors, strict=True):
        total = e.builder.add(total, e.builder.mul(product, factor))
    return total


@functools.cache
def product(group: int, plain: bool | None = None) -> Any:
    """Return the C function of one decoder: ``group`` inputs share a scale, or 0 for a table.

    ``(codes, x, constants, zeros, x_sums, sums, chunks, n, blocks, start, stop)``, all int64, writes the int32 sums
    of rows ``4 * start`` to ``4 * stop``, for ``n`` tokens whose sums lie ``16 * blocks`` bytes apart.

    Affine: ``constants`` int8 and ``zeros`` uint8, shape (rows, groups), are scales and zero points; ``x_sums``
    int32 (n, groups).  Table: ``constants`` are the 16 bytes less their minimum, the number ``zeros``; ``x_sums`` (n,).
    """
    form = int(portable() if plain is None else plain)

    @cfunc(types.void(*[types.int64] * 11), cache=True, fastmath=False)
    @keyed
    def run(
        codes: Any,
        x: Any,
        constants: Any,
        zeros: Any,
        x_sums: Any,
        sums: Any,
        chunks: Any,
        n: Any,
        blocks: Any,
        start: Any,
        stop: Any,
    ) -> None:
        groups = chunks * CHUNK // group if group else 0
        size, step, row_bytes = chunks * ROWS * PLANE, 4 * ROWS * blocks, chunks * CHUNK
        for first in range(start, stop, TILE):
            token = 0
            while token < n:
                place, some = x + token * row_bytes, token + TOKENS <= n
                for block in range(first, min(first + TILE, stop)):
                    weight, scales = codes + block * size, constants + block * ROWS * groups
                    out = sums + block * ROWS * 4 + token * step
                    if some:
                        _block(group, TOKENS, form, weight, place, scales, groups, out, step, chunks)
                    else:
                        _block(group, 1, form, weight, place, scales, groups, out, step, chunks)
                token += TOKENS if some else 1
        for block in range(start, stop):
            if group:
                _subtract_zeros(block, constants, zeros, x_sums, sums, groups, n, blocks)
            else:
                _add_minimum(block, zeros, x_sums, sums, n, blocks)

    return run


@njit(nogil=True, cache=True, fastmath=False)
def _subtract_zeros(
    block: Any, scales: Any, zeros: Any, x_sums: Any, sums: Any, groups: Any, n: Any, blocks: Any
) -> None:
    """Subtract ``sum_G s z (sum of x over the group)`` from the sums of one block."""
    first = block * ROWS
    s = carray(pointer(scales + first * groups), (ROWS, groups), i8)
    z = carray(pointer(zeros + first * groups), (ROWS, groups), u8)
    total, out = carray(pointer(x_sums), (n, groups), i32), carray(pointer(sums), (n, blocks * ROWS), i32)
    for token in range(n):
        for row in range(ROWS):
            offset = i32(0)
            for g in range(groups):
                # 127 * 15 fits 16 bits, which the vectoriser uses.
                offset += i32(i16(s[row, g]) * i16(z[row, g])) * total[token, g]
            out[token, first + row] -= offset


@njit(nogil=True, cache=True, fastmath=False)
def _add_minimum(block: Any, minimum: Any, x_sums: Any, sums: Any, n: Any, blocks: Any) -> None:
    """Add ``min T (sum of x)`` to the sums of one block."""
    total, out = carray(pointer(x_sums), (n,), i32), carray(pointer(sums), (n, blocks * ROWS), i32)
    for token in range(n):
        for row in range(block * ROWS, (block + 1) * ROWS):
            out[token, row] += i32(minimum) * total[token]


@intrinsic(prefer_literal=True)
def _expand_chunk(
    typing: Any, group: Any, plain: Any, codes: Any, constants: Any, zeros: Any, low: Any, high: Any
) -> Any:
    """Decode the 64 bytes at ``codes`` into 64 int8 at ``low`` and 64 at ``high``."""
    group_size, portable = group.literal_value, plain.literal_value

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, constants, zeros, low, high = args[2:]
        e = Emitter(builder, bool(portable))
        sixteen = ir.VectorType(I8, 16)
        tables = []
        if group_size:
            # The 16 values that a group can take make a table too.
            levels = ir.Constant(sixteen, list(range(16)))
            for g in range(CHUNK // group_size):
                zero, scale = (e.splat(e.load(builder.add(part, I64(g)), I8)) for part in (zeros, constants))
                tables.append(builder.mul(builder.sub(levels, zero), scale))
        else:
            tables.append(e.load(constants, sixteen))
        halves = _nibbles(e, e.load(codes, ir.VectorType(I16, 2 * LANES)))
        for half, (part, place) in enumerate(zip(halves, (low, high), strict=True)):
            # 64 bytes are four lanes of 16, each with the table of its group.
            mine = [tables[(half * 4 + lane) * len(tables) // 8] for lane in range(4)]
            pairs = [builder.shuffle_vector(a, b, _lanes(list(range(32)))) for a, b in (mine[:2], mine[2:])]
            e.store(e.lookup16(builder.shuffle_vector(*pairs, _lanes(list(range(64)))), part), place)
        return context.get_dummy_value()

    return types.void(group, plain, *[types.int64] * 5), emit


@functools.cache
def expand(group: int, plain: bool | None = None) -> Any:
    """Return the jitted ``(codes, constants, zeros, out, m, k, start, stop)``: blocks of rows to int8.

    Rows ``4 * start`` to ``4 * stop`` of ``out``, shape (m, k), are written; constants and zeros as for ``product``,
    but a table as it is.
    """
    form = int(portable() if plain is None else plain)

    @njit(nogil=True, cache=True, fastmath=False)
    @keyed
    def run(codes: Any, constants: Any, zeros: Any, out: Any, m: Any, k: Any, start: Any, stop: Any) -> None:
        weight = carray(pointer(out), (m, k), i8)
        chunks = (k + CHUNK - 1) // CHUNK
        step = CHUNK // group if group else 0
        last = np.empty(CHUNK, i8)
        tail = last.ctypes.data
        for row in range(start * ROWS, min(stop * ROWS, m)):
            source = codes + ((row // ROWS) * chunks * ROWS + row % ROWS) * PLANE
            for chunk in range(chunks):
                place, fits = out + row * k + chunk * CHUNK, (chunk + 1) * CHUNK <= k
                goal = place if fits else tail
                moved = (row * chunks + chunk) * step
                here = source + chunk * ROWS * PLANE
                _expand_chunk(group, form, here, constants + moved, zeros + moved, goal, goal + PLANE)
                if not fits:
                    weight[row, chunk * CHUNK :] = last[: k - chunk * CHUNK]

    return run
