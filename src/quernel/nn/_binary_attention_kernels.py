"""Kernels of linear attention with binary codes: chunks of tokens, each read once for the sums and once for the rows.

An item is one chunk of tokens of one head. ``sum_chunks`` binarises its keys and accumulates b_k^T v, ``merge_chunks``
adds the chunks of a head in their order, ``finish_chunks`` binarises queries, multiplies, adds the constant term,
normalises the rows and adds the depthwise convolution. Chunks do not depend on the number of threads, so results do
not either. All products run in register tiles of 8 x 32, the convolution too: as a band matrix over its neighbours.
Rows are whole vectors of 16 floats; strides are counted in floats, addresses are int64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I64, LANES, Emitter, keyed
from quernel.nn._addresses import pointer

f32 = np.float32

# Tokens of a chunk: codes, products and results of it stay in the second cache level.
CHUNK = 256
TILE = 8  # rows of a register tile
# Smallest length that a row is divided by.
EPS = 1e-12
HALF, ZERO, ONE, PER_PI = f32(0.5), f32(0), f32(1), f32(1 / math.pi)
ROW = ir.VectorType(F32, LANES)
BYTES = 4 * LANES  # of a vector


def scratch_size(width: int, kernel: int) -> int:
    """Return the floats that a range of items needs: codes, products, convolution, its band, rows at the ends."""
    steps = TILE + kernel - 1
    return 3 * CHUNK * width + steps * (TILE + width)


def sums_size(width: int) -> int:
    """Return the floats of one item's sums: b_k^T v and the sum of v."""
    return width * (width + 1)


def make_tile(vectors: int, portable: bool | None = None) -> Any:
    """Return ``tile(a, a_row, a_step, b, b_step, steps, out, out_row)``: 8 rows of a small matrix product.

    ``out[r, :] = sum_t a[r * a_row + t * a_step] * b[t * b_step, :]`` over ``16 * vectors`` columns.
    """

    @intrinsic
    def tile(
        typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, steps: Any, out: Any, out_row: Any
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_row, a_step, b, b_step, steps, out, out_row = args
            e = Emitter(builder, portable)
            starts = [e.offset(a, builder.mul(a_row, I64(r)), 4) for r in range(TILE)]

            def step(index: Any, *sums: Any) -> list[Any]:
                ahead, source = builder.mul(index, a_step), e.offset(b, builder.mul(index, b_step), 4)
                columns = [e.load(builder.add(source, I64(BYTES * c)), ROW) for c in range(vectors)]
                factors = [e.splat(e.load(e.offset(start, ahead, 4), F32)) for start in starts]
                return [e.fma(factors[i // vectors], columns[i % vectors], total) for i, total in enumerate(sums)]

            sums = e.loop(steps, [e.zeros(ROW)] * (TILE * vectors), step)
            for i, total in enumerate(sums):
                place = e.offset(out, builder.mul(out_row, I64(i // vectors)), 4)
                e.store(total, builder.add(place, I64(BYTES * (i % vectors))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return tile


def make_binarise(by_row: bool, portable: bool | None = None) -> Any:
    """Return ``binarise(rows, stride, codes, vectors, tokens, number)``: dense rows of ones and zeros.

    1 where ``row / ||row|| > number``; with ``by_row`` where a value exceeds the mean, the sum over ``number`` values.
    """

    @intrinsic
    def binarise(typing: Any, rows: Any, stride: Any, codes: Any, vectors: Any, tokens: Any, number: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, stride, codes, vectors, tokens, number = args
            e = Emitter(builder, portable)
            ones = ir.Constant(ROW, [1.0] * LANES)

            def token(index: Any) -> list[Any]:
                source = e.offset(rows, builder.mul(index, stride), 4)
                place = e.offset(codes, builder.mul(index, vectors), BYTES)

                def add(i: Any, total: Any) -> list[Any]:
                    x = e.load(e.offset(source, i, BYTES), ROW)
                    return [builder.fadd(total, x) if by_row else e.fma(x, x, total)]

                total = e.reduce_add(e.loop(vectors, [e.zeros(ROW)], add)[0])
                limit = builder.fdiv(total, number) if by_row else builder.fmul(number, _length(e, total))
                limits = e.splat(limit)

                def compare(i: Any) -> list[Any]:
                    x = e.load(e.offset(source, i, BYTES), ROW)
                    e.store(
                        builder.select(builder.fcmp_ordered(">", x, limits), ones, e.zeros(ROW)),
                        e.offset(place, i, BYTES),
                    )
                    return []

                e.loop(vectors, [], compare)
                return []

            e.loop(tokens, [], token)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32), emit

    return binarise


def make_normalise(portable: bool | None = None) -> Any:
    """Return ``normalise(rows, constant, c_stride, factor, mixed, out, o_stride, vectors, tokens)``.

    ``out = y / ||y|| + mixed`` with ``y = rows + factor * constant``; ``rows`` and ``mixed`` are dense, ``rows`` is
    overwritten by ``y``.
    """
    kinds = (*[types.int64] * 3, types.float32, *[types.int64] * 5)

    @intrinsic
    def normalise(
        typing: Any,
        rows: Any,
        constant: Any,
        c_stride: Any,
        factor: Any,
        mixed: Any,
        out: Any,
        o_stride: Any,
        vectors: Any,
        tokens: Any,
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, constant, c_stride, factor, mixed, out, o_stride, vectors, tokens = args
            e = Emitter(builder, portable)
            factors = e.splat(factor)

            def token(index: Any) -> list[Any]:
                ahead = builder.mul(index, vectors)
                row, beside = e.offset(rows, ahead, BYTES), e.offset(mixed, ahead, BYTES)
                own = e.offset(constant, builder.mul(index, c_stride), 4)
                place = e.offset(out, builder.mul(index, o_stride), 4)

                def add(i: Any, total: Any) -> list[Any]:
                    here = e.offset(row, i, BYTES)
                    y = e.fma(factors, e.load(e.offset(own, i, BYTES), ROW), e.load(here, ROW))
                    e.store(y, here)
                    return [e.fma(y, y, total)]

                total = e.reduce_add(e.loop(vectors, [e.zeros(ROW)], add)[0])
                scale = e.splat(builder.fdiv(ir.Constant(F32, 1.0), _length(e, total)))

                def finish(i: Any) -> list[Any]:
                    y = e.load(e.offset(row, i, BYTES), ROW)
                    e.store(e.fma(y, scale, e.load(e.offset(beside, i, BYTES), ROW)), e.offset(place, i, BYTES))
                    return []

                e.loop(vectors, [], finish)
                return []

            e.loop(tokens, [], token)
            return context.get_dummy_value()

        return types.void(*kinds), emit

    return normalise


def _length(e: Emitter, square: Any) -> Any:
    """Return the root, at least ``EPS``; NaN stays NaN."""
    root = e.sqrt(square)
    least = ir.Constant(F32, float(f32(EPS)))
    return e.builder.select(e.builder.fcmp_ordered("<", root, least), least, root)


_tile_32, _tile_16 = make_tile(2), make_tile(1)
_above, _above_mean = make_binarise(False), make_binarise(True)
_normalise = make_normalise()


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def _multiply(
    a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, steps: Any, out: Any, rows: Any, width: Any
) -> None:
    """Write ``out[r, :] = sum_t a[r, t] b[t, :]`` for whole tiles of rows; ``out`` is dense."""
    for r in range(0, rows, TILE):
        left, place = a + 4 * r * a_row, out + 4 * r * width
        column = 0
        while column + 2 * LANES <= width:
            _tile_32(left, a_row, a_step, b + 4 * column, b_step, steps, place + 4 * column, width)
            column += 2 * LANES
        if column < width:
            _tile_16(left, a_row, a_step, b + 4 * column, b_step, steps, place + 4 * column, width)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def _binarise(
    rows: Any, stride: Any, codes: Any, width: Any, tokens: Any, threshold: Any, head: Any, size: Any
) -> None:
    if threshold.size > 0:
        _above(rows, stride, codes, width // LANES, tokens, threshold[head])
    else:
        _above_mean(rows, stride, codes, width // LANES, tokens, f32(size))


@njit(nogil=True, cache=True, fastmath=False)
def _row(x: Any, batch: Any, head: Any, token: Any) -> Any:
    """Return the address of a token's row."""
    return x[0] + 4 * (batch * x[1] + head * x[2] + token * x[3])


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def sum_chunks(k: Any, v: Any, sizes: Any, threshold: Any, sums: Any, scratch: Any, start: Any, stop: Any) -> None:
    """Write b_k^T v and the sum of v of the items from ``start`` to ``stop``.

    k, v: (address, stride of batch, head, token) of (B, H, N, width), unit last stride  sizes: (H, N, width, D)
    threshold: (H,), empty for the mean of each row of D values  sums: (items, sums_size)  scratch: scratch_size
    """
    heads, n, width, size = sizes
    chunks = (n + CHUNK - 1) // CHUNK
    codes = scratch.ctypes.data
    # Eight rows of ones: their product with v is the sum of v, eight times.
    ones = codes + 4 * CHUNK * width
    scratch[CHUNK * width : CHUNK * width + TILE] = ONE
    for item in range(start, stop):
        pair, first = item // chunks, item % chunks * CHUNK
        batch, head = pair // heads, pair % heads
        tokens = min(CHUNK, n - first)
        values = _row(v, batch, head, first)
        _binarise(_row(k, batch, head, first), k[3], codes, width, tokens, threshold, head, size)
        out = sums[item]
        _multiply(codes, 1, width, values, v[3], tokens, out.ctypes.data, width, width)
        spare = ones + 4 * TILE
        _multiply(ones, 1, 0, values, v[3], tokens, spare, TILE, width)
        total = carray(pointer(spare), (width,), f32)
        for j in range(width):
            out[width * width + j] = total[j]


@njit(nogil=True, cache=True, fastmath=False)
def merge_chunks(sums: Any, sizes: Any, start: Any, stop: Any) -> None:
    """Add the chunks of the heads from ``start`` to ``stop`` into their first one and apply the factors 1/pi, 1/2."""
    _, n, width, d = sizes
    chunks, size = (n + CHUNK - 1) // CHUNK, sums.shape[1]
    for pair in range(start, stop):
        total = sums[pair * chunks]
        for chunk in range(1, chunks):
            part = sums[pair * chunks + chunk]
            for i in range(size):
                total[i] += part[i]
        for i in range(size):
            total[i] *= PER_PI if i < width * width else HALF
        # The padding of a row counts as zeros, which exceed a negative threshold.
        total[d * width : width * width] = ZERO


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def finish_chunks(
    q: Any,
    v: Any,
    sizes: Any,
    threshold: Any,
    conv: Any,
    total: Any,
    sums: Any,
    out: Any,
    scratch: Any,
    start: Any,
    stop: Any,
) -> None:
    """Write the outputs of the items from ``start`` to ``stop``.

    conv: (H, kernel)  total: whether the constant term is the sum of v  sums: of ``merge_chunks``
    out: (B, N, H, width) dense; the rest as in ``sum_chunks``
    """
    heads, n, width, size = sizes
    chunks = (n + CHUNK - 1) // CHUNK
    kernel = conv.shape[1]
    reach, steps = kernel // 2, TILE + kernel - 1
    codes = scratch.ctypes.data
    products, mixed = codes + 4 * CHUNK * width, codes + 8 * CHUNK * width
    band = scratch[3 * CHUNK * width :][: TILE * steps].reshape(TILE, steps)
    ends = scratch[3 * CHUNK * width + TILE * steps :][: steps * width].reshape(steps, width)
    band[:] = ZERO
    for item in range(start, stop):
        pair, first = item // chunks, item % chunks * CHUNK
        batch, head = pair // heads, pair % heads
        tokens = min(CHUNK, n - first)
        rows = (tokens + TILE - 1) // TILE * TILE
        _binarise(_row(q, batch, head, first), q[3], codes, width, tokens, threshold, head, size)
        scratch[tokens * width : rows * width] = ZERO
        merged = sums[pair * chunks].ctypes.data
        _multiply(codes, width, 1, merged, width, width, products, rows, width)
        for r in range(TILE):
            band[r, r : r + kernel] = conv[head]
        for r in range(0, rows, TILE):
            near = first + r - reach
            source, stride = _row(v, batch, head, near), v[3]
            if near < 0 or near + steps > n:
                _fetch(source, stride, near, n, ends)
                source, stride = ends.ctypes.data, width
            _multiply(band.ctypes.data, steps, 1, source, stride, steps, mixed + 4 * r * width, TILE, width)
        place = out + 4 * ((batch * n + first) * heads + head) * width
        own, stride, factor = _row(v, batch, head, first), v[3], HALF
        if total:
            own, stride, factor = merged + 4 * width * width, 0, ONE
        _normalise(products, own, stride, factor, mixed, place, heads * width, width // LANES, tokens)


@njit(nogil=True, cache=True, fastmath=False)
def _fetch(source: Any, stride: Any, near: Any, n: Any, out: Any) -> None:
    """Copy the rows of a tile's neighbours, zeros for those before the first and behind the last token."""
    steps, width = out.shape
    for i in range(steps):
        if 0 <= near + i < n:
            row = carray(pointer(source + 4 * i * stride), (width,), f32)
            for j in range(width):
                out[i, j] = row[j]
        else:
            out[i] = ZERO
