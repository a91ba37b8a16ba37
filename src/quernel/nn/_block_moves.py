"""Vector moves between hashed blocks of an array and rows, with random signs: the inner loop of the block kernels.

A piece is at most sixteen numbers of one block: a masked load, the sign bits flipped under a mask, one factor, a masked
store. Written as IR over addresses, because of arrays in a loop over rows Numba would count every use, atomically. All
operations are plain IR, for any processor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I16, I32, I64, LANES, Emitter, Function, keyed

F64 = ir.DoubleType()

# What moves a chunk is told, all int64: addresses of what is known of its pieces and rows, bytes from a row's to the
# next's, then the array, its numbers, and which slots may be written.
FIELDS = (
    *("slots", "columns", "lengths", "words", "positions", "present", "rows", "factors"),
    *("per_slots", "per_columns", "per_words", "pieces", "array", "size", "low", "high"),
)


def _make_moves(kind: str) -> Any:
    """Return ``move(fields, n, factor, like)``, which moves n rows between their places and the array.

    kind: "put" writes rows read from the array, "add" adds them, "scatter" adds rows to the array. Numbers at the rows'
    places are of the type of ``factor``, those of the array of the type of ``like``: float32, float64, or bfloat16 and
    float16 as uint16 and int16. Rows that are not present read as zero. Products and sums round on their own, so
    that every processor gives the same numbers.
    """

    @intrinsic
    def move(typing: Any, fields: Any, n: Any, factor: Any, like: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            table = {name: builder.extract_value(args[0], i) for i, name in enumerate(FIELDS)}
            stored = signature.args[3]
            wide = F64 if signature.args[2] == types.float64 else F32
            step, width = (8 if wide is F64 else 4), stored.bitwidth // 8

            def move_row(r: Any) -> list[Any]:
                slots, columns, lengths, words = (
                    builder.add(table[name], builder.mul(r, table[per]))
                    for name, per in zip(
                        FIELDS[:4], ("per_slots", "per_columns", "per_columns", "per_words"), strict=True
                    )
                )
                position, present, row = (e.load(e.offset(table[n], r, 8), I64, 8) for n in FIELDS[4:7])
                scale = e.splat(e.load(e.offset(table["factors"], r, step), wide, step))
                first = builder.and_(position, I64(63))

                def move_piece(p: Any) -> list[Any]:
                    slot, column, count = (e.load(e.offset(at, p, 8), I64, 8) for at in (slots, columns, lengths))
                    bits = builder.and_(_sign_bits(e, words, builder.add(first, column)), present)
                    place = e.offset(row, column, step)
                    end = builder.sub(table["size"], slot)

                    def run(slot: Any, skip: Any, count: Any) -> None:
                        at = e.offset(table["array"], slot, width)
                        there = e.offset(place, skip, step)
                        lanes = _lanes(builder, count)
                        some = builder.and_(lanes, builder.trunc(present, I16))
                        turned = builder.lshr(bits, skip)
                        if kind == "scatter":
                            value = _signed(e, _load_words(e, signature.args[2], there, some), turned, wide)
                            _store(e, builder.fmul(value, scale), at, lanes, adds=True)
                        else:
                            value = _signed(e, _load_words(e, stored, at, some), turned, wide)
                            _store(e, builder.fmul(value, scale), there, lanes, adds=kind == "add")

                    def clipped(slot: Any, skip: Any, count: Any) -> None:
                        start = _largest(builder, slot, table["low"])
                        stop = _least(builder, builder.add(slot, count), table["high"])
                        inside = _largest(builder, builder.sub(stop, start), I64(0))
                        run(start, builder.add(skip, builder.sub(start, slot)), inside)

                    whole = builder.icmp_signed("<=", count, end)
                    if kind == "scatter":
                        above = builder.icmp_signed(">=", slot, table["low"])
                        below = builder.icmp_signed("<=", builder.add(slot, count), table["high"])
                        whole = builder.and_(above, below)
                    with builder.if_else(whole) as (one, two):
                        with one:
                            run(slot, I64(0), count)
                        with two:
                            part = clipped if kind == "scatter" else run
                            before = _least(builder, count, end)
                            part(slot, I64(0), before)
                            part(I64(0), before, builder.sub(count, before))
                    return []

                e.loop(table["pieces"], [], move_piece)
                return []

            e.loop(args[1], [], move_row)
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, len(FIELDS)), types.int64, factor, like), emit

    return move


def keyed_by_moves(function: Function) -> Function:
    """Do as ``keyed``, and for the text of this file too: its functions are compiled into their callers'."""
    keyed(function)
    function.__qualname__ += f"_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
    return function


def _lanes(builder: Any, count: Any) -> Any:
    """Return the mask of the first 0 to 16 lanes."""
    return builder.trunc(builder.sub(builder.shl(I64(1), count), I64(1)), I16)


def _least(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _largest(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


def _sign_bits(e: Emitter, words: Any, bit: Any) -> Any:
    """Return the sign bits from ``bit`` on, 16 of them at least, of the 64-bit words at an address."""
    b = e.builder
    at, shift = e.offset(words, b.lshr(bit, I64(6)), 8), b.and_(bit, I64(63))
    low, high = e.load(at, I64, 8), e.load(b.add(at, I64(8)), I64, 8)
    # Two shifts: one by 64 is undefined.
    return b.or_(b.lshr(low, shift), b.shl(b.shl(high, I64(1)), b.sub(I64(63), shift)))


def _signed(e: Emitter, raw: Any, bits: Any, wide: Any) -> Any:
    """Return words as floats, the sign turned where a bit is set."""
    b = e.builder
    turned = b.bitcast(b.trunc(bits, I16), ir.VectorType(BIT, LANES))
    top = ir.Constant(raw.type, [1 << (raw.type.element.width - 1)] * LANES)
    return b.bitcast(b.xor(raw, b.select(turned, top, e.zeros(raw.type))), ir.VectorType(wide, LANES))


def _store(e: Emitter, value: Any, place: Any, lanes: Any, adds: bool) -> None:
    words = ir.VectorType(I64 if value.type.element == F64 else I32, LANES)
    if adds:
        value = e.builder.fadd(e.builder.bitcast(e.load_some(place, words, lanes), value.type), value)
    e.store_some(e.builder.bitcast(value, words), place, lanes)


def _load_words(e: Emitter, kind: Any, source: Any, lanes: Any) -> Any:
    """Load 16 numbers as the bits of float32, or of float64 where that is what they are."""
    b, words = e.builder, ir.VectorType(I32, LANES)
    if kind in (types.float32, types.float64):
        return e.load_some(source, words if kind == types.float32 else ir.VectorType(I64, LANES), lanes)
    half = b.zext(e.load_some(source, ir.VectorType(I16, LANES), lanes), words)
    if kind == types.uint16:  # bfloat16 is the upper half of float32
        return b.shl(half, ir.Constant(words, [16] * LANES))
    # float16, by integers: a conversion by LLVM may become a call of a function that is not there. Exponent and
    # mantissa moved into place are off by 2^112 exactly, subnormal numbers included; infinity and NaN by all bits.
    sign = b.shl(b.and_(half, ir.Constant(words, [0x8000] * LANES)), ir.Constant(words, [16] * LANES))
    rest = b.and_(half, ir.Constant(words, [0x7FFF] * LANES))
    placed = b.shl(rest, ir.Constant(words, [13] * LANES))
    floats = ir.VectorType(F32, LANES)
    scaled = b.bitcast(b.fmul(b.bitcast(placed, floats), ir.Constant(floats, [2.0**112] * LANES)), words)
    special = b.or_(placed, ir.Constant(words, [0x7F800000] * LANES))
    is_special = b.icmp_unsigned(">=", rest, ir.Constant(words, [0x7C00] * LANES))
    return b.or_(sign, b.select(is_special, special, scaled))


put, add, scatter = (_make_moves(kind) for kind in ("put", "add", "scatter"))
