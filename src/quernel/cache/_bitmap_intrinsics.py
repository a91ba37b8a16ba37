"""Vector code for rows that keep some channels: a bitmap a tile of 64 channels, then the kept values.

Bit c of a tile is channel c, values ascend in c.  Every row holds the same number of values, so a row starts at a
multiple of it, and what of a row is passed already is counted from the bitmaps: there is no array of offsets.

Tiles are taken in halves of 32 channels.  A half is expanded into two registers (AVX-512's expand-load) and meets all
query heads of its key head before the next.  Where the processor has none, blocks of rows are unpacked to float32 and
pass through the same products as rows of the kind ``"dense"``; so do tokens that are not packed at all.

Order of channels: a register of 32 bfloat16 numbers widens to its even and its odd ones, so queries and answers of
that kind have the even channels of each half first (``channel_order``).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I16, I32, I64, LANES, Emitter, portable, target_features

TILE, HALF = 64, 32
# Kinds of rows, numbers because intrinsics take them as literals.
FLOAT32, BFLOAT16, FLOAT16, DENSE = range(4)
# Accumulators of a product of rows with queries: 16 of the 32 registers, the sums of a vector when added up.
SUMS = LANES
FLOATS, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)


def vector_path(kind: int) -> bool:
    """Say whether rows of this kind are expanded in registers here, else unpacked block by block."""
    return not portable() and (kind == FLOAT32 or "avx512vbmi2" in target_features())


def channel_order(kind: int, width: int) -> np.ndarray:
    """Return the channel that stands at each place of a query or an answer, ``width`` being a multiple of 64."""
    places = np.arange(width)
    if kind != BFLOAT16:
        return places
    return places // HALF * HALF + places % LANES * 2 + places // LANES % 2


def _expanded(e: Emitter, kind: int, place: Any, bits: Any) -> list[Any]:
    """Return 32 channels as two registers of floats."""
    b = e.builder
    if kind == DENSE:
        return [e.load(b.add(place, I64(64 * i)), FLOATS) for i in range(2)]
    if kind == FLOAT32:
        low, high = b.trunc(bits, I16), b.trunc(b.lshr(bits, I32(16)), I16)
        return [e.expand_load(place, low), e.expand_load(e.offset(place, b.zext(b.ctpop(low), I64), 4), high)]
    values = e.expand_load(place, bits, I16)
    if kind == FLOAT16:
        parts = [e.shuffle(values, values, range(first, first + LANES)) for first in (0, LANES)]
        return [b.fpext(b.bitcast(part, HALVES), FLOATS) for part in parts]
    pairs = b.bitcast(values, WORDS)
    even, odd = b.shl(pairs, ir.Constant(WORDS, [16] * LANES)), b.and_(pairs, ir.Constant(WORDS, [-65536] * LANES))
    return [b.bitcast(part, FLOATS) for part in (even, odd)]


def _bytes_of(e: Emitter, kind: int, bits: Any) -> Any:
    """Return how far the values of a half reach."""
    if kind == DENSE:
        return I64(4 * HALF)
    return e.builder.mul(e.builder.zext(e.builder.ctpop(bits), I64), I64(4 if kind == FLOAT32 else 2))


def _add_up(e: Emitter, vectors: list[Any]) -> Any:
    """Return the sums of 16 registers as one: lane i is that of vector i."""
    width = LANES
    while len(vectors) > 1:
        # Two vectors of groups of ``width`` partial sums give one of groups half as wide, twice as many.
        half, following = width // 2, []
        for a, b in zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True):
            low = [lane for group in range(0, LANES, width) for lane in range(group, group + half)]
            high = [lane + half for lane in low]
            parts = [e.shuffle(a, b, [*lanes, *(LANES + lane for lane in lanes)]) for lanes in (low, high)]
            following.append(e.builder.fadd(*parts))
        vectors, width = following, half
    return vectors[0]


@functools.cache
def _sum_order() -> list[int]:
    """Return which vector ``_add_up`` leaves in each lane."""
    vectors = [[i] * LANES for i in range(LANES)]
    width = LANES
    while len(vectors) > 1:
        half, following = width // 2, []
        low = [lane for group in range(0, LANES, width) for lane in range(group, group + half)]
        for a, b in zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True):
            following.append([*(a[lane] for lane in low), *(b[lane] for lane in low)])
        vectors, width = following, half
    return vectors[0]


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing: Any,
    kind: Any,
    group: Any,
    bitmaps: Any,
    stride: Any,
    values: Any,
    size: Any,
    halves: Any,
    query: Any,
    out: Any,
    gap: Any,
    rows: Any,
) -> Any:
    """Multiply rows, a multiple of 16, with ``group`` queries (a power of two up to 8, known while compiling).

    ``stride``: bytes between bitmaps of rows  ``size``: bytes of a row's values  ``query``: floats (group, 32 * halves)
    ``out``: floats, ``gap`` bytes between those of two queries
    """
    form, queries = kind.literal_value, group.literal_value
    tokens = SUMS // queries
    together = min(4, tokens)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bitmaps, stride, values, size, halves, query, out, gap, rows = args[2:]
        e = Emitter(builder)
        query_bytes = builder.mul(halves, I64(4 * HALF))
        query_rows = [builder.add(query, builder.mul(query_bytes, I64(q))) for q in range(queries)]

        def some(first: Any) -> list[Any]:
            """Return the sums of ``together`` rows, those of a query side by side."""
            places = [builder.add(first, I64(i)) for i in range(together)]
            masks = [builder.add(bitmaps, builder.mul(stride, place)) for place in places]

            def half(index: Any, *carried: Any) -> list[Any]:
                starts, totals = list(carried[:together]), list(carried[together:])
                registers = []
                for i in range(together):
                    bits = I32(0) if form == DENSE else e.load(e.offset(masks[i], index, 4), I32)
                    registers.append(_expanded(e, form, starts[i], bits))
                    starts[i] = builder.add(starts[i], _bytes_of(e, form, bits))
                for q in range(queries):
                    place = e.offset(query_rows[q], index, 4 * HALF)
                    for part in range(2):
                        x = e.load(builder.add(place, I64(64 * part)), FLOATS)
                        for i in range(together):
                            at = q * together + i
                            totals[at] = e.fma(registers[i][part], x, totals[at])
                return [*starts, *totals]

            starts = [builder.add(values, builder.mul(size, place)) for place in places]
            return e.loop(halves, [*starts, *[e.zeros(FLOATS)] * (queries * together)], half)[together:]

        def batch(index: Any) -> list[Any]:
            first = builder.mul(index, I64(tokens))
            sums = [some(builder.add(first, I64(t))) for t in range(0, tokens, together)]
            # Vector q * tokens + t is the sum of query q and row t.
            ordered = [sums[t // together][q * together + t % together] for q in range(queries) for t in range(tokens)]
            total, lanes = _add_up(e, ordered), _sum_order()
            place = e.offset(out, first, 4)
            for q in range(queries):
                chosen = [lanes.index(q * tokens + t) for t in range(tokens)]
                e.store(e.shuffle(total, total, chosen), builder.add(place, builder.mul(gap, I64(q))))
            return []

        e.loop(builder.udiv(rows, I64(tokens)), [], batch)
        return context.get_dummy_value()

    return types.void(kind, group, *[types.int64] * 9), emit


@intrinsic(prefer_literal=True)
def add_rows(
    typing: Any,
    kind: Any,
    group: Any,
    bitmaps: Any,
    stride: Any,
    values: Any,
    offsets: Any,
    weights: Any,
    gap: Any,
    halves: Any,
    out: Any,
    count: Any,
) -> Any:
    """Add ``count`` rows, each times its weight of ``group`` queries, to the answers.

    ``offsets``: int32, where in ``values`` each row begins; overwritten  ``weights``: floats, ``gap`` bytes between
    queries  ``out``: floats (group, 32 * halves); the rest as for ``multiply_rows``
    """
    form, queries = kind.literal_value, group.literal_value
    most = 2 if queries <= 4 else 1

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bitmaps, stride, values, offsets, weights, gap, halves, out, count = args[2:]
        e = Emitter(builder)
        out_bytes = builder.mul(halves, I64(4 * HALF))
        weight_rows = [builder.add(weights, builder.mul(gap, I64(q))) for q in range(queries)]

        def columns(first: Any, together: int) -> list[Any]:
            """Pass all rows with the sums of ``together`` halves in registers."""
            start = e.offset(out, first, 4 * HALF)
            places = [
                builder.add(builder.add(start, builder.mul(out_bytes, I64(q))), I64(64 * part))
                for part in range(2 * together)
                for q in range(queries)
            ]
            column = e.offset(bitmaps, first, 4)

            def row(index: Any, *totals: Any) -> list[Any]:
                following = list(totals)
                offset = e.offset(offsets, index, 4)
                place = builder.add(values, builder.sext(e.load(offset, I32), I64))
                masks = builder.add(column, builder.mul(stride, index))
                factors = [e.splat(e.load(e.offset(w, index, 4), F32)) for w in weight_rows]
                for half in range(together):
                    bits = I32(0) if form == DENSE else e.load(builder.add(masks, I64(4 * half)), I32)
                    for part, x in enumerate(_expanded(e, form, place, bits)):
                        for q, factor in enumerate(factors):
                            at = (2 * half + part) * queries + q
                            following[at] = e.fma(x, factor, following[at])
                    place = builder.add(place, _bytes_of(e, form, bits))
                # Where the next halves of this row begin.
                e.store(builder.trunc(builder.sub(place, values), I32), offset)
                return following

            totals = e.loop(count, [e.load(place, FLOATS) for place in places], row)
            for total, place in zip(totals, places, strict=True):
                e.store(total, place)
            return []

        steps = builder.udiv(halves, I64(most))
        e.loop(steps, [], lambda index: columns(builder.mul(index, I64(most)), most))
        done = builder.mul(steps, I64(most))
        e.loop(builder.sub(halves, done), [], lambda index: columns(builder.add(done, index), 1))
        return context.get_dummy_value()

    return types.void(kind, group, *[types.int64] * 9), emit


@intrinsic(prefer_literal=True)
def expand_row(typing: Any, size: Any, bitmaps: Any, values: Any, out: Any, channels: Any) -> Any:
    """Write ``channels`` numbers of ``size`` bytes (4 or 2, known while compiling), zeros where none is kept."""
    width = size.literal_value
    lanes = 64 // width
    element, masks = (I32, I16) if width == 4 else (I16, I32)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bitmaps, values, out, channels = args[1:]
        e = Emitter(builder)
        groups = builder.udiv(channels, I64(lanes))
        rest = builder.sub(channels, builder.mul(groups, I64(lanes)))

        def group(index: Any, place: Any) -> tuple[Any, Any, Any]:
            bits = e.load(e.offset(bitmaps, index, lanes // 8), masks)
            return bits, e.expand_load(place, bits, element), e.offset(out, index, 64)

        def whole(index: Any, place: Any) -> list[Any]:
            bits, numbers, to = group(index, place)
            e.store(numbers, to)
            return [e.offset(place, builder.zext(builder.ctpop(bits), I64), width)]

        (place,) = e.loop(groups, [values], whole)
        with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
            _, numbers, to = group(groups, place)
            there = builder.sub(builder.shl(masks(1), builder.trunc(rest, masks)), masks(1))
            e.store_some(numbers, to, there)
        return context.get_dummy_value()

    return types.void(size, *[types.int64] * 4), emit


@intrinsic
def maximum(typing: Any, place: Any, vectors: Any) -> Any:
    """Return the largest of ``16 * vectors`` floats; NaN is passed over."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, vectors = args
        e = Emitter(builder)

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        first = ir.Constant(FLOATS, [float("-inf")] * LANES)
        (held,) = e.loop(vectors, [first], lambda i, best: [larger(e.load(e.offset(place, i, 64), FLOATS), best)])
        lanes = LANES
        while lanes > 1:
            held = larger(e.shuffle(held, held, range(lanes // 2)), e.shuffle(held, held, range(lanes // 2, lanes)))
            lanes //= 2
        return builder.extract_element(held, I32(0))

    return types.float32(types.int64, types.int64), emit


# 2^r = sum (r log 2)^k / k!, |r| <= 1/2: the first term left out is 1.2e-7 of it.
_TAYLOR = [float(np.log(2.0) ** k / float(np.prod(range(1, k + 1)))) for k in range(7)]
# Adding and taking away 3 * 2^22 rounds a float of moderate size to an integer.
_ROUND = 12582912.0


@intrinsic
def powers(typing: Any, place: Any, vectors: Any, above: Any) -> Any:
    """Replace ``16 * vectors`` floats x by 2^(x - above), none of them above, and return their sum."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, vectors, above = args
        e = Emitter(builder)

        def all_lanes(value: float) -> Any:
            return ir.Constant(FLOATS, [value] * LANES)

        top = e.splat(above)

        def power(index: Any, total: Any) -> list[Any]:
            at = e.offset(place, index, 64)
            # 2^-126 is the least that has an exponent of its own.
            x = e.clamp(builder.fsub(e.load(at, FLOATS), top), all_lanes(-126.0), all_lanes(0.0))
            whole = builder.fsub(builder.fadd(x, all_lanes(_ROUND)), all_lanes(_ROUND))
            rest = builder.fsub(x, whole)
            value = all_lanes(_TAYLOR[-1])
            for coefficient in reversed(_TAYLOR[:-1]):
                value = e.fma(value, rest, all_lanes(coefficient))
            exponent = builder.add(builder.fptosi(whole, WORDS), ir.Constant(WORDS, [127] * LANES))
            scale = builder.bitcast(builder.shl(exponent, ir.Constant(WORDS, [23] * LANES)), FLOATS)
            value = builder.fmul(value, scale)
            e.store(value, at)
            return [builder.fadd(total, value)]

        (total,) = e.loop(vectors, [e.zeros(FLOATS)], power)
        return e.reduce_add(total)

    return types.float32(types.int64, types.int64, types.float32), emit
