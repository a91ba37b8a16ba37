"""The gradients of ``_one_way_kernels.convolve_rows``, again in one pass over the image and without kept activations.

For each input row h: z = A x is computed once more; the rows of the output's gradient that h reaches are summed over
the taps (each as if zeros stood between its pixels where the stride is above one), which is the gradient of z; that
times A^T is the gradient of x, and its products with x and of z with the output's gradient are added to those of A and
D.  A thread adds up its own gradients of A and D.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import I64, Emitter, keyed
from quernel.nn._addresses import pointer
from quernel.nn._one_way_kernels import (
    FLOAT,
    ROW,
    VECTOR,
    Shape,
    copy_pixels,
    keyed_by_kernels,
    multiply,
    sum_taps,
)


def _make_correlation(taps: int) -> Any:
    """Return ``correlation(g, z, step, tap_step, total, total_step, n)``: add sum_j g[j] z[j + tap] to the totals.

    One vector of channels; ``step`` is from pixel to pixel, ``tap_step`` from tap to tap of z, in bytes.
    """

    @intrinsic
    def correlation(
        typing: Any, g: Any, g_step: Any, z: Any, z_step: Any, tap_step: Any, total: Any, total_step: Any, n: Any
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            g, g_step, z, z_step, tap_step, total, total_step, n = args
            e = Emitter(builder)
            places = [builder.add(z, builder.mul(tap_step, I64(t))) for t in range(taps)]
            targets = [builder.add(total, builder.mul(total_step, I64(t))) for t in range(taps)]

            def add(index: Any, sums: Any) -> list[Any]:
                value = e.load(builder.add(g, builder.mul(index, g_step)), ROW, FLOAT)
                there = builder.mul(index, z_step)
                return [
                    e.fma(e.load(builder.add(place, there), ROW, FLOAT), value, one)
                    for place, one in zip(places, sums, strict=True)
                ]

            def pair(i: Any, *sums: Any) -> list[Any]:
                # Even and odd pixels apart: one chain of sums would wait for each multiply-add to end.
                even = builder.shl(i, I64(1))
                return [*add(even, sums[:taps]), *add(builder.add(even, I64(1)), sums[taps:])]

            pairs = builder.ashr(n, I64(1))
            sums = e.loop(pairs, [*(e.load(t, ROW, FLOAT) for t in targets), *([e.zeros(ROW)] * taps)], pair)
            start = builder.shl(pairs, I64(1))
            sums = [builder.fadd(sums[t], sums[taps + t]) for t in range(taps)]
            sums = e.loop(builder.sub(n, start), sums, lambda i, *rest: add(builder.add(start, i), rest))
            for one, target in zip(sums, targets, strict=True):
                e.store(one, target, FLOAT)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return correlation


_correlate3, _correlate1 = _make_correlation(3), _make_correlation(1)


def backward_sizes(s: Shape) -> tuple[int, int, int]:
    """Return rows of the ring, pixels of one of its rows, and the floats of working memory of ``backward_rows``."""
    reach = (s.kernel_width - 1) * s.dilation_x
    rows = (s.kernel_height - 1) * s.dilation_y // s.stride_y + 1
    width = max(s.width + s.left, (s.out_width - 1) * s.stride_x + 1) + reach
    channels = s.rank * s.padded_outputs
    floats = rows * width * s.padded_outputs + (s.row + s.width) * channels + 2 * s.width * s.padded_inputs
    return rows, width, floats + s.padded_outputs


@njit(nogil=True, cache=True, fastmath=False)
@keyed_by_kernels
def backward_rows(
    grad: Any, x: Any, a: Any, a_rows: Any, d: Any, x_grad: Any, a_grad: Any, d_grad: Any, scratch: Any, s: Any,
    ring: Any, width: Any, first: Any, last: Any,
) -> None:  # fmt: skip
    """Go through the input rows ``first`` to ``last``, counted through all images.

    Parameters
    ----------
    grad, x, a, a_rows, d, x_grad, a_grad, d_grad, scratch : int64
        Addresses of contiguous float32: (images, out_height, out_width, outputs), (images, height, width, inputs),
        (inputs, rank, padded_outputs), (rank, padded_outputs, padded_inputs),
        (rank, kernel_height, kernel_width, padded_outputs); then what is written: like x, or 0 where nobody asks,
        and what is added to: like ``a_rows`` and ``d``; and working memory.
    s : Shape
    ring, width : int
        From ``backward_sizes``.
    first, last : int
    """
    vector, inputs = s.padded_outputs * FLOAT, s.padded_inputs * FLOAT
    pixel = s.rank * vector
    reach = (s.kernel_width - 1) * s.dilation_x
    z = scratch + ring * width * vector  # one row of z, padded
    z_grad = z + s.row * pixel
    x_row = z_grad + s.width * pixel
    x_out = x_row + s.width * inputs
    zero = x_out + s.width * inputs
    floats = carray(pointer(scratch), (zero - scratch) // FLOAT + s.padded_outputs, np.float32)
    for i in range(floats.size):
        floats[i] = 0
    whole = s.inputs == s.padded_inputs
    table = np.empty((s.kernel_height * s.kernel_width, 2), np.int64)
    image, ready = -1, 0  # rows of the gradient above ``ready`` are in the ring
    for g in range(first, last):
        h = g % s.height
        if g // s.height != image:
            image, ready = g // s.height, 0
        bottom = min((h + s.top) // s.stride_y, s.out_height - 1)
        ready = max(ready, bottom - ring + 1)
        while ready <= bottom:
            source = grad + (image * s.out_height + ready) * s.out_width * s.outputs * FLOAT
            target = scratch + ((ready % ring) * width + reach) * vector
            copy_pixels(source, s.outputs, target, s.stride_x * s.padded_outputs, s.outputs, s.out_width)
            ready += 1
        row = x + g * s.width * s.inputs * FLOAT
        multiply(row, s.inputs * FLOAT, FLOAT, a, pixel, z + s.left * pixel, 0, s.width, s.inputs)
        for r in range(s.rank):
            count = 0
            for y in range(s.kernel_height):
                i = h + s.top - y * s.dilation_y
                if i < 0 or i % s.stride_y != 0 or i // s.stride_y >= s.out_height:
                    continue
                line = scratch + (i // s.stride_y % ring) * width * vector
                taps = (r * s.kernel_height + y) * s.kernel_width * vector
                for c in range(s.kernel_width):
                    table[count, 0] = line + (s.left - c * s.dilation_x + reach) * vector
                    table[count, 1] = d + taps + c * vector
                    count += 1
                _correlate_taps(
                    line + reach * vector, s.stride_x * vector, z + r * vector, s.stride_x * pixel,
                    s.dilation_x * pixel, d_grad + taps, vector, s.kernel_width, s.out_width,
                )  # fmt: skip
            target = z_grad + r * vector
            sum_taps(table.ctypes.data, count, vector, zero, target, pixel, vector // VECTOR, s.width)
        if not whole:
            copy_pixels(row, s.inputs, x_row, s.padded_inputs, s.inputs, s.width)
        columns = row if whole else x_row
        multiply(z_grad, FLOAT, pixel, columns, inputs, a_grad, 1, s.rank * s.padded_outputs, s.width)
        if x_grad != 0:
            target = x_grad + g * s.width * s.inputs * FLOAT
            result = target if whole else x_out
            multiply(z_grad, pixel, FLOAT, a_rows, inputs, result, 0, s.width, s.rank * s.padded_outputs)
            if not whole:
                copy_pixels(x_out, s.padded_inputs, target, s.inputs, s.inputs, s.width)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def _correlate_taps(
    g: Any, g_step: Any, z: Any, z_step: Any, tap_step: Any, total: Any, vector: Any, taps: Any, n: Any
) -> None:
    """Add a row's share to the gradients of one row of taps."""
    for column in range(0, vector, VECTOR):
        t = 0
        while t < taps:
            here, there = z + t * tap_step + column, total + t * vector + column
            if taps - t >= 3:
                _correlate3(g + column, g_step, here, z_step, tap_step, there, vector, n)
                t += 3
            else:
                _correlate1(g + column, g_step, here, z_step, tap_step, there, vector, n)
                t += 1
