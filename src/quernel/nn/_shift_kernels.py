"""Compiled kernels of power-of-two weights in 5 or 6 bits: products with few rows, and expansion to a float matrix.

A weight is zero or sign * 2^(m - top), m its magnitude code. Decoding places bits: m + 127 - top is the exponent of a
bfloat16, which holds every power exactly, and the sign goes on top. Activations come as the sum of two bfloat16
numbers, so a product keeps 16 bits of each; sums are float32. Scales come last, an output at a time.

Codes lie in blocks of 64 weights of a row (``BLOCK``): 32 bytes with the low four bits of m, weight i in the low and
weight 32 + i in the high half of byte i; eight bytes of sign bits; with 6 bits eight bytes of the top bits of m.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I8, I16, I32, I64, LANES, Emitter, keyed

f32, u8, u16, u32, u64 = np.float32, np.uint8, np.uint16, np.uint32, np.uint64

BLOCK = 64
HALF = BLOCK // 2
# Rows of the weight that share one load of x.
ROWS = 4
SUMS, HALVES, OCTETS = ir.VectorType(F32, LANES), ir.VectorType(I16, HALF), ir.VectorType(I8, HALF)


def block_bytes(bits: int) -> int:
    """Return the bytes of a block of 64 weights."""
    return 8 * bits


def top_exponent(bits: int) -> int:
    """Return the magnitude code of 2^0, the largest one."""
    return 2 ** (bits - 1) - 1


def make_dot(bits: int, plain: bool | None = None) -> Any:
    """Return ``dot(codes, stride, x, blocks, out)``: four rows of codes times one row of activations.

    codes: address of the first row, rows ``stride`` bytes apart  x: address of ``blocks`` times 64 bfloat16 numbers and
    64 that are added to them  out: address of four floats
    """

    def words(value: int) -> Any:
        return ir.Constant(HALVES, [value] * HALF)

    @intrinsic
    def dot(typing: Any, codes: Any, stride: Any, x: Any, blocks: Any, out: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, stride, x, blocks, out = args
            e = Emitter(builder, plain)

            def powers(place: Any, half: int) -> Any:
                octets = builder.zext(e.load(place, OCTETS), HALVES)
                m = builder.lshr(octets, words(4)) if half else builder.and_(octets, words(15))
                if bits == 6:
                    above = _mask(e, builder.add(place, I64(40 + 4 * half)))
                    m = builder.select(above, builder.or_(m, words(16)), m)
                exponent = builder.shl(builder.add(m, words(127 - top_exponent(bits))), words(7))
                power = builder.select(builder.icmp_unsigned("!=", m, words(0)), exponent, words(0))
                negative = _mask(e, builder.add(place, I64(32 + 4 * half)))
                return builder.select(negative, builder.add(power, words(-32768)), power)

            def step(index: Any, *sums: Any) -> list[Any]:
                inputs = e.offset(x, index, 4 * BLOCK)
                parts = [e.load(builder.add(inputs, I64(BLOCK * part)), HALVES) for part in range(4)]
                following = list(sums)
                for row in range(ROWS):
                    place = builder.add(builder.mul(stride, I64(row)), e.offset(codes, index, block_bytes(bits)))
                    for half in range(2):
                        w = powers(place, half)
                        for part in range(2):  # the rounded number and what is added to it, in sums of their own
                            i = 2 * row + part
                            following[i] = e.dot2_bf16(following[i], w, parts[2 * part + half])
                return following

            sums = e.loop(blocks, [e.zeros(SUMS)] * (2 * ROWS), step)
            for row in range(ROWS):
                total = e.reduce_add(builder.fadd(sums[2 * row], sums[2 * row + 1]))
                e.store(total, builder.add(out, I64(4 * row)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), emit

    return dot


def _mask(e: Emitter, place: Any) -> Any:
    return e.builder.bitcast(e.load(place, I32), ir.VectorType(BIT, HALF))


_dot_5, _dot_6 = make_dot(5), make_dot(6)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def products(codes: Any, bits: Any, x: Any, scale: Any, bias: Any, out: Any, start: Any, stop: Any) -> None:
    """Write ``out[n, o] = scale[o] * (x[n] . w[o]) + bias[o]`` for the blocks of four rows from ``start`` to ``stop``.

    codes: (rows, blocks, block_bytes), rows a multiple of four  x: (n, blocks, 2, 64) bfloat16 bits
    scale, bias: (out_features,)  out: (n, out_features)
    """
    blocks, stride = codes.shape[1], codes.shape[1] * codes.shape[2]
    sums = np.empty(ROWS, f32)
    for group in range(start, stop):
        first = ROWS * group
        address = codes.ctypes.data + first * stride
        for i in range(len(x)):
            if bits == 5:
                _dot_5(address, stride, x[i].ctypes.data, blocks, sums.ctypes.data)
            else:
                _dot_6(address, stride, x[i].ctypes.data, blocks, sums.ctypes.data)
            for row in range(min(ROWS, len(scale) - first)):
                out[i, first + row] = sums[row] * scale[first + row] + bias[first + row]


@njit(nogil=True, cache=True, fastmath=False)
def expand(codes: Any, bits: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the powers of the rows from ``start`` to ``stop`` as bits of float32 (uint32) or bfloat16 (uint16).

    codes: (rows, blocks, block_bytes)  out: (stop - start, columns)
    """
    columns, top = out.shape[1], (1 << (bits - 1)) - 1
    drop = 32 - 8 * out.itemsize
    block = np.empty(BLOCK, u32)
    for row in range(start, stop):
        for b in range(codes.shape[1]):
            held = codes[row, b]
            signs, above = u64(0), u64(0)
            for i in range(8):
                signs |= u64(held[32 + i]) << u64(8 * i)
                if bits == 6:
                    above |= u64(held[40 + i]) << u64(8 * i)
            for i in range(HALF):
                block[i] = held[i] & u8(15)
                block[HALF + i] = held[i] >> u8(4)
            for i in range(BLOCK):
                m = block[i] | (u32((above >> u64(i)) & u64(1)) << u32(4))
                power = u32(m + u32(127 - top)) << u32(23)
                negative = u32((signs >> u64(i)) & u64(1)) << u32(31)
                block[i] = u32((power if m > u32(0) else u32(0)) | negative) >> u32(drop)
            first = b * BLOCK
            for i in range(min(BLOCK, columns - first)):
                out[row - start, first + i] = block[i]
