"""Compiled kernels of bitmap rows: packing, unpacking, products with queries, attention, and copies out of a pool.

Rows lie in parts: pages of packed rows, and the dense rows of the newest tokens.  ``attend`` works on items (head, run
of parts) and keeps the softmax's maximum and sum of each, so that items, packed or dense, are joined exactly
afterwards, in the same way for any number of threads.  Blocks of ``BLOCK`` rows pass at a time: their logits, then
their weights, then their values.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, njit

from quernel._intrinsics import keyed_with
from quernel.cache import _bitmap_intrinsics
from quernel.cache._bitmap_intrinsics import (
    BFLOAT16,
    DENSE,
    FLOAT32,
    HALF,
    TILE,
    add_rows,
    expand_row,
    maximum,
    multiply_rows,
    powers,
)
from quernel.nn._addresses import pointer

f32, i32, u16, u32, u64 = np.float32, np.int32, np.uint16, np.uint32, np.uint64

keyed = keyed_with(_bitmap_intrinsics.__file__)

# Rows whose logits are at hand at once; their values are read tile by tile and should stay in L1.
BLOCK = 128
# A part: its rows, whether they are dense, and twice, for keys and for values: addresses of bitmaps and of values,
# bytes between the bitmaps and between the values of two heads, bytes of a row's values.
PART = 12


@njit(nogil=True, cache=True, fastmath=False)
def _single(half: Any) -> Any:
    """Return the bits of the float32 that equals a float16."""
    sign, exponent, rest = (half & u32(0x8000)) << u32(16), (half >> u32(10)) & u32(31), half & u32(0x3FF)
    if exponent == u32(31):
        return sign | u32(0x7F800000) | rest << u32(13)
    if exponent == u32(0):
        if rest == u32(0):
            return sign
        # Subnormal: shift until the leading one has the place of the hidden bit.
        exponent = u32(1)
        while rest & u32(0x400) == u32(0):
            rest <<= u32(1)
            exponent -= u32(1)
        rest &= u32(0x3FF)
    return sign | (exponent + u32(112)) << u32(23) | rest << u32(13)


@njit(nogil=True, cache=True, fastmath=False)
def unpack(kind: Any, bitmaps: Any, values: Any, n: Any, out: Any) -> None:
    """Write packed rows as float32.

    bitmaps: uint64 (rows, tiles)  values: address of ``n`` values a row  out: the bits of floats, uint32 (rows, width)
    """
    rows, width = out.shape
    words = carray(pointer(values), (rows * n,), u32)
    halves = carray(pointer(values), (rows * n,), u16)
    for row in range(rows):
        at = row * n
        for c in range(width):
            out[row, c] = u32(0)
        for tile in range(bitmaps.shape[1]):
            bits = bitmaps[row, tile]
            c = tile * TILE
            while bits != u64(0):
                if bits & u64(1):
                    if kind == FLOAT32:
                        out[row, c] = words[at]
                    elif kind == BFLOAT16:
                        out[row, c] = u32(halves[at]) << u32(16)
                    else:
                        out[row, c] = _single(u32(halves[at]))
                    at += 1
                bits >>= u64(1)
                c += 1


@njit(nogil=True, cache=True, fastmath=False)
def pack(x: Any, n: Any, bitmaps: Any, values: Any, start: Any, stop: Any) -> None:
    """Keep the ``n`` largest magnitudes of the rows from ``start`` to ``stop``; of equal ones the first.

    x: bits of floats, uint32 (rows, d)  bitmaps: uint64 (rows, tiles)  values: uint32 (rows, n)
    """
    d = x.shape[1]
    rank = np.empty(d, u32)
    for row in range(start, stop):
        # Without its sign a float orders as its bits do, subnormal numbers too.
        for c in range(d):
            rank[c] = x[row, c] & u32(0x7FFFFFFF)
        # The n-th largest, bit by bit from the top: the largest number that n of them reach.
        bound = u32(0)
        for bit in range(30, -1, -1):
            tried = bound | u32(1) << u32(bit)
            reach = i32(0)
            for c in range(d):
                reach += i32(rank[c] >= tried)
            if reach >= n:
                bound = tried
        above = i32(0)
        for c in range(d):
            above += i32(rank[c] > bound)
        equal, at = i32(n) - above, 0
        for tile in range(bitmaps.shape[1]):
            bits = u64(0)
            for c in range(tile * TILE, min(tile * TILE + TILE, d)):
                kept = rank[c] > bound
                if rank[c] == bound and equal > i32(0):
                    kept = True
                    equal -= i32(1)
                if kept:
                    bits |= u64(1) << u64(c - tile * TILE)
                    values[row, at] = x[row, c]
                    at += 1
            bitmaps[row, tile] = bits


@functools.cache
def attend(kind: int, group: int, plain: bool) -> Any:
    """Return the jitted attention of ``group`` queries a key head; ``plain`` unpacks rows before their products.

    ``(parts, runs, sizes, query, dense_query, order, maxima, sums, out, start, stop)`` answers the items (head, run).

    parts: int64 (parts, PART)  runs: int64 (runs + 1,), the first part of each; dense parts stand in runs of their own
    sizes: int64 (4,), values and tiles of a row of keys, the same of values  query: float32 (heads, group, key width),
    times log2(e) and the scale, in ``channel_order`` unless plain; dense_query: the same in the order of channels
    order: int64 (value width,)  maxima, sums: float32 (items, group)  out: float32 (items, group, value width): the
    sums of 2^(logit - maximum) v
    """
    # Nothing is compiled that may need instructions which are not there.
    form = DENSE if plain else kind

    @njit(nogil=True, cache=True, fastmath=False)
    @keyed
    def run(
        parts: Any,
        runs: Any,
        sizes: Any,
        query: Any,
        dense_query: Any,
        order: Any,
        maxima: Any,
        sums: Any,
        out: Any,
        start: Any,
        stop: Any,
    ) -> None:
        key_width, value_width, gap = query.shape[2], out.shape[2], 4 * BLOCK
        scores, offsets = np.empty((group, BLOCK), f32), np.empty(BLOCK, i32)
        held = np.empty((group, value_width), f32)
        scratch = np.empty((BLOCK, max(key_width, value_width) if plain else 1), u32)
        flat, row_bytes = scratch.ctypes.data, 4 * scratch.shape[1]
        places, answers = scores.ctypes.data, held.ctypes.data
        k_halves, v_halves = key_width // HALF, value_width // HALF
        for item in range(start, stop):
            head, r = item // (len(runs) - 1), item % (len(runs) - 1)
            best, total = maxima[item], sums[item]
            best[:] = -np.inf
            total[:] = 0
            held[:] = 0
            asked = query.ctypes.data + 4 * head * group * key_width
            asked_dense = dense_query.ctypes.data + 4 * head * group * key_width
            dense = False
            for p in range(runs[r], runs[r + 1]):
                part = parts[p]
                dense = part[1] == 1
                k_masks, k_values = part[2] + head * part[4], part[3] + head * part[5]
                v_masks, v_values = part[7] + head * part[9], part[8] + head * part[10]
                k_size, v_size, k_stride, v_stride = part[6], part[11], 8 * sizes[1], 8 * sizes[3]
                for begin in range(0, part[0], BLOCK):
                    count = min(BLOCK, part[0] - begin)
                    whole = (count + 15) // 16 * 16
                    masks, place = k_masks + begin * k_stride, k_values + begin * k_size
                    if dense:
                        multiply_rows(DENSE, group, 0, 0, place, k_size, k_halves, asked_dense, places, gap, whole)
                    elif plain:
                        packed = carray(pointer(masks), (count, sizes[1]), u64)
                        unpack(kind, packed, place, sizes[0], scratch[:count, :key_width])
                        multiply_rows(DENSE, group, 0, 0, flat, row_bytes, k_halves, asked, places, gap, whole)
                    else:
                        multiply_rows(form, group, masks, k_stride, place, k_size, k_halves, asked, places, gap, whole)
                    for q in range(group):
                        for t in range(count, whole):
                            scores[q, t] = -np.inf
                        above = max(best[q], maximum(places + q * gap, whole // 16))
                        if above > best[q]:
                            # What was added up under the old maximum; 0 the first time, when that was -inf.
                            less = f32(np.exp2(best[q] - above))
                            total[q] *= less
                            for c in range(value_width):
                                held[q, c] *= less
                            best[q] = above
                        total[q] += powers(places + q * gap, whole // 16, above)
                    masks, place = v_masks + begin * v_stride, v_values + begin * v_size
                    size = row_bytes if plain and not dense else v_size
                    for t in range(count):
                        offsets[t] = t * size
                    starts = offsets.ctypes.data
                    if dense:
                        add_rows(DENSE, group, 0, 0, place, starts, places, gap, v_halves, answers, count)
                    elif plain:
                        packed = carray(pointer(masks), (count, sizes[3]), u64)
                        unpack(kind, packed, place, sizes[2], scratch[:count, :value_width])
                        add_rows(DENSE, group, 0, 0, flat, starts, places, gap, v_halves, answers, count)
                    else:
                        add_rows(form, group, masks, v_stride, place, starts, places, gap, v_halves, answers, count)
            for q in range(group):
                for c in range(value_width):
                    out[item, q, c if dense else order[c]] = held[q, c]

    return run


@functools.cache
def logits(kind: int, group: int, plain: bool) -> Any:
    """Return the jitted ``(parts, n, tiles, query, starts, out, start, stop)``: products of packed rows and queries.

    parts: int64 (parts, PART), of which the first side is read  n, tiles: values and tiles of a row
    query: float32 (heads, group, width), in ``channel_order`` unless plain  starts: int64, each part's first row
    out: float32 (heads, group, rows)  Items are (head, part).
    """
    # Nothing is compiled that may need instructions which are not there.
    form = DENSE if plain else kind

    @njit(nogil=True, cache=True, fastmath=False)
    @keyed
    def run(parts: Any, n: Any, tiles: Any, query: Any, starts: Any, out: Any, start: Any, stop: Any) -> None:
        width, gap, stride = query.shape[2], 4 * BLOCK, 8 * tiles
        scores = np.empty((group, BLOCK), f32)
        scratch = np.empty((BLOCK if plain else 1, width), u32)
        flat, places, halves = scratch.ctypes.data, scores.ctypes.data, width // HALF
        for item in range(start, stop):
            head, p = item // len(parts), item % len(parts)
            rows, bitmaps, values, size = parts[p, 0], parts[p, 2], parts[p, 3], parts[p, 6]
            bitmaps, values = bitmaps + head * parts[p, 4], values + head * parts[p, 5]
            asked = query.ctypes.data + 4 * head * group * width
            for begin in range(0, rows, BLOCK):
                count = min(BLOCK, rows - begin)
                whole, masks, place = (count + 15) // 16 * 16, bitmaps + begin * stride, values + begin * size
                if plain:
                    unpack(kind, carray(pointer(masks), (count, tiles), u64), place, n, scratch[:count])
                    multiply_rows(DENSE, group, 0, 0, flat, 4 * width, halves, asked, places, gap, whole)
                else:
                    multiply_rows(form, group, masks, stride, place, size, halves, asked, places, gap, whole)
                for q in range(group):
                    for t in range(count):
                        out[head, q, starts[p] + begin + t] = scores[q, t]

    return run


@functools.cache
def weigh(kind: int, group: int, plain: bool) -> Any:
    """Return the jitted ``(parts, n, tiles, weights, starts, order, out, start, stop)``: weighted sums of rows.

    weights: float32 (heads, group, rows)  out: float32 (heads, parts, group, width); the rest as for ``logits``
    """
    # Nothing is compiled that may need instructions which are not there.
    form = DENSE if plain else kind

    @njit(nogil=True, cache=True, fastmath=False)
    @keyed
    def run(
        parts: Any, n: Any, tiles: Any, weights: Any, starts: Any, order: Any, out: Any, start: Any, stop: Any
    ) -> None:
        width, gap, stride = out.shape[3], 4 * BLOCK, 8 * tiles
        factors, offsets, held = np.empty((group, BLOCK), f32), np.empty(BLOCK, i32), np.empty((group, width), f32)
        scratch = np.empty((BLOCK if plain else 1, width), u32)
        flat, places, answers = scratch.ctypes.data, factors.ctypes.data, held.ctypes.data
        for item in range(start, stop):
            head, p = item // len(parts), item % len(parts)
            rows, bitmaps, values, size = parts[p, 0], parts[p, 2], parts[p, 3], parts[p, 6]
            bitmaps, values = bitmaps + head * parts[p, 4], values + head * parts[p, 5]
            held[:] = 0
            for begin in range(0, rows, BLOCK):
                count = min(BLOCK, rows - begin)
                masks, place = bitmaps + begin * stride, values + begin * size
                for t in range(count):
                    offsets[t] = t * (4 * width if plain else size)
                    for q in range(group):
                        factors[q, t] = weights[head, q, starts[p] + begin + t]
                begins, halves = offsets.ctypes.data, width // HALF
                if plain:
                    unpack(kind, carray(pointer(masks), (count, tiles), u64), place, n, scratch[:count])
                    add_rows(DENSE, group, 0, 0, flat, begins, places, gap, halves, answers, count)
                else:
                    add_rows(form, group, masks, stride, place, begins, places, gap, halves, answers, count)
            for q in range(group):
                for c in range(width):
                    out[head, p, q, order[c]] = held[q, c]

    return run


@functools.cache
def expand_ranges(size: int) -> Any:
    """Return the jitted copy of ranges of records whose sides keep some of their numbers of ``size`` bytes.

    ``(source, first, width, sides, starts, counts, out, stride, low, high)`` does what ``copy_ranges`` does.

    sides: int64 (S, 2), numbers of a side and those that it keeps.  A side of a record is its bitmap, in whole tiles,
    and then the kept numbers.
    """

    @njit(nogil=True, cache=True, fastmath=False)
    @keyed
    def run(
        source: Any,
        first: Any,
        width: Any,
        sides: Any,
        starts: Any,
        counts: Any,
        out: Any,
        stride: Any,
        low: Any,
        high: Any,
    ) -> None:
        records, length = source.shape[0] // width, sides[:, 0].sum()
        for h in range(low, high):
            to = h * stride
            for r in range(counts.shape[1]):
                n = counts[h, r]
                if n == 0:
                    break
                record = starts[h, r] - first
                if 0 <= record < records:
                    at = source.ctypes.data + record * width * size
                    place = out.ctypes.data + to * size
                    for _ in range(n):
                        for side in range(sides.shape[0]):
                            dim, kept = sides[side, 0], sides[side, 1]
                            values = at + (dim + TILE - 1) // TILE * 8
                            expand_row(size, at, values, place, dim)
                            at, place = values + kept * size, place + dim * size
                to += n * length

    return run
