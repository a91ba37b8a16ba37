"""Walsh-Hadamard transforms of float32 rows in the first-level cache, 16 lanes at a time.

A row of d = 16 n floats is n vectors. Four steps act inside a vector (a shuffle and a multiply by +-1 that is fused
with the sum, exact either way), the others add and subtract whole vectors, up to three steps a pass over the row. A row
of complex numbers is one of twice as many floats, without the first step, which would mix real and imaginary parts.
The sums are the same, in the same order, whatever the processor. Cost: d log2(d) additions, about 1 us for d = 1024.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I64, LANES, Emitter, keyed

# Passes multiply by +-1 and add: contraction cannot change a bit, and NaN and infinity may be data.
_FASTMATH = False


def _make_inner(bits: tuple[int, ...]) -> Any:
    """Return ``inner(address, count)``: the steps ``bits`` inside each of ``count`` vectors of 16 floats."""
    row = ir.VectorType(F32, LANES)

    @intrinsic
    def inner(typing: Any, address: Any, count: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start, vectors = args
            e = Emitter(builder)

            def transform(index: Any) -> list[Any]:
                place = e.offset(start, index, 64)
                v = e.load(place, row, align=64)
                for bit in bits:
                    other = e.shuffle(v, v, [lane ^ bit for lane in range(LANES)])
                    sign = ir.Constant(row, [-1.0 if lane & bit else 1.0 for lane in range(LANES)])
                    v = e.fma(v, sign, other)
                e.store(v, place, align=64)
                return []

            e.loop(vectors, [], transform)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return inner


def _make_outer(bits: int) -> Any:
    """Return ``outer(address, stride)``: ``bits`` steps over 2^bits vectors that lie ``stride`` bytes apart."""
    row = ir.VectorType(F32, LANES)
    count = 1 << bits

    @intrinsic
    def outer(typing: Any, address: Any, stride: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start, step = args
            e = Emitter(builder)
            places = [builder.add(start, builder.mul(step, I64(i))) for i in range(count)]
            v = [e.load(place, row, align=64) for place in places]
            for bit in (1 << b for b in range(bits)):
                v = [
                    builder.fsub(v[i ^ bit], v[i]) if i & bit else builder.fadd(v[i], v[i ^ bit]) for i in range(count)
                ]
            for value, place in zip(v, places, strict=True):
                e.store(value, place, align=64)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return outer


_inner, _inner_complex = _make_inner((1, 2, 4, 8)), _make_inner((2, 4, 8))
_outer1, _outer2, _outer3 = (_make_outer(bits) for bits in (1, 2, 3))


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
@keyed
def _transform(row: Any, size: Any, pairs: Any) -> None:
    """Transform the first ``size`` floats, a power of two, of a 64-byte aligned array in place.

    With ``pairs`` they are complex numbers, real and imaginary parts in turn.
    """
    if size < 16:
        half = 2 if pairs else 1
        while half < size:
            for i in range(size):
                if not i & half:
                    a, b = row[i], row[i + half]
                    row[i], row[i + half] = a + b, a - b
            half *= 2
        return
    address = row.ctypes.data
    vectors = size // 16
    if pairs:
        _inner_complex(address, vectors)
    else:
        _inner(address, vectors)
    step = 1
    while step < vectors:
        group = min(8, vectors // step)
        for first in range(0, vectors, step * group):
            for i in range(first, first + step):
                if group == 8:
                    _outer3(address + i * 64, step * 64)
                elif group == 4:
                    _outer2(address + i * 64, step * 64)
                else:
                    _outer1(address + i * 64, step * 64)
        step *= group


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
@keyed
def _aligned(size: Any) -> Any:
    """Return an uninitialised array of ``size`` floats on a cache line's boundary."""
    raw = np.empty(size + 16, np.float32)
    return raw[(-raw.ctypes.data // 4) % 16 :][:size]


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
@keyed
def transform_rows(x: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the transforms of the rows of ``x`` (n, size) in [start, stop) to ``out``."""
    size = x.shape[1]
    work = _aligned(size)
    for i in range(start, stop):
        work[:] = x[i]
        _transform(work, size, False)
        out[i] = work


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
@keyed
def transform_complex_rows(x: Any, out: Any, start: Any, stop: Any) -> None:
    """The same for rows of complex numbers, given as floats (n, 2 size)."""
    size = x.shape[1]
    work = _aligned(size)
    for i in range(start, stop):
        work[:] = x[i]
        _transform(work, size, True)
        out[i] = work


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
@keyed
def project_rows(x: Any, signs: Any, scale: Any, out: Any, start: Any, stop: Any) -> None:
    """Write ``scale * (H D3 H D2 H D1 x)`` of the rows of ``x`` (n, dim) in [start, stop) to ``out`` (n, m).

    signs: (blocks, 3, size) float32, size >= dim; scale: (m,) float32, m <= blocks * size.
    """
    dim, size, m = x.shape[1], signs.shape[2], len(scale)
    work = _aligned(size)
    for i in range(start, stop):
        for block in range(signs.shape[0]):
            for j in range(dim):
                work[j] = x[i, j] * signs[block, 0, j]
            work[dim:] = 0.0
            _transform(work, size, False)
            for k in range(1, 3):
                for j in range(size):
                    work[j] *= signs[block, k, j]
                _transform(work, size, False)
            first = block * size
            for j in range(min(size, m - first)):
                out[i, first + j] = work[j] * scale[first + j]


def _warmup() -> None:
    """Compile the kernels; ``quernel warmup`` calls it."""
    x = np.ones((1, 16), np.float32)
    transform_rows(x, np.empty_like(x), 0, 1)
    transform_complex_rows(x, np.empty_like(x), 0, 1)
    project_rows(x, np.ones((1, 3, 16), np.float32), np.ones(16, np.float32), np.empty_like(x), 0, 1)
