"""A pointwise and a depthwise convolution in one pass over the image: the rows between them never leave the cache.

For one output row the kernel needs ``kernel_height`` rows of z = A x.  They live in a ring of rows: each input row is
multiplied by A once, when the first output row asks for it, and the taps of D are then summed from the ring.  Rank R
keeps R products side by side, whose sum the taps take along.  Layout is channels last, vectors run over output
channels, float32.  Two micro-kernels in LLVM do the work: a block of a matrix product, and a block of pixels over all
taps.  Without AVX-512 the caller takes torch's convolutions instead (``_intrinsics.portable``).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I64, LANES, Emitter, Function, keyed
from quernel.nn._addresses import pointer

VECTOR = 4 * LANES  # bytes
FLOAT = 4
ROW = ir.VectorType(F32, LANES)


class Shape(NamedTuple):
    """Sizes of one call; ``padded_*`` are channels rounded up to whole vectors, ``row`` the pixels of a padded row."""

    height: int
    width: int
    out_height: int
    out_width: int
    inputs: int
    outputs: int
    padded_inputs: int
    padded_outputs: int
    rank: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    top: int
    left: int
    row: int


def keyed_by_kernels(function: Function) -> Function:
    """Do as ``keyed``, and for the text of this file too: its functions are compiled into their callers'."""
    keyed(function)
    function.__qualname__ += f"_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
    return function


def make_product(rows: int, vectors: int) -> Any:
    """Return ``product(x, x_step, x_next, a, a_step, z, z_step, keep, k)``: z = x A for a block, or z + x A.

    Addresses and steps in bytes: from row to row of x and z, from number to number in a row of x, from row to row of A.
    """

    @intrinsic
    def product(
        typing: Any, x: Any, x_step: Any, x_next: Any, a: Any, a_step: Any, z: Any, z_step: Any, keep: Any, k: Any
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_step, x_next, a, a_step, z, z_step, keep, k = args
            e = Emitter(builder)
            sources = [builder.add(x, builder.mul(x_step, I64(i))) for i in range(rows)]
            targets = [
                builder.add(builder.add(z, builder.mul(z_step, I64(i))), I64(VECTOR * v))
                for i in range(rows)
                for v in range(vectors)
            ]
            kept = builder.icmp_signed("!=", keep, I64(0))
            before = [builder.select(kept, e.load(target, ROW, FLOAT), e.zeros(ROW)) for target in targets]

            def step(i: Any, *sums: Any) -> list[Any]:
                here, there = builder.add(a, builder.mul(i, a_step)), builder.mul(i, x_next)
                columns = [e.load(builder.add(here, I64(VECTOR * v)), ROW, FLOAT) for v in range(vectors)]
                values = [e.splat(e.load(builder.add(source, there), F32, FLOAT)) for source in sources]
                return [e.fma(values[j // vectors], columns[j % vectors], total) for j, total in enumerate(sums)]

            for total, target in zip(e.loop(k, before, step), targets, strict=True):
                e.store(total, target, FLOAT)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), emit

    return product


def make_taps(pixels: int) -> Any:
    """Return ``taps(table, count, offset, z_step, column, bias, out, out_step)``: bias plus all taps for some pixels.

    ``table`` holds the addresses of z and of the weights of each tap; ``offset`` and ``column`` are added to them.
    """

    @intrinsic
    def taps(
        typing: Any, table: Any, count: Any, offset: Any, z_step: Any, column: Any, bias: Any, out: Any, out_step: Any
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            table, count, offset, z_step, column, bias, out, out_step = args
            e = Emitter(builder)
            steps = [builder.mul(z_step, I64(p)) for p in range(pixels)]

            def step(i: Any, *sums: Any) -> list[Any]:
                entry = e.offset(table, i, 16)
                z = builder.add(e.load(entry, I64, 8), offset)
                tap = e.load(builder.add(e.load(builder.add(entry, I64(8)), I64, 8), column), ROW, FLOAT)
                return [e.fma(e.load(builder.add(z, steps[p]), ROW, FLOAT), tap, sums[p]) for p in range(pixels)]

            sums = e.loop(count, [e.load(bias, ROW, FLOAT)] * pixels, step)
            for p in range(pixels):
                e.store(sums[p], builder.add(out, builder.mul(out_step, I64(p))), FLOAT)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return taps


# 24 sums, 4 columns and a value fit the 32 registers; the smaller blocks take what is left over.
_product64, _product62, _product61 = (make_product(6, vectors) for vectors in (4, 2, 1))
_product24, _product22, _product21 = (make_product(2, vectors) for vectors in (4, 2, 1))
_product14, _product12, _product11 = (make_product(1, vectors) for vectors in (4, 2, 1))
_taps8, _taps4, _taps1 = (make_taps(pixels) for pixels in (8, 4, 1))


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def multiply(x: Any, x_step: Any, x_next: Any, a: Any, width: Any, z: Any, keep: Any, n: Any, k: Any) -> None:
    """Write z = x A (n rows, sums of k products), or add it to z; rows of A and z have ``width`` bytes, in vectors."""
    column = 0
    while column < width:
        vectors = min((width - column) // VECTOR, 4)
        vectors = 2 if vectors == 3 else vectors
        right, i = a + column, 0
        while i < n:
            rows = n - i
            # A few rows twice is cheaper than small blocks, but may not be added twice.
            if 3 <= rows < 6 <= n and keep == 0:
                i, rows = n - 6, 6
            xs, zs = x + i * x_step, z + i * width + column
            if rows >= 6:
                i += 6
                if vectors == 4:
                    _product64(xs, x_step, x_next, right, width, zs, width, keep, k)
                elif vectors == 2:
                    _product62(xs, x_step, x_next, right, width, zs, width, keep, k)
                else:
                    _product61(xs, x_step, x_next, right, width, zs, width, keep, k)
            elif rows >= 2:
                i += 2
                if vectors == 4:
                    _product24(xs, x_step, x_next, right, width, zs, width, keep, k)
                elif vectors == 2:
                    _product22(xs, x_step, x_next, right, width, zs, width, keep, k)
                else:
                    _product21(xs, x_step, x_next, right, width, zs, width, keep, k)
            else:
                i += 1
                if vectors == 4:
                    _product14(xs, x_step, x_next, right, width, zs, width, keep, k)
                elif vectors == 2:
                    _product12(xs, x_step, x_next, right, width, zs, width, keep, k)
                else:
                    _product11(xs, x_step, x_next, right, width, zs, width, keep, k)
        column += VECTOR * vectors


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def sum_taps(table: Any, count: Any, z_step: Any, bias: Any, out: Any, out_step: Any, vectors: Any, n: Any) -> None:
    """Write one row of n pixels: the bias plus every tap of the table."""
    for v in range(vectors):
        column, j = v * VECTOR, 0
        offset, target = bias + column, out + column
        while j < n:
            left = n - j
            if 2 <= left < 8 <= n:
                j, left = n - 8, 8
            z, place = j * z_step + column, target + j * out_step
            if left >= 8:
                _taps8(table, count, z, z_step, column, offset, place, out_step)
                j += 8
            elif left >= 4:
                _taps4(table, count, z, z_step, column, offset, place, out_step)
                j += 4
            else:
                _taps1(table, count, z, z_step, column, offset, place, out_step)
                j += 1


def forward_scratch(s: Shape) -> int:
    """Return the floats of working memory that ``convolve_rows`` needs: the ring, and one row of output."""
    ring = (s.kernel_height - 1) * s.dilation_y + 1
    return ring * s.row * s.rank * s.padded_outputs + s.out_width * s.padded_outputs


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def convolve_rows(x: Any, a: Any, d: Any, bias: Any, out: Any, scratch: Any, s: Any, first: Any, last: Any) -> None:
    """Compute the output rows ``first`` to ``last``, counted through all images.

    Parameters
    ----------
    x, a, d, bias, out, scratch : int64
        Addresses of contiguous float32: (images, height, width, inputs), (inputs, rank, padded_outputs),
        (rank, kernel_height, kernel_width, padded_outputs), (padded_outputs,),
        (images, out_height, out_width, outputs), ``forward_scratch(s)``.
    s : Shape
    first, last : int
    """
    ring = (s.kernel_height - 1) * s.dilation_y + 1
    vector = s.padded_outputs * FLOAT
    pixel = s.rank * vector
    floats = carray(pointer(scratch), (ring * s.row, s.rank * s.padded_outputs), np.float32)
    for place in range(ring * s.row):
        if not s.left <= place % s.row < s.left + s.width:
            for c in range(s.rank * s.padded_outputs):
                floats[place, c] = 0
    spare = scratch + ring * s.row * pixel
    table = np.empty((s.rank * s.kernel_height * s.kernel_width, 2), np.int64)
    image, ready = -1, 0  # rows of z above ``ready`` are in the ring
    for g in range(first, last):
        if g // s.out_height != image:
            image, ready = g // s.out_height, 0
        top = (g % s.out_height) * s.stride_y - s.top
        ready = max(ready, top)
        while ready < min(top + ring, s.height):
            source = x + (image * s.height + ready) * s.width * s.inputs * FLOAT
            target = scratch + ((ready % ring) * s.row + s.left) * pixel
            multiply(source, s.inputs * FLOAT, FLOAT, a, pixel, target, 0, s.width, s.inputs)
            ready += 1
        count = 0
        for y in range(s.kernel_height):
            row = top + y * s.dilation_y
            if 0 <= row < s.height:
                for r in range(s.rank):
                    for c in range(s.kernel_width):
                        place = (row % ring) * s.row + c * s.dilation_x
                        table[count, 0] = scratch + place * pixel + r * vector
                        table[count, 1] = d + ((r * s.kernel_height + y) * s.kernel_width + c) * vector
                        count += 1
        target = out + g * s.out_width * s.outputs * FLOAT
        whole = s.outputs == s.padded_outputs
        sum_taps(
            table.ctypes.data,
            count,
            s.stride_x * pixel,
            bias,
            target if whole else spare,
            vector,
            vector // VECTOR,
            s.out_width,
        )
        if not whole:
            copy_pixels(spare, s.padded_outputs, target, s.outputs, s.outputs, s.out_width)


@njit(nogil=True, cache=True, fastmath=False)
def copy_pixels(source: Any, source_step: Any, target: Any, target_step: Any, channels: Any, n: Any) -> None:
    """Copy the first channels of n pixels; steps in floats."""
    old = carray(pointer(source), n * source_step, np.float32)
    new = carray(pointer(target), n * target_step, np.float32)
    for j in range(n):
        for c in range(channels):
            new[j * target_step + c] = old[j * source_step + c]
