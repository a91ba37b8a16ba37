"""Compiled passes over the tiles of a ``TileMap``: expand a rectangle of W, multiply by it, scatter into the array.

A run is a row of a tile: consecutive numbers of the array that are consecutive numbers of W, 16 of them at a time.
Their signs are 16 bits of a 64-bit hash and flip sign bits, so signs cost one masked instruction; starts and signs
are hashed as they are met and never stored. Maps without such runs (tiles stored by columns, given signs, tiles of
one number) take the ``*_any`` forms, number by number. ``constants`` are ``TileMap.operands()`` as int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I16, I32, I64, LANES, Emitter, keyed
from quernel.hashing.block_map import sign_word
from quernel.hashing.mixers import U64
from quernel.hashing.tile_map import start_of_tile

# Sums of products may be contracted to FMA; infinities and NaN are data.
_CONTRACT = {"contract"}
_ONE, _S6, _S63 = U64(1), U64(6), U64(63)


_WIDTHS = {F32: 32, ir.DoubleType(): 64}


def _words(kind: Any) -> Any:
    """Return the vector of integers as wide as one of integers or floats."""
    element = kind.element
    return ir.VectorType(element if isinstance(element, ir.IntType) else ir.IntType(_WIDTHS[element]), LANES)


def _flipped(builder: Any, value: Any, bits: Any) -> Any:
    """Return a vector of integers or floats with the sign bit of the lanes flipped whose bit of i16 is set."""
    words = _words(value.type)
    top = ir.Constant(words, [1 << (words.element.width - 1)] * LANES)
    flip = builder.select(builder.bitcast(bits, ir.VectorType(BIT, LANES)), top, ir.Constant(words, None))
    return builder.bitcast(builder.xor(builder.bitcast(value, words), flip), value.type)


def _over_run(e: Emitter, width: Any, flags: Any, place: Any, carried: Any, step: Any, finish: Any) -> None:
    """Emit a loop over a run, 16 numbers at a time, and a masked step for what is left.

    ``step(index, bits, load, store, carried)`` returns what it carries on; index is that of the first number, bits are
    the 16 sign bits from bit ``place`` of the memory at ``flags`` on. ``finish(carried)`` comes before the masked step,
    to which it gives what is carried. Addresses, because an array that is handed from one jitted function to another
    is counted up and down, for every run.
    """
    builder = e.builder

    def bits_at(index: Any) -> Any:
        # Four bytes hold 16 bits from any bit of the first on: bytes are little-endian on all that is compiled for.
        first = builder.add(place, index)
        held = e.load(builder.add(flags, builder.lshr(first, I64(3))), I32)
        return builder.trunc(builder.lshr(held, builder.trunc(builder.and_(first, I64(7)), I32)), I16)

    def whole(block: Any, *held: Any) -> Any:
        index = builder.shl(block, I64(4))
        return step(index, bits_at(index), e.load, e.store, held)

    blocks = builder.lshr(width, I64(4))
    held = finish(e.loop(blocks, carried, whole))
    index = builder.shl(blocks, I64(4))
    rest = builder.sub(width, index)
    with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
        mask = builder.trunc(builder.sub(builder.shl(I64(1), rest), I64(1)), I16)

        def load(address: Any, kind: Any) -> Any:
            return builder.bitcast(e.load_some(address, _words(kind), mask), kind)

        def store(value: Any, address: Any) -> None:
            e.store_some(builder.bitcast(value, _words(value.type)), address, mask)

        finish(step(index, bits_at(index), load, store, held))


def _make_move(adds: bool) -> Any:
    """Return ``move(target, source, flags, place, width, like)``: a run with signs, copied or added to the target.

    Addresses of runs of ``width`` numbers of the dtype of the array ``like``; signs as in ``_over_run``.
    """

    @intrinsic
    def move(typing: Any, target: Any, source: Any, flags: Any, place: Any, width: Any, like: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, source, flags, place, width, _ = args
            e = Emitter(builder)
            kind = ir.VectorType(context.get_data_type(signature.args[5].dtype), LANES)
            size = _words(kind).element.width // 8

            def step(index: Any, bits: Any, load: Any, store: Any, carried: Any) -> Any:
                value = _flipped(builder, load(e.offset(source, index, size), kind), bits)
                there = e.offset(target, index, size)
                store(builder.fadd(load(there, kind), value) if adds else value, there)
                return []

            _over_run(e, width, flags, place, [], step, lambda carried: [])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, like), emit

    return move


_copy, _add = _make_move(adds=False), _make_move(adds=True)


@intrinsic
def _multiply_add(typing: Any, sums: Any, source: Any, x: Any, flags: Any, place: Any, width: Any) -> Any:
    """Add the products of a run with signs and of ``x`` to the 16 sums at an aligned address, all float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, source, x, flags, place, width = args
        e, kind = Emitter(builder), ir.VectorType(F32, LANES)

        def step(index: Any, bits: Any, load: Any, store: Any, carried: Any) -> Any:
            value = _flipped(builder, load(e.offset(source, index, 4), kind), bits)
            return [e.fma(value, load(e.offset(x, index, 4), kind), carried[0])]

        def finish(carried: Any) -> Any:
            e.store(carried[0], sums)
            return carried

        _over_run(e, width, flags, place, [e.load(sums, kind)], step, finish)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


@njit(nogil=True, cache=True, fastmath=False)
def start_at(constants: Any, starts: Any, a: Any, b: Any) -> Any:
    """Return where tile (a, b) begins, from the hash or from given starts (an empty array where there are none)."""
    if starts.size > 0:
        return starts[a, b]
    n_starts = U64(constants[0] - constants[3] * constants[4] + 1)
    return np.int64(start_of_tile(U64(constants[5]), n_starts, U64(a), U64(b)))


@njit(nogil=True, cache=True, fastmath=False)
def _room_for_signs(constants: Any) -> Any:
    """Return memory for the sign words of a tile, and of the one behind them."""
    return np.empty(constants[3] * constants[4] // 64 + 3, np.uint64)


@njit(nogil=True, cache=True, fastmath=False)
def _hash_signs(constants: Any, position: Any, count: Any, words: Any) -> Any:
    """Fill ``words`` with the signs of ``count`` positions; return the place of the first in the first word."""
    start, state = U64(position), U64(constants[5])
    n = (count + 63) // 64 + 1
    if constants[6] == 0:
        words[:n] = U64(0)
    else:
        # A loop of its own: it is vectorised.
        for w in range(n):
            words[w] = sign_word(state, start + (U64(w) << _S6))
    return np.int64(start & _S63)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def expand(constants: Any, starts: Any, memory: Any, out: Any, n0: Any, k0: Any) -> None:
    """Fill ``out`` with the rectangle of W that begins at row n0 and column k0, a multiple of T_k.

    memory: (m,) integers of the width of its numbers; out: (rows, columns) of the same, contiguous.
    """
    n1, k1, columns = n0 + out.shape[0], k0 + out.shape[1], out.shape[1]
    high, wide, item = constants[3], constants[4], memory.itemsize
    # As int64: beside one, the unsigned address would turn into a float.
    base, filled = np.int64(memory.ctypes.data), np.int64(out.ctypes.data)
    per_row, words = (constants[2] + wide - 1) // wide, _room_for_signs(constants)
    flags = np.int64(words.ctypes.data)
    for a in range(n0 // high, (n1 + high - 1) // high):
        first, last = max(n0 - a * high, 0), min(n1 - a * high, high)
        for b in range(k0 // wide, (k1 + wide - 1) // wide):
            source = base + item * start_at(constants, starts, a, b)
            tile = (a * per_row + b) * high * wide
            width = min(wide, k1 - b * wide)
            shift = _hash_signs(constants, tile + first * wide, (last - first) * wide, words)
            for i in range(first, last):
                target = filled + item * ((a * high + i - n0) * columns + b * wide - k0)
                _copy(target, source + item * i * wide, flags, shift + (i - first) * wide, width, memory)
    words[0] = 0  # the last use: Numba frees an array right after it


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def scatter(constants: Any, starts: Any, source: Any, total: Any, n0: Any, k0: Any, lowest: Any, highest: Any) -> None:
    """Add a rectangle of the gradient of W to the slots [lowest, highest) of the gradient of the array, with signs.

    source: (rows, columns) and total: (m,), both of one floating dtype; n0 and k0 as in ``expand``.
    """
    n1, k1, columns = n0 + source.shape[0], k0 + source.shape[1], source.shape[1]
    high, wide, item = constants[3], constants[4], total.itemsize
    base, given = np.int64(total.ctypes.data), np.int64(source.ctypes.data)
    per_row, words = (constants[2] + wide - 1) // wide, _room_for_signs(constants)
    flags = np.int64(words.ctypes.data)
    for a in range(n0 // high, (n1 + high - 1) // high):
        first, last = max(n0 - a * high, 0), min(n1 - a * high, high)
        for b in range(k0 // wide, (k1 + wide - 1) // wide):
            start = start_at(constants, starts, a, b)
            if start + last * wide <= lowest or start + first * wide >= highest:
                continue
            tile = (a * per_row + b) * high * wide
            width = min(wide, k1 - b * wide)
            shift = _hash_signs(constants, tile + first * wide, (last - first) * wide, words)
            target = base + item * start
            place = given + item * ((a * high - n0) * columns + b * wide - k0)
            if start + first * wide >= lowest and start + last * wide <= highest:
                for i in range(first, last):
                    _add(
                        target + item * i * wide,
                        place + item * i * columns,
                        flags,
                        shift + (i - first) * wide,
                        width,
                        total,
                    )
                continue
            for i in range(first, last):
                # A run may begin before these slots, or end behind them.
                skip, stop = max(lowest - start - i * wide, 0), min(highest - start - i * wide, width)
                if skip < stop:
                    there, here = target + item * (i * wide + skip), place + item * (i * columns + skip)
                    _add(there, here, flags, shift + (i - first) * wide + skip, stop - skip, total)
    words[0] = 0  # the last use: Numba frees an array right after it


@njit(nogil=True, cache=True, fastmath=_CONTRACT)
@keyed
def multiply(constants: Any, starts: Any, memory: Any, x: Any, out: Any, scale: Any, first: Any, last: Any) -> None:
    """``out[:, n] = scale * W[n] . x`` for the rows n of tiles ``first`` to ``last``, without forming W.

    memory: (m,), x: (rows, in), out: (rows, out), all float32 and contiguous; few rows of x.
    """
    high, wide, rows, inputs = constants[3], constants[4], x.shape[0], constants[2]
    per_row, words = (inputs + wide - 1) // wide, _room_for_signs(constants)
    flags = np.int64(words.ctypes.data)
    # Sixteen partial sums for every row of a tile and of x; a line of a cache each.
    held = np.empty((high * rows + 1) * LANES, np.float32)
    skip = (-(np.int64(held.ctypes.data) // 4)) % LANES
    sums, base, given = np.int64(held.ctypes.data) + 4 * skip, np.int64(memory.ctypes.data), np.int64(x.ctypes.data)
    for a in range(first, last):
        height = min(high, constants[1] - a * high)
        held[:] = np.float32(0)
        for b in range(per_row):
            source = base + 4 * start_at(constants, starts, a, b)
            tile = (a * per_row + b) * high * wide
            width = min(wide, inputs - b * wide)
            shift = _hash_signs(constants, tile, height * wide, words)
            for i in range(height):
                for r in range(rows):
                    target, place = sums + 4 * LANES * (i * rows + r), given + 4 * (r * inputs + b * wide)
                    _multiply_add(target, source + 4 * i * wide, place, flags, shift + i * wide, width)
        for i in range(height):
            for r in range(rows):
                total = np.float32(0)
                for lane in range(LANES):
                    total += held[skip + LANES * (i * rows + r) + lane]
                out[r, a * high + i] = scale * total
    words[0] = 0  # the last use: Numba frees an array right after it


@njit(nogil=True, cache=True, fastmath=False)
def _place(constants: Any, starts: Any, flips: Any, n: Any, k: Any) -> Any:
    """Return slot and sign bit of one number of W; ``flips`` holds given signs, or is empty."""
    high, wide = constants[3], constants[4]
    a, b = n // high, k // wide
    i, j = n - a * high, k - b * wide
    place = j * high + i if constants[7] else i * wide + j
    slot = start_at(constants, starts, a, b) + place
    if flips.size > 0:
        return slot, flips[n, k] < 0
    if constants[6] == 0:
        return slot, False
    t = U64((a * ((constants[2] + wide - 1) // wide) + b) * high * wide + place)
    return slot, (sign_word(U64(constants[5]), t) >> (t & _S63)) & _ONE != U64(0)


@njit(nogil=True, cache=True, fastmath=False)
def expand_any(constants: Any, starts: Any, flips: Any, memory: Any, out: Any, n0: Any, k0: Any, top: Any) -> None:
    """``expand`` for any map; ``top`` is the sign bit as an array of one of the dtype of ``memory``."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            slot, negative = _place(constants, starts, flips, n0 + row, k0 + column)
            out[row, column] = memory[slot] ^ top[0] if negative else memory[slot]


@njit(nogil=True, cache=True, fastmath=False)
def scatter_any(constants: Any, starts: Any, flips: Any, source: Any, total: Any, n0: Any, k0: Any) -> None:
    """``scatter`` for any map."""
    for row in range(source.shape[0]):
        for column in range(source.shape[1]):
            slot, negative = _place(constants, starts, flips, n0 + row, k0 + column)
            total[slot] += -source[row, column] if negative else source[row, column]


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def expand_rows(
    constants: Any, starts: Any, flips: Any, memory: Any, ids: Any, out: Any, top: Any, has_runs: Any
) -> None:
    """Fill the rows of ``out`` with the rows ``ids`` of W."""
    for i in range(len(ids)):
        if has_runs:
            expand(constants, starts, memory, out[i : i + 1], ids[i], 0)
        else:
            expand_any(constants, starts, flips, memory, out[i : i + 1], ids[i], 0, top)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def scatter_rows(constants: Any, starts: Any, flips: Any, source: Any, ids: Any, total: Any, has_runs: Any) -> None:
    """Add gradients of the rows ``ids`` of W to the gradient of the array."""
    for i in range(len(ids)):
        if has_runs:
            scatter(constants, starts, source[i : i + 1], total, ids[i], 0, 0, total.size)
        else:
            scatter_any(constants, starts, flips, source[i : i + 1], total, ids[i], 0)
