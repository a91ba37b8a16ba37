"""Sparse times dense for wide rows: ``out[o] = clamp(bias[o] + sum_k w[o, k] a[k])`` over strips of 64 pixels.

a: (channels, pixels), one channel's pixels contiguous. The rows of the sparse weight run inside the loop over strips,
so that the strip of ``a`` stays in the cache; of one output row and strip all sums live in vector registers:
a nonzero costs one broadcast, four loads and four multiply-adds (arXiv 1911.09723).

A strip is read in place where its channels start on cache lines an odd number of lines apart. Otherwise it is copied:
loads that straddle two lines take twice as long, and strides of many lines, powers of two above all, map all channels
to few sets of the cache. In blocks of 2 or 4 output channels with one pattern, a load feeds 2 or 4 multiply-adds.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I16, I32, I64, LANES, Emitter, keyed
from quernel.nn._addresses import make_caller, pointer

BLOCKS = (1, 2, 4)
# Vectors of a strip: four sums share a broadcast of a weight, and a strip of 512 channels, 128 KB, fits an L2.
WIDEST = 4
LINE = 64  # bytes of a cache line and of a vector
STRIP = WIDEST * LANES

# What one call hands to its threads, all int64: strides and sizes of memory in bytes, limits as bits of a float.
FIELDS = (
    *("x", "x_image", "x_channel", "copied", "values", "indices", "pointers", "bias", "low", "high"),
    *("out", "out_image", "out_channel", "inputs", "outputs", "block", "pixels", "strips", "row_parts"),
    *("ahead_each", "scratch", "room", "rows", "single_rows"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
ROW = ir.VectorType(F32, LANES)
ALL_LANES = 2**LANES - 1


def _make_rows(block: int) -> Any:
    """Return the intrinsic that computes stored rows, ``block`` output rows each, on one strip.

    ``rows(table, first, last, shift, values, vectors, mask, strip, stride, out, ahead)``: stored row r holds the output
    rows from ``r * block + shift`` on; ``mask`` tells which lanes of the last vector are stored; where ``ahead`` is not
    0, the channels of the strip that begins there are fetched along the way. Addresses and strides in bytes.
    """

    @intrinsic
    def rows(
        typing: Any, table: Any, first: Any, last: Any, shift: Any, values: Any, vectors: Any, mask: Any, strip: Any,
        stride: Any, out: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            for wide in range(1, WIDEST + 1):
                with builder.if_then(builder.icmp_unsigned("==", args[5], I64(wide))):
                    _emit_rows(e, wide, block, *args[:5], *args[6:])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), emit

    return rows


def _emit_rows(
    e: Emitter, vectors: int, block: int, table: Any, first: Any, last: Any, shift: Any, values: Any, mask: Any,
    strip: Any, stride: Any, out: Any, ahead: Any,
) -> None:  # fmt: skip
    builder = e.builder

    def field(name: str, kind: Any = I64) -> Any:
        return e.load(builder.add(table, I64(8 * FIELDS.index(name))), kind)

    pointers, indices, bias, out_stride = (field(name) for name in ("pointers", "indices", "bias", "out_channel"))
    inputs, each, ahead_stride = (field(name) for name in ("inputs", "ahead_each", "x_channel"))
    low, high = (e.splat(field(name, F32)) for name in ("low", "high"))
    full = builder.icmp_unsigned("==", mask, I64(ALL_LANES))

    def pointer_to(row: Any) -> Any:
        return builder.sext(e.load(e.offset(pointers, row, 4), I32), I64)

    def compute_row(i: Any, begin: Any) -> list[Any]:
        row = builder.add(first, i)
        end = pointer_to(builder.add(row, I64(1)))
        with builder.if_then(builder.icmp_unsigned("!=", ahead, I64(0))):
            start = builder.mul(row, each)
            left = builder.sub(inputs, start)
            count = builder.select(builder.icmp_signed("<", left, each), left, each)

            def fetch(k: Any) -> list[Any]:
                place = builder.add(ahead, builder.mul(builder.add(start, k), ahead_stride))
                for v in range(vectors):
                    e.prefetch(builder.add(place, I64(LINE * v)))
                return []

            e.loop(count, [], fetch)
        o = builder.add(builder.mul(row, I64(block)), shift)
        starts = [e.splat(e.load(e.offset(bias, builder.add(o, I64(b)), 4), F32)) for b in range(block)]
        here = e.offset(indices, begin, 2), e.offset(values, begin, 4 * block), builder.sub(end, begin)
        sums = [e.clamp(s, low, high) for s in _emit_sums(e, vectors, *here, strip, stride, starts)]
        places = [builder.add(out, builder.mul(out_stride, builder.add(o, I64(b)))) for b in range(block)]
        _emit_stores(e, vectors, sums, places, mask, full)
        return [end]

    e.loop(builder.sub(last, first), [pointer_to(first)], compute_row)


def _emit_sums(
    e: Emitter, vectors: int, indices: Any, values: Any, n: Any, strip: Any, stride: Any, starts: list[Any]
) -> list[Any]:
    """Return ``starts[b] + sum over n nonzeros``, vectors of a row of the block together."""
    builder, block = e.builder, len(starts)
    size = vectors * block
    # Four sums at least, or every multiply-add waits for the one before.
    turns = max(1, 4 // size)

    def add_nonzero(i: Any, sums: Any) -> list[Any]:
        channel = builder.zext(e.load(e.offset(indices, i, 2), I16), I64)
        place = builder.add(strip, builder.mul(channel, stride))
        a = [e.load(builder.add(place, I64(LINE * v)), ROW, LINE) for v in range(vectors)]
        weights = e.offset(values, i, 4 * block)
        w = [e.splat(e.load(builder.add(weights, I64(4 * b)), F32)) for b in range(block)]
        return [e.fma(a[v], w[b], sums[b * vectors + v]) for b in range(block) for v in range(vectors)]

    def add_several(i: Any, *sums: Any) -> list[Any]:
        first = builder.mul(i, I64(turns))
        parts = [sums[turn * size : (turn + 1) * size] for turn in range(turns)]
        return [s for turn, mine in enumerate(parts) for s in add_nonzero(builder.add(first, I64(turn)), mine)]

    whole = builder.sdiv(n, I64(turns)) if turns > 1 else n
    start = [s for s in starts for _ in range(vectors)] + [e.zeros(ROW)] * (size * (turns - 1))
    found = e.loop(whole, start, add_several)
    if turns == 1:
        return found
    done = builder.mul(whole, I64(turns))
    sums = e.loop(builder.sub(n, done), found[:size], lambda i, *s: add_nonzero(builder.add(done, i), s))
    for i, other in enumerate(found[size:]):
        sums[i % size] = builder.fadd(sums[i % size], other)
    return sums


def _emit_stores(e: Emitter, vectors: int, sums: list[Any], places: list[Any], mask: Any, full: Any) -> None:
    lasts = []
    for b, place in enumerate(places):
        mine = [(s, e.builder.add(place, I64(LINE * v))) for v, s in enumerate(sums[b * vectors : (b + 1) * vectors])]
        for value, where in mine[:-1]:
            e.store(value, where, 4)
        lasts.append(mine[-1])
    # Without AVX-512 a masked store is far slower than a plain one.
    with e.builder.if_else(full) as (all_of_it, some):
        with all_of_it:
            for value, where in lasts:
                e.store(value, where, 4)
        with some:
            for value, where in lasts:
                e.store_some(value, where, e.builder.trunc(mask, I16))


@intrinsic
def _copy(typing: Any, source: Any, target: Any, vectors: Any, mask: Any) -> Any:
    """Copy ``vectors`` vectors to an aligned place: of the last one the lanes of ``mask``, and zeros."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, vectors, mask = args
        e = Emitter(builder)

        def whole(i: Any) -> list[Any]:
            e.store(e.load(e.offset(source, i, LINE), ROW, 4), e.offset(target, i, LINE), LINE)
            return []

        last = builder.sub(vectors, I64(1))
        e.loop(last, [], whole)
        value = e.load_some(e.offset(source, last, LINE), ROW, builder.trunc(mask, I16))
        e.store(value, e.offset(target, last, LINE), LINE)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i), emit


_rows1, _rows2, _rows4 = (_make_rows(block) for block in BLOCKS)


def _single(
    t: Any, first: Any, last: Any, shift: Any, w: Any, v: Any, m: Any, a: Any, step: Any, y: Any, p: Any
) -> None:
    _rows1(t, first, last, shift, w, v, m, a, step, y, p)


def _pairs(
    t: Any, first: Any, last: Any, shift: Any, w: Any, v: Any, m: Any, a: Any, step: Any, y: Any, p: Any
) -> None:
    _rows2(t, first, last, shift, w, v, m, a, step, y, p)


def _fours(
    t: Any, first: Any, last: Any, shift: Any, w: Any, v: Any, m: Any, a: Any, step: Any, y: Any, p: Any
) -> None:
    _rows4(t, first, last, shift, w, v, m, a, step, y, p)


@functools.cache
def rows(block: int) -> int:
    """Return the address of the C function over stored rows of ``block`` output rows; each takes seconds to compile."""
    function = {1: _single, 2: _pairs, 4: _fours}[block]
    compiled = cfunc(types.void(*[types.int64] * 11), cache=True, fastmath=False)(keyed(function))
    return kept(compiled)


@functools.cache
def strips() -> int:
    """Return the address of the C function over items for ``run_ranges``; its fields are ``FIELDS``."""
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(keyed(_strips)))


def _strips(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Compute the items from ``start`` to ``stop``: an image, a strip of its pixels, a part of the rows each."""
    call = carray(pointer(table), (1,), CALL)[0]
    block, parts, pixels, values = call.block, call.row_parts, call.pixels, call.values
    groups = call.outputs // block
    stored = groups + call.outputs - groups * block
    shared = np.int64(carray(pointer(call.pointers), (stored + 1,), np.int32)[groups])
    # Behind the groups of ``block`` rows come the left-over rows, one value a nonzero.
    singles, shift = values + 4 * (block - 1) * shared, groups * (block - 1)
    lines = (pixels + LANES - 1) // LANES
    for item in range(start, stop):
        image, s = item // parts // call.strips, item // parts % call.strips
        # Strips of like width: 13 vectors are 4 + 3 + 3 + 3.
        begin, end = lines * s // call.strips, lines * (s + 1) // call.strips
        vectors = end - begin
        mask = ALL_LANES if end < lines else ALL_LANES >> (LANES * lines - pixels)
        strip, stride = call.x + image * call.x_image + LINE * begin, call.x_channel
        ahead = strip + LINE * vectors if call.ahead_each != 0 and end < lines else 0
        if call.copied != 0:
            target = (call.scratch + part * call.room + LINE - 1) // LINE * LINE
            for k in range(call.inputs):
                _copy(strip + k * stride, target + k * LINE * vectors, vectors, mask)
            strip, stride = target, LINE * vectors
        out = call.out + image * call.out_image + LINE * begin
        first, last = stored * (item % parts) // parts, stored * (item % parts + 1) // parts
        place = (vectors, mask, strip, stride, out, ahead)
        if first < groups:
            _call_rows(call.rows, (table, first, min(last, groups), 0, values, *place))
        if groups < last:
            _call_rows(call.single_rows, (table, max(first, groups), last, shift, singles, *place))


_call_rows = make_caller(*[I64] * 11, returns=ir.VoidType())
_compiled: list[Any] = []


def kept(function: Any) -> int:
    """Keep a compiled function alive beside its address."""
    _compiled.append(function)
    return int(function.address)
