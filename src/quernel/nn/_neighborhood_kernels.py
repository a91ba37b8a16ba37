"""Kernels of neighborhood attention on CPUs: sixteen queries side by side in the lanes of a vector, one key at a time.

A tile is sixteen rows (lanes) and the rows that they read (the halo).  Lanes stand as columns, (D, 16): a score of all
of them with one row of the halo is D multiply-adds of a broadcast number, the largest score and the sum of exponentials
need no step across lanes, and what lanes do not see is a mask of sixteen bits.  Backward takes the same two products
twice: with queries as lanes for their gradient, with keys as lanes for those of keys and values; nothing is added up
from two tiles.  Addresses are int64, strides are bytes; a halo holds a multiple of eight rows, and no lane sees those
beyond its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I16, I32, I64, LANES, Emitter, keyed
from quernel.nn._addresses import pointer
from quernel.nn._polynomials import coefficients_of

f32 = np.float32
ROW, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
BYTES = 4 * LANES
# Rows of a halo whose scores are formed together; rows that backward takes at a time, so that scores stay in the cache;
# cache lines of a row that are fetched ahead.
BLOCK, PIECE, FETCHED = 8, 512, 2
LOG2E = math.log2(math.e)
ZERO, ONE = f32(0), f32(1)
# Adding it to |y| < 2^22 rounds y to an integer, which then stands in the low bits.
_ROUNDER = 1.5 * 2.0**23
# Below this power of two a weight is zero.
_LEAST = -126.0


# Relative error 1e-8 of 2^x.
_EXP2 = coefficients_of(np.exp2, -0.5, 0.5, 6)


def scratch_size(width: int, halo: int) -> int:
    """Return the floats that a range of tiles needs: four sets of columns, two of lanes, two of scores."""
    return LANES * (4 * width + 2 + 2 * halo)


def _constant(value: float) -> Any:
    return ir.Constant(ROW, [float(f32(value))] * LANES)


def _exp2(e: Emitter, x: Any) -> Any:
    """Return 2^x, zero below ``_LEAST``; NaN stays."""
    b = e.builder
    shifted = b.fadd(x, _constant(_ROUNDER))
    part = b.fsub(x, b.fsub(shifted, _constant(_ROUNDER)))
    total = _constant(_EXP2[-1])
    for c in reversed(_EXP2[:-1]):
        total = e.fma(total, part, _constant(c))
    power = b.shl(b.bitcast(shifted, WORDS), ir.Constant(WORDS, [23] * LANES))
    value = b.bitcast(b.add(b.bitcast(total, WORDS), power), ROW)
    return b.select(b.fcmp_ordered("<", x, _constant(_LEAST)), e.zeros(ROW), value)


def _larger(e: Emitter, a: Any, b: Any) -> Any:
    return e.builder.select(e.builder.fcmp_ordered(">", a, b), a, b)


def _row(e: Emitter, indices: Any, i: Any, base: Any, stride: Any) -> Any:
    """Return the address of the i-th row of a halo."""
    index = e.builder.sext(e.load(e.offset(indices, i, 4), I32), I64)
    return e.builder.add(base, e.builder.mul(index, stride))


def _prefetch(e: Emitter, row: Any) -> None:
    """Fetch the first numbers of a row: rows of a halo lie apart, which no processor foresees."""
    for line in range(FETCHED):
        e.prefetch(e.builder.add(row, I64(BYTES * line)))


def make(write: Callable[..., None], count: int, portable: bool | None = None) -> Any:
    """Return an intrinsic ``run(numbers)`` of a tuple of ``count`` int64, written by ``write(emitter, *numbers)``."""

    @intrinsic
    def run(typing: Any, numbers: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            write(Emitter(builder, portable), *(builder.extract_value(args[0], i) for i in range(count)))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, count)), emit

    return run


def _scores_of(
    e: Emitter, out: Any, indices: Any, base: Any, stride: Any, columns: Any, size: Any, rows: Any, *masked: Any
) -> None:
    """Write the products of rows of a halo with columns: ``out[i, :] = sum_d row_i[d] * columns[d, :]``.

    ``masked``: bits, where minus infinity is written instead unless they are set; where the largest score of each lane
    goes; base and stride of rows that are needed next, at the same indices.
    """
    b = e.builder
    bits, top, other, other_stride = masked or (None,) * 4
    nothing = _constant(-math.inf)

    def block(index: Any, *largest: Any) -> list[Any]:
        places = [b.add(b.mul(index, I64(BLOCK)), I64(r)) for r in range(BLOCK)]
        starts = [_row(e, indices, place, base, stride) for place in places]
        if masked:
            for place in places:
                _prefetch(e, _row(e, indices, place, other, other_stride))
                _prefetch(e, _row(e, indices, b.add(place, I64(BLOCK)), base, stride))

        def step(d: Any, *sums: Any) -> list[Any]:
            column = e.load(e.offset(columns, d, BYTES), ROW)
            numbers = [e.splat(e.load(e.offset(start, d, 4), F32)) for start in starts]
            return [e.fma(number, column, total) for number, total in zip(numbers, sums, strict=True)]

        held = list(largest)
        for r, total in enumerate(e.loop(size, [e.zeros(ROW)] * BLOCK, step)):
            if masked:
                seen = b.bitcast(e.load(e.offset(bits, places[r], 2), I16), ir.VectorType(BIT, LANES))
                total = b.select(seen, total, nothing)
                held[r % 2] = _larger(e, total, held[r % 2])
            e.store(total, e.offset(out, places[r], BYTES))
        return held

    largest = e.loop(b.sdiv(rows, I64(BLOCK)), [nothing] * 2 if masked else [], block)
    if masked:
        found = _larger(e, *largest)
        # A lane that sees nothing gets weights of zero and not NaN.
        e.store(b.select(b.fcmp_ordered("==", found, nothing), e.zeros(ROW), found), top)


def _weights_of(e: Emitter, scores: Any, rows: Any, top: Any, total: Any) -> None:
    """Turn scores into 2^(score - top), and write their sums."""
    b, largest = e.builder, e.load(top, ROW)

    def four(i: Any, *sums: Any) -> list[Any]:
        held = []
        for r, before in enumerate(sums):
            place = e.offset(scores, b.add(b.mul(i, I64(4)), I64(r)), BYTES)
            weight = _exp2(e, b.fsub(e.load(place, ROW), largest))
            e.store(weight, place)
            held.append(b.fadd(before, weight))
        return held

    sums = e.loop(b.sdiv(rows, I64(4)), [e.zeros(ROW)] * 4, four)
    e.store(b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3])), total)


def _mixer_of(high: int) -> Callable[..., None]:
    """Return what adds rows of a halo, each times its weights: ``out[d, :] += sum_i row_i[d] * weights[i, :]``.

    d runs over the first ``high`` numbers of the rows.
    """

    def write(e: Emitter, out: Any, indices: Any, base: Any, stride: Any, weights: Any, rows: Any) -> None:
        places = [e.builder.add(out, I64(BYTES * d)) for d in range(high)]

        def step(i: Any, *sums: Any) -> list[Any]:
            weight, row = e.load(e.offset(weights, i, BYTES), ROW), _row(e, indices, i, base, stride)
            numbers = [e.splat(e.load(e.builder.add(row, I64(4 * d)), F32)) for d in range(high)]
            return [e.fma(number, weight, total) for number, total in zip(numbers, sums, strict=True)]

        for total, place in zip(e.loop(rows, [e.load(place, ROW) for place in places], step), places, strict=True):
            e.store(total, place)

    return write


def _slopes_of(by_row: bool) -> Callable[..., None]:
    """Return what turns scores s into weights p = 2^(s - lse), and products d with the gradient into p (d - delta).

    lse and delta are those of the lanes, or with ``by_row`` those of the rows of the halo, ``stride`` bytes apart.
    """

    def write(
        e: Emitter, scores: Any, dots: Any, rows: Any, lse: Any, delta: Any, indices: Any = None, stride: Any = None
    ) -> None:
        b, nothing = e.builder, e.zeros(ROW)
        lanes = [] if by_row else [e.load(lse, ROW), e.load(delta, ROW)]

        def two(i: Any) -> list[Any]:
            for r in range(2):
                at, mine = b.add(b.mul(i, I64(2)), I64(r)), lanes
                if by_row:
                    mine = [e.splat(e.load(_row(e, indices, at, base, stride), F32)) for base in (lse, delta)]
                place, other = e.offset(scores, at, BYTES), e.offset(dots, at, BYTES)
                # Not above zero: there rounding puts sums of very large scores.
                power = b.fsub(e.load(place, ROW), mine[0])
                weight = _exp2(e, b.select(b.fcmp_ordered(">", power, nothing), nothing, power))
                e.store(weight, place)
                e.store(b.fmul(weight, b.fsub(e.load(other, ROW), mine[1])), other)
            return []

        e.loop(b.sdiv(rows, I64(2)), [], two)

    return write


_masked_scores, _scores, _weights = make(_scores_of, 11), make(_scores_of, 7), make(_weights_of, 4)
_slopes, _slopes_by_row = make(_slopes_of(False), 5), make(_slopes_of(True), 7)
_mix_16, _mix_4, _mix_1 = (make(_mixer_of(high), 6) for high in (16, 4, 1))


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def _mix(out: Any, size: Any, indices: Any, base: Any, stride: Any, weights: Any, rows: Any) -> None:
    """Add the rows of a halo, each times its weights, to ``size`` columns."""
    d = 0
    while d + 16 <= size:
        _mix_16((out + BYTES * d, indices, base + 4 * d, stride, weights, rows))
        d += 16
    while d + 4 <= size:
        _mix_4((out + BYTES * d, indices, base + 4 * d, stride, weights, rows))
        d += 4
    while d < size:
        _mix_1((out + BYTES * d, indices, base + 4 * d, stride, weights, rows))
        d += 1


@njit(nogil=True, cache=True, fastmath=False)
def _stand(columns: Any, lanes: Any, base: Any, stride: Any, size: Any, factor: Any) -> None:
    """Write sixteen rows as columns, times a factor."""
    for lane in range(LANES):
        row = carray(pointer(base + lanes[lane] * stride), (size,), f32)
        for d in range(size):
            columns[LANES * d + lane] = row[d] * factor


@njit(nogil=True, cache=True, fastmath=False)
def _lay(columns: Any, lanes: Any, real: Any, base: Any, stride: Any, size: Any, factors: Any) -> None:
    """Write columns, each times its factor, as rows: those of the lanes that are real."""
    for lane in range(LANES):
        if (real >> lane) & 1:
            row = carray(pointer(base + lanes[lane] * stride), (size,), f32)
            factor = factors[lane]
            for d in range(size):
                row[d] = columns[LANES * d + lane] * factor


@njit(nogil=True, cache=True, fastmath=False)
def _gather(near: Any, tables: Any, tile: Any) -> None:
    """Write the rows of a tile's halo; kernels look a block further."""
    _, origins, kinds, offsets, _, counts, _ = tables
    kind = kinds[tile]
    rows, moved, origin = counts[kind, 0], counts[kind, 1], origins[tile]
    for i in range(moved):
        near[i] = offsets[kind, i] + origin
    for i in range(moved, rows):
        near[i] = offsets[kind, i]
    near[rows : rows + BLOCK] = 0


@njit(nogil=True, cache=True, fastmath=False)
def _base(x: Any, batch: Any, head: Any) -> Any:
    """Return the address of a head of a sample."""
    return x[0] + batch * x[1] + head * x[3]


@njit(nogil=True, cache=True, fastmath=False, error_model="numpy")
@keyed
def attend(
    q: Any, k: Any, v: Any, out: Any, lse: Any, tables: Any, sizes: Any, scale: Any, scratch: Any, near: Any,
    start: Any, stop: Any,
) -> None:  # fmt: skip
    """Write the outputs of the tiles of queries from ``start`` to ``stop``, and the logarithms, base 2, of their sums.

    q, k, v, out: (address, bytes from batch to batch, token to token, head to head)  lse: (B, N, H)
    tables: of ``Tiles.packed``  sizes: (heads of keys, heads of queries a head of keys, D, Dv)  scale: times log2 e
    scratch: floats of ``scratch_size``  near: a number a row of the largest halo and ``BLOCK`` more
    """
    lanes, _, kinds, _, bits, counts, real = tables
    groups, share, size, wide = sizes
    tiles, most = len(lanes), LANES * max(size, wide)
    columns, mixed, ends = scratch[:most], scratch[most : most + LANES * wide], scratch[4 * most :]
    sums, scores = ends[LANES : 2 * LANES], ends[2 * LANES :].ctypes.data
    top, total, stood = ends.ctypes.data, sums.ctypes.data, columns.ctypes.data
    for item in range(start, stop):
        pair, tile = item // tiles, item % tiles
        batch, group, kind = pair // groups, pair % groups, kinds[tile]
        rows, indices, seen = counts[kind, 0], near.ctypes.data, bits[kind].ctypes.data
        _gather(near, tables, tile)
        keys, values = _base(k, batch, group), _base(v, batch, group)
        for head in range(group * share, (group + 1) * share):
            _stand(columns, lanes[tile], _base(q, batch, head), q[2], size, scale)
            _masked_scores((scores, indices, keys, k[2], stood, size, rows, seen, top, values, v[2]))
            _weights((scores, rows, top, total))
            mixed[:] = ZERO
            _mix(mixed.ctypes.data, wide, indices, values, v[2], scores, rows)
            for lane in range(LANES):
                if (real[kind] >> lane) & 1:
                    lse[batch, lanes[tile, lane], head] = ends[lane] + math.log2(sums[lane])
                    sums[lane] = ONE / sums[lane]
            _lay(mixed, lanes[tile], real[kind], _base(out, batch, head), out[2], wide, sums)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def query_gradient(
    q: Any, k: Any, v: Any, grad: Any, dq: Any, lse: Any, delta: Any, tables: Any, sizes: Any, scale: Any,
    scratch: Any, near: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Write the gradients of the tiles of queries from ``start`` to ``stop``.

    lse: of ``attend``  delta: (B, N, H), sum of grad * out less the gradient of lse; the rest as in ``attend``
    """
    lanes, _, kinds, _, bits, counts, real = tables
    groups, share, size, wide = sizes
    tiles, most = len(lanes), LANES * max(size, wide)
    columns, grads, mixed = scratch[:most], scratch[most : 2 * most], scratch[2 * most : 3 * most]
    ends = scratch[4 * most :]
    tops, less, scores = ends[:LANES], ends[LANES : 2 * LANES], ends[2 * LANES :].ctypes.data
    dots, top, beside = scores + BYTES * PIECE, tops.ctypes.data, less.ctypes.data
    stood, slope, total = columns.ctypes.data, grads.ctypes.data, mixed.ctypes.data
    factors = np.full(LANES, f32(scale / LOG2E))
    for item in range(start, stop):
        pair, tile = item // tiles, item % tiles
        batch, group, kind = pair // groups, pair % groups, kinds[tile]
        keys, values = _base(k, batch, group), _base(v, batch, group)
        _gather(near, tables, tile)
        for head in range(group * share, (group + 1) * share):
            _stand(columns, lanes[tile], _base(q, batch, head), q[2], size, scale)
            _stand(grads, lanes[tile], _base(grad, batch, head), grad[2], wide, ONE)
            mixed[:] = ZERO
            for first in range(0, counts[kind, 0], PIECE):
                rows = min(PIECE, counts[kind, 0] - first)
                indices, seen = near[first:].ctypes.data, bits[kind, first:].ctypes.data
                _masked_scores((scores, indices, keys, k[2], stood, size, rows, seen, top, values, v[2]))
                _scores((dots, indices, values, v[2], slope, wide, rows))
                for lane in range(LANES):
                    token = lanes[tile, lane]
                    tops[lane], less[lane] = lse[batch, token, head], delta[batch, token, head]
                _slopes((scores, dots, rows, top, beside))
                _mix(total, size, indices, keys, k[2], dots, rows)
            _lay(mixed, lanes[tile], real[kind], _base(dq, batch, head), dq[2], size, factors)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def key_gradient(
    q: Any, k: Any, v: Any, grad: Any, dk: Any, dv: Any, lse: Any, delta: Any, tables: Any, sizes: Any, scale: Any,
    scratch: Any, near: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Write the gradients of the tiles of keys and values from ``start`` to ``stop``; halos are of queries."""
    lanes, _, kinds, _, bits, counts, real = tables
    groups, share, size, wide = sizes
    tiles, most = len(lanes), LANES * max(size, wide)
    columns, across = scratch[:most], scratch[most : 2 * most]
    to_keys, to_values, ends = scratch[2 * most : 3 * most], scratch[3 * most : 4 * most], scratch[4 * most :]
    top, scores, stood, slope = ends.ctypes.data, ends[2 * LANES :].ctypes.data, columns.ctypes.data, across.ctypes.data
    dots, step = scores + BYTES * PIECE, lse.strides[1]
    factors, ones = np.full(LANES, f32(scale / LOG2E)), np.full(LANES, ONE)
    for item in range(start, stop):
        pair, tile = item // tiles, item % tiles
        batch, group, kind = pair // groups, pair % groups, kinds[tile]
        _stand(columns, lanes[tile], _base(k, batch, group), k[2], size, scale)
        _stand(across, lanes[tile], _base(v, batch, group), v[2], wide, ONE)
        to_keys[:], to_values[:] = ZERO, ZERO
        _gather(near, tables, tile)
        for head in range(group * share, (group + 1) * share):
            queries, grads = _base(q, batch, head), _base(grad, batch, head)
            sums, less = lse[batch, :, head:].ctypes.data, delta[batch, :, head:].ctypes.data
            for first in range(0, counts[kind, 0], PIECE):
                rows = min(PIECE, counts[kind, 0] - first)
                indices, seen = near[first:].ctypes.data, bits[kind, first:].ctypes.data
                _masked_scores((scores, indices, queries, q[2], stood, size, rows, seen, top, grads, grad[2]))
                _scores((dots, indices, grads, grad[2], slope, wide, rows))
                _slopes_by_row((scores, dots, rows, sums, less, indices, step))
                _mix(to_values.ctypes.data, wide, indices, grads, grad[2], scores, rows)
                _mix(to_keys.ctypes.data, size, indices, queries, q[2], dots, rows)
        _lay(to_keys, lanes[tile], real[kind], _base(dk, batch, group), dk[2], size, factors)
        _lay(to_values, lanes[tile], real[kind], _base(dv, batch, group), dv[2], wide, ones)
