"""Compiled passes around an int8 matrix product: quantise rows before it, dequantise and activate after it.

They are C functions of addresses and sizes, called from Numba (``_int8_chain``) without Python in between. bfloat16
enters and leaves as its uint16 bits. Rounding is half to even, by adding and reading back 1.5 * 2^23: the low byte of
the sum is the code. Row maxima are taken over the bits of |x| as integers, which order like the floats and put NaN and
infinity on top, so that a row which holds one is seen without a test per element. Each pass is one vectorised loop
without calls; one function is compiled per combination in use.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from quernel.nn._addresses import pointer

f32, f64, i8, i32, i64, u16, u32 = np.float32, np.float64, np.int8, np.int32, np.int64, np.uint16, np.uint32

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

# Adding this leaves the rounded integer in the low bits of the sum, for |x| < 2^22.
ROUND = f32(1.5 * 2**23)
MAGNITUDE, INFINITY = i32(0x7FFFFFFF), i32(0x7F800000)
# The reciprocal of anything smaller, times 127, would overflow float32: such rows count as zero.
SMALLEST = f32(1e-36)
ZERO, ONE, NAN = f32(0), f32(1), f32(np.nan)

# Products may be fused into sums where the result is rounded to the output anyway. Never in the quantisers:
# their codes must not depend on whether the CPU has a fused multiply-add.
FUSED = {"contract"}


@functools.cache
def quantiser(bf16: bool, smooth: bool, bound: bool) -> Any:
    """Return the C function ``(x, inverse, levels, alpha, codes, steps, n, k)``: rows to int8 codes and a step each.

    All arguments are int64: addresses of contiguous memory, sizes, and for ``alpha`` the bits of a double.

    Parameters
    ----------
    bf16 : bool
        Whether ``x``, shape (n, k), is bfloat16; else it is float32.
    smooth : bool
        Whether columns are multiplied by ``inverse``, shape (k,), float32; else it is not read.
    bound : bool
        Step ``max|x|^alpha / levels`` with clamping; else ``max|x * inverse| / levels``, which never clips.

    Notes
    -----
    It writes ``codes``, shape (n, k), int8, and ``steps``, shape (n,), float32: 0 for a row that is zero
    or below 1e-36, NaN for a row with a NaN or an infinity.
    """
    dtype = u16 if bf16 else f32

    @cfunc(types.void(*[types.int64] * 8), cache=True, fastmath=False)
    def passed(x: Any, inverse: Any, levels: Any, alpha: Any, codes: Any, steps: Any, n: Any, k: Any) -> None:
        rows, factors = carray(pointer(x), (n, k), dtype), carray(pointer(inverse), (k,), f32)
        q, step = carray(pointer(codes), (n, k), i8), carray(pointer(steps), (n,), f32)
        limit, exponent = f32(levels), i64(alpha).view(f64)
        for i in range(n):
            top = i32(0)
            for j in range(k):
                v = _from_bf16(rows[i, j]) if bf16 else f32(rows[i, j])
                if smooth and not bound:
                    v = v * factors[j]
                top = max(top, i32(f32(v).view(i32) & MAGNITUDE))
            largest = i32(top).view(f32)
            if bound:
                largest = f32(f64(largest) ** exponent) if largest >= SMALLEST else largest
            if top >= INFINITY:
                step[i], factor = NAN, ZERO
            elif largest < SMALLEST:
                step[i], factor = ZERO, ZERO
            else:
                step[i], factor = largest / limit, limit / largest
            for j in range(k):
                v = _from_bf16(rows[i, j]) if bf16 else f32(rows[i, j])
                if smooth:
                    v = v * factors[j]
                v = v * factor
                if bound:
                    v = limit if v > limit else v
                    v = -limit if v < -limit else v
                q[i, j] = i8(f32(v + ROUND).view(i32))

    return passed


@functools.cache
def dequantiser(bf16: bool, activation: int) -> Any:
    """Return the C function ``(sums, steps, scale, bias, out, n, m)`` of addresses and sizes, all int64.

    It writes ``out = activation(sums * steps[:, None] * scale + bias)``, shape (n, m): ``sums`` int32, vectors float32,
    ``out`` float32 or bfloat16, rounded half to even.
    """
    dtype = u16 if bf16 else f32

    @cfunc(types.void(*[types.int64] * 7), cache=True, fastmath=FUSED, error_model="numpy")
    def passed(sums: Any, steps: Any, scale: Any, bias: Any, out: Any, n: Any, m: Any) -> None:
        z, y_out = carray(pointer(sums), (n, m), i32), carray(pointer(out), (n, m), dtype)
        step, column, offset = (
            carray(pointer(steps), (n,), f32),
            carray(pointer(scale), (m,), f32),
            carray(pointer(bias), (m,), f32),
        )
        for i in range(n):
            row = step[i]
            for j in range(m):
                y = f32(z[i, j]) * (row * column[j]) + offset[j]
                if activation == 1:
                    y = _relu(y)
                elif activation == 2:
                    y = _gelu(y)
                elif activation == 3:
                    y = _gelu_tanh(y)
                elif activation == 4:
                    y = _silu(y)
                y_out[i, j] = _to_bf16(y) if bf16 else y

    return passed


@njit(nogil=True, cache=True, fastmath=False)
def _from_bf16(bits: Any) -> Any:
    return u32(u32(bits) << u32(16)).view(f32)


@njit(nogil=True, cache=True, fastmath=False)
def _to_bf16(y: Any) -> Any:
    bits = f32(y).view(u32)
    # Half to even; a NaN stays one because arithmetic only makes the quiet NaN 0x7FC00000.
    return u16(u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16))


@njit(nogil=True, cache=True, fastmath=FUSED)
def _relu(y: Any) -> Any:
    return ZERO if y < ZERO else y  # this way round NaN passes


# GELU(y) = max(y, 0) - a F(-a) with a = |y| and F the normal distribution function, or its tanh approximation.
# A root of F(-a) is so smooth that a short polynomial on [0, END] does: F(-a) = P(a)^8 here, P(a)^16 for tanh.
# Beyond END the remainder a F(-a) is below 1e-7.  Coefficients: minimax fit of a F(-a) with the weight
# 1 / (a F(-a) + 1e-3), tests/reference/gelu.py.  Evaluated in pairs (Estrin), which shortens the chain of sums.
GELU_END, TANH_END = f32(5.6), f32(5.3)
GELU = tuple(
    f32(c)
    for c in (
        0.917004,
        -0.09145689,
        -0.031931482,
        -0.0006642775,
        0.0014960774,
        3.9079543e-05,
        -6.177088e-05,
        7.72611e-06,
        -3.1202674e-07,
    )
)
TANH = tuple(
    f32(c)
    for c in (
        0.95760304,
        -0.047744144,
        -0.017935969,
        -0.0009593612,
        0.00018480203,
        0.00038992643,
        -0.00022400853,
        5.4555087e-05,
        -6.245348e-06,
        2.7683438e-07,
    )
)
# 2^x on [-1/2, 1/2], relative error 8e-8.
EXP2 = tuple(f32(c) for c in (1.0000001, 0.69314694, 0.2402212, 0.05550713, 0.009675542, 0.0013276472))


@njit(nogil=True, cache=True, fastmath=FUSED)
def _gelu(y: Any) -> Any:
    a = abs(y)
    u = a if a < GELU_END else GELU_END
    v = u * u
    w = v * v
    low = (GELU[0] + GELU[1] * u) + (GELU[2] + GELU[3] * u) * v
    p = low + ((GELU[4] + GELU[5] * u) + (GELU[6] + GELU[7] * u) * v + GELU[8] * w) * w
    p = p * p
    p = p * p
    p = p * p
    return _relu(y) - u * p


@njit(nogil=True, cache=True, fastmath=FUSED)
def _gelu_tanh(y: Any) -> Any:
    a = abs(y)
    u = a if a < TANH_END else TANH_END
    v = u * u
    p = (TANH[0] + TANH[1] * u) + (TANH[2] + TANH[3] * u) * v
    p = p + ((TANH[4] + TANH[5] * u) + (TANH[6] + TANH[7] * u) * v + (TANH[8] + TANH[9] * u) * (v * v)) * (v * v)
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    return _relu(y) - u * p


@njit(nogil=True, cache=True, fastmath=FUSED, error_model="numpy")
def _silu(y: Any) -> Any:
    # y / (1 + 2^t), t = -y log2(e), kept where 2^t is a normal number.
    t = y * f32(-1.44269504)
    t = t if t < f32(126) else f32(126)
    t = t if t > f32(-126) else f32(-126)
    whole = f32(t + ROUND)
    r = t - (whole - ROUND)
    s = r * r
    p = (EXP2[0] + EXP2[1] * r) + ((EXP2[2] + EXP2[3] * r) + (EXP2[4] + EXP2[5] * r) * s) * s
    # The integer sits in the low bits of `whole`; moved to the exponent field, ROUND's own bits fall off the top.
    power = i32(f32(p).view(i32) + i32(whole.view(i32) << i32(23))).view(f32)
    return y / (ONE + power)
