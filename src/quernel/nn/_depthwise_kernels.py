"""Depthwise 3x3 and 5x5 convolutions of channel-major planes, stride 1 or 2, zero padding of half the kernel.

At stride 1 a plane is one long row of pixels, taken sixteen at a time: a vector of each input row is loaded once, its
neighbours to the left and the right are shifted out of it and the vectors beside it, and bit masks take out what lies
beyond the border. Narrow planes lose nothing this way. At stride 2 pairs of vectors are split into even and odd
columns.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I16, I64, LANES, Emitter, keyed
from quernel.nn._addresses import make_caller, pointer
from quernel.nn._spmm import ALL_LANES, LINE, ROW, kept

SIZES, STRIDES = (3, 5), (1, 2)

# What one call hands to its threads, all int64: strides in bytes, sizes in pixels, limits as bits of a float.
FIELDS = (
    *("x", "x_image", "x_channel", "weight", "bias", "low", "high", "out", "out_image", "out_channel"),
    *("channels", "taps", "height", "width", "out_height", "out_width", "masks", "plane"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])


@functools.lru_cache(maxsize=256)
def border_masks(size: int, stride: int, height: int, width: int) -> torch.Tensor:
    """Return which of 16 lanes lie within the plane, as the bits of int16.

    Stride 1: (vectors of the plane + 1, 2 size), by input row first and by input column behind.
    Stride 2: (vectors of an input row, size), by input column.
    """
    lanes, offsets = np.arange(LANES), (np.arange(size) - size // 2)[:, None]
    if stride == 1:
        pixels = np.arange((-(-height * width // LANES) + 1) * LANES).reshape(-1, 1, LANES)
        rows, columns = pixels // width + offsets, pixels % width + offsets  # (vectors, size, lanes)
        on_plane = pixels < height * width
        inside = [on_plane & (rows >= 0) & (rows < height), on_plane & (columns >= 0) & (columns < width)]
    else:
        columns = np.arange(-(-width // (2 * LANES)) * 2 * LANES).reshape(-1, 1, LANES) + offsets
        inside = [(columns >= 0) & (columns < width)]
    bits = (np.concatenate(inside, axis=1) << lanes).sum(-1)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16))


def _field(e: Emitter, table: Any, name: str, kind: Any = I64) -> Any:
    return e.load(e.builder.add(table, I64(8 * FIELDS.index(name))), kind)


def _make_plane(size: int) -> Any:
    """Return the intrinsic ``plane(table, x, weight, bias, out)`` for one channel at stride 1."""

    @intrinsic
    def plane(typing: Any, table: Any, x: Any, weight: Any, bias: Any, out: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            table, x, weight, bias, out = args
            e = Emitter(builder)
            width, masks = _field(e, table, "width"), _field(e, table, "masks")
            pixels = builder.mul(_field(e, table, "height"), width)
            low, high = (e.splat(_field(e, table, name, F32)) for name in ("low", "high"))
            w = [e.splat(e.load(builder.add(weight, I64(4 * t)), F32)) for t in range(size * size)]
            start = e.splat(e.load(bias, F32))
            steps = [builder.mul(builder.mul(width, I64(dy - size // 2)), I64(4)) for dy in range(size)]

            half, zeros = size // 2, e.zeros(ROW)

            def load(i: Any, dy: int) -> Any:
                """Load the pixels ``dy`` rows below vector i, zeros beyond the plane."""
                inside = e.load(builder.add(e.offset(masks, i, 4 * size), I64(2 * dy)), I16)
                return e.load_some(builder.add(e.offset(x, i, LINE), steps[dy]), ROW, inside)

            def compute(i: Any, *held: Any) -> tuple[list[Any], Any]:
                """Return the vectors to hold for the next turn, left ones and middle ones, and the sums."""
                left, middle = held[:size], held[size:]
                right = [load(builder.add(i, I64(1)), dy) for dy in range(size)]
                total = start
                for dx in range(size):
                    inside = e.load(builder.add(e.offset(masks, i, 4 * size), I64(2 * (size + dx))), I16)
                    lanes = builder.bitcast(inside, ir.VectorType(BIT, LANES))
                    for dy in range(size):
                        pixels = middle[dy]
                        if dx != half:
                            pair = (left[dy], middle[dy]) if dx < half else (middle[dy], right[dy])
                            first = (dx - half) % LANES
                            pixels = e.shuffle(*pair, list(range(first, first + LANES)))
                            pixels = builder.select(lanes, pixels, zeros)
                        total = e.fma(pixels, w[dy * size + dx], total)
                return [*middle, *right], e.clamp(total, low, high)

            def whole(i: Any, *held: Any) -> list[Any]:
                following, total = compute(i, *held)
                e.store(total, e.offset(out, i, LINE), 4)
                return following

            vectors = builder.ashr(pixels, I64(4))
            held = e.loop(vectors, [zeros] * size + [load(I64(0), dy) for dy in range(size)], whole)
            rest = builder.and_(pixels, I64(LANES - 1))
            with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
                lanes = builder.sub(builder.shl(I64(1), rest), I64(1))
                e.store_some(compute(vectors, *held)[1], e.offset(out, vectors, LINE), builder.trunc(lanes, I16))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), emit

    return plane


def _make_halved(size: int) -> Any:
    """Return the intrinsic ``halved(table, x, weight, bias, out)`` for one channel at stride 2."""

    @intrinsic
    def halved(typing: Any, table: Any, x: Any, weight: Any, bias: Any, out: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            table, x, weight, bias, out = args
            e = Emitter(builder)
            names = ("height", "width", "out_height", "out_width", "masks")
            height, width, out_height, out_width, masks = (_field(e, table, name) for name in names)
            low, high = (e.splat(_field(e, table, name, F32)) for name in ("low", "high"))
            start = e.splat(e.load(bias, F32))
            w = [e.splat(e.load(builder.add(weight, I64(4 * t)), F32)) for t in range(size * size)]

            def rows_under(y: Any) -> list[tuple[Any, Any]]:
                """Return place and mask of the input rows under an output row; the mask is 0 beyond the plane."""
                rows = []
                for dy in range(size):
                    line = builder.add(builder.mul(y, I64(2)), I64(dy - size // 2))
                    within = builder.icmp_unsigned("<", line, height)  # a negative one is a large unsigned number
                    mask = builder.select(within, I16(ALL_LANES), I16(0))
                    rows.append((e.offset(x, builder.mul(line, width), 4), mask))
                return rows

            def group(y: Any, g: Any, rows: list[tuple[Any, Any]], vectors: int) -> None:
                """Write the outputs from column 16 g on, from so many vectors of input columns."""
                total, border = start, e.offset(masks, g, 2 * 2 * size)
                for dy, (line, within) in enumerate(rows):
                    place = e.offset(line, g, 2 * LINE)
                    for first in range(0, size, 2):
                        pair = []
                        for v in range(vectors):
                            inside = e.load(builder.add(border, I64(2 * (v * size + first))), I16)
                            tap = builder.add(place, I64(LINE * v + 4 * (first - size // 2)))
                            pair.append(e.load_some(tap, ROW, builder.and_(inside, within)))
                        for dx in range(first, min(first + 2, size)):
                            pixels = e.shuffle(pair[0], pair[-1], list(range(dx - first, 2 * LANES, 2)))
                            total = e.fma(pixels, w[dy * size + dx], total)
                value = e.clamp(total, low, high)
                left = builder.sub(out_width, builder.mul(g, I64(LANES)))
                count = builder.select(builder.icmp_signed("<", left, I64(LANES)), left, I64(LANES))
                lanes = builder.sub(builder.shl(I64(1), count), I64(1))
                place = builder.add(builder.mul(y, out_width), builder.mul(g, I64(LANES)))
                e.store_some(value, e.offset(out, place, 4), builder.trunc(lanes, I16))

            # Groups with columns for two vectors, and perhaps a last one with columns for one.
            pairs = builder.ashr(builder.add(width, I64(LANES - 1)), I64(5))
            groups = builder.ashr(builder.add(width, I64(2 * LANES - 1)), I64(5))

            def out_row(y: Any) -> list[Any]:
                rows = rows_under(y)

                def pair(g: Any) -> list[Any]:
                    group(y, g, rows, 2)
                    return []

                e.loop(pairs, [], pair)
                with builder.if_then(builder.icmp_signed("<", pairs, groups)):
                    group(y, pairs, rows, 1)
                return []

            e.loop(out_height, [], out_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), emit

    return halved


_plane3, _plane5 = (_make_plane(size) for size in SIZES)
_halved3, _halved5 = (_make_halved(size) for size in SIZES)


def _channel31(table: Any, x: Any, weight: Any, bias: Any, out: Any) -> None:
    _plane3(table, x, weight, bias, out)


def _channel51(table: Any, x: Any, weight: Any, bias: Any, out: Any) -> None:
    _plane5(table, x, weight, bias, out)


def _channel32(table: Any, x: Any, weight: Any, bias: Any, out: Any) -> None:
    _halved3(table, x, weight, bias, out)


def _channel52(table: Any, x: Any, weight: Any, bias: Any, out: Any) -> None:
    _halved5(table, x, weight, bias, out)


@functools.cache
def channel(size: int, stride: int) -> int:
    """Return the address of the C function ``(table, x, weight, bias, out)`` over one channel."""
    function = {(3, 1): _channel31, (5, 1): _channel51, (3, 2): _channel32, (5, 2): _channel52}[size, stride]
    return kept(cfunc(types.void(*[types.int64] * 5), cache=True, fastmath=False)(keyed(function)))


_call_channel = make_caller(*[I64] * 5, returns=ir.VoidType())


def _planes(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Compute the planes from ``start`` to ``stop``, a channel of an image each."""
    call = carray(pointer(table), (1,), CALL)[0]
    for item in range(start, stop):
        image, c = item // call.channels, item % call.channels
        x = call.x + image * call.x_image + c * call.x_channel
        out = call.out + image * call.out_image + c * call.out_channel
        _call_channel(call.plane, (table, x, call.weight + 4 * c * call.taps, call.bias + 4 * c, out))


@functools.cache
def planes() -> int:
    """Return the address of the C function over planes for ``run_ranges``; its fields are ``FIELDS``."""
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(_planes))
