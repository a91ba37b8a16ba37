"""Depthwise windows over channels-last images, a group of channels each, beside channels that are only copied.

One pass over the rows writes every channel: the output is not put together from parts.  Sixteen channels of a group
are the lanes of a vector; windows are cut at the border, so that no tap is masked, and four pixels share the load of a
tap.  Windows read a few channels of each pixel, too scattered for the processor to foresee: lines are fetched ahead.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, types
from numba.extending import intrinsic

from quernel._intrinsics import I16, I64, LANES, Emitter, keyed
from quernel.nn._addresses import pointer
from quernel.nn._spmm import LINE, ROW, kept

# Pixels that share the loads of taps; sums that hide the latency of additions.
PIXELS, CHAINS = 4, 4
# What one call hands to its threads, all int64; ``sizes`` holds height and width of each window, ``ahead`` is the
# first row below a pixel that none of its windows reads, ``room`` the numbers of a part's scratch.
FIELDS = (
    *("x", "taps", "bias", "y", "height", "width", "channels", "copied", "group", "windows", "sizes", "ahead"),
    *("scratch", "room"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])


def _make_window(pixels: int, unrolled: int = 0) -> Any:
    """Return the intrinsic that writes one vector of channels of neighbouring pixels.

    ``window(x, taps, bias, y, rows, columns, x_row, x_column, taps_row, taps_column, pixel, lanes)``: addresses of the
    first tap that lies in the image and of its factors, how many there are and how far apart, in bytes; ``unrolled``
    fixes the number of columns.
    """

    @intrinsic
    def window(
        typing: Any, x: Any, taps: Any, bias: Any, y: Any, rows: Any, columns: Any, x_row: Any, x_column: Any,
        taps_row: Any, taps_column: Any, pixel: Any, lanes: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, taps, bias, y, rows, columns, x_row, x_column, taps_row, taps_column, pixel, lanes = args
            e, lanes = Emitter(builder), builder.trunc(lanes, I16)
            steps = [builder.mul(pixel, I64(p)) for p in range(pixels)]

            def tap(_: Any, x: Any, taps: Any, *sums: Any) -> list[Any]:
                factor = e.load_some(taps, ROW, lanes)
                values = [e.load_some(builder.add(x, step), ROW, lanes) for step in steps]
                sums = tuple(e.fma(value, factor, total) for value, total in zip(values, sums, strict=True))
                return [builder.add(x, x_column), builder.add(taps, taps_column), *sums]

            def row(_: Any, x: Any, taps: Any, *sums: Any) -> list[Any]:
                held = [x, taps, *sums]
                if unrolled:
                    for _ in range(unrolled):
                        held = tap(_, *held)
                else:
                    held = e.loop(columns, held, tap)
                return [builder.add(x, x_row), builder.add(taps, taps_row), *held[2:]]

            start = e.load_some(bias, ROW, lanes)
            _, _, *sums = e.loop(rows, [x, taps, *[start] * pixels], row)
            for step, total in zip(steps, sums, strict=True):
                e.store_some(total, builder.add(y, step), lanes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), emit

    return window


@intrinsic
def _dot(typing: Any, x: Any, g: Any, total: Any, count: Any, step: Any, lanes: Any) -> Any:
    """Add the products of ``count`` pixels of x and g, ``step`` bytes apart, to one vector in memory."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, g, total, count, step, lanes = args
        e, lanes = Emitter(builder), builder.trunc(lanes, I16)
        steps = [builder.mul(step, I64(i)) for i in range(CHAINS + 1)]

        def some(chains: int) -> Any:
            def body(_: Any, x: Any, g: Any, *sums: Any) -> list[Any]:
                found = []
                for i in range(chains):
                    left, right = (e.load_some(builder.add(base, steps[i]), ROW, lanes) for base in (x, g))
                    found.append(e.fma(left, right, sums[i]))
                return [builder.add(x, steps[chains]), builder.add(g, steps[chains]), *found]

            return body

        many = builder.sdiv(count, I64(CHAINS))
        rest = builder.sub(count, builder.mul(many, I64(CHAINS)))
        x, g, *sums = e.loop(many, [x, g, *[e.zeros(ROW)] * CHAINS], some(CHAINS))
        _, _, first = e.loop(rest, [x, g, sums[0]], some(1))
        sums[0] = first
        while len(sums) > 1:
            sums = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        e.store_some(builder.fadd(e.load_some(total, ROW, lanes), sums[0]), total, lanes)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


@intrinsic
def _copy(typing: Any, source: Any, target: Any, count: Any) -> Any:
    """Copy ``count`` floats."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, count = args
        e = Emitter(builder)
        vectors, rest = builder.ashr(count, I64(4)), builder.and_(count, I64(LANES - 1))

        def one(i: Any) -> list[Any]:
            e.store(e.load(e.offset(source, i, LINE), ROW), e.offset(target, i, LINE))
            return []

        e.loop(vectors, [], one)
        lanes = builder.trunc(builder.sub(builder.shl(I64(1), rest), I64(1)), I16)
        with builder.if_then(builder.icmp_unsigned("!=", rest, I64(0))):
            e.store_some(
                e.load_some(e.offset(source, vectors, LINE), ROW, lanes), e.offset(target, vectors, LINE), lanes
            )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), emit


@intrinsic
def _fetch(typing: Any, address: Any) -> Any:
    """Fetch the cache line of an address ahead of its use."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emitter(builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


_window_one, _window_some, _window_three = _make_window(1), _make_window(PIXELS), _make_window(PIXELS, 3)


def _filter(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Write the rows of pixels from ``start`` to ``stop``, of all images one after another."""
    call = carray(pointer(table), (1,), CALL)[0]
    sizes = carray(pointer(call.sizes), (call.windows, 2), np.int64)
    width, group, step = call.width, call.group, 4 * call.channels
    for item in range(start, stop):
        i = item % call.height
        x, y = call.x + item * width * step, call.y + item * width * step
        for j in range(width):
            _copy(x + j * step, y + j * step, call.copied)
            for line in range(0, step, LINE):
                # Of x the copied channels of the next row, the others of the row that windows reach next.
                below = 1 if line < 4 * call.copied else call.ahead
                _fetch(x + (below * width + j) * step + line)
                _fetch(y + (width + j) * step + line)
        taps, channel = call.taps, call.copied
        for window in range(call.windows):
            high, wide = sizes[window, 0], sizes[window, 1]
            up, left = high // 2, wide // 2
            top, bottom = max(0, up - i), min(high, call.height + up - i)
            for c in range(0, group, LANES):
                lanes = (1 << min(LANES, group - c)) - 1
                bias = call.bias + 4 * (window * group + c)
                j = 0
                while j < width:
                    first, last = max(0, left - j), min(wide, width + left - j)
                    inner = j >= left and j + PIXELS + left <= width
                    source = x + ((top - up) * width + j + first - left) * step + 4 * (channel + c)
                    factors = taps + 4 * ((top * wide + first) * group + c)
                    target = y + j * step + 4 * (channel + c)
                    rows, columns, line = bottom - top, last - first, width * step
                    if inner and wide == 1:
                        # Rows where columns are the inner loop.
                        _window_some(
                            source, factors, bias, target, 1, rows, 0, line, 0, 4 * group, step, lanes
                        )  # fmt: skip
                    elif inner and wide == 3:
                        _window_three(
                            source, factors, bias, target, rows, 3, line, step, 12 * group, 4 * group, step, lanes
                        )  # fmt: skip
                    elif inner:
                        _window_some(
                            source, factors, bias, target, rows, columns, line, step, 4 * wide * group, 4 * group,
                            step, lanes
                        )  # fmt: skip
                    else:
                        _window_one(
                            source, factors, bias, target, rows, columns, line, step, 4 * wide * group, 4 * group,
                            step, lanes
                        )  # fmt: skip
                    j += PIXELS if inner else 1
            taps += 4 * high * wide * group
            channel += group


def _correlate(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Add the gradients by the taps of the rows from ``start`` to ``stop`` to the scratch of this part."""
    call = carray(pointer(table), (1,), CALL)[0]
    sizes = carray(pointer(call.sizes), (call.windows, 2), np.int64)
    width, group, step = call.width, call.group, 4 * call.channels
    for item in range(start, stop):
        i = item % call.height
        x, g = call.x + item * width * step, call.y + item * width * step
        total, channel = call.scratch + 4 * part * call.room, call.copied
        for window in range(call.windows):
            high, wide = sizes[window, 0], sizes[window, 1]
            up, left = high // 2, wide // 2
            for u in range(max(0, up - i), min(high, call.height + up - i)):
                for v in range(wide):
                    first, last = max(0, left - v), min(width, width + left - v)
                    if first < last:
                        for c in range(0, group, LANES):
                            lanes = (1 << min(LANES, group - c)) - 1
                            source = x + ((u - up) * width + first + v - left) * step + 4 * (channel + c)
                            grads = g + first * step + 4 * (channel + c)
                            place = total + 4 * ((u * wide + v) * group + c)
                            _dot(source, grads, place, last - first, step, lanes)
            total += 4 * high * wide * group
            channel += group


@functools.cache
def filters() -> int:
    """Return the address of the C function that filters rows, for ``run_ranges``; its fields are ``FIELDS``."""
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(keyed(_filter)))


@functools.cache
def correlates() -> int:
    """Return the address of the C function for the gradients by the taps; ``y`` is the gradient of the output."""
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(keyed(_correlate)))
