"""Kernels of the norm-aware feature map: sixteen powers at a time, each row read once for its norm and once for them.

    phi = [relu(u)^p ; relu(-u)^p]      queries: u = x / max(n, 1e-12), n = ||x||, p = power (0.5 + tanh(rate n))
                                        keys: u = x, p = power

A power is 2^(p log2 a): the logarithm's exponent and mantissa stay apart until the integer part is taken away, so that
results are within a few units in the last place down to the smallest normal number.  A power of 3 is two products.
Rows have unit last stride; strides are counted in floats, addresses are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I16, I32, I64, LANES, Emitter, keyed
from quernel.nn._addresses import pointer
from quernel.nn._polynomials import coefficients_of

f32 = np.float32
# Smallest norm that a query is divided by.
EPS = 1e-12
ROW, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
BYTES = 4 * LANES
# Mantissas are taken from [sqrt(1/2), sqrt(2)), where log2(1 + t) / t is smooth and log2 has no cancellation.
_ROOT_HALF = np.float32(math.sqrt(0.5))
_ROOT_BITS = int(_ROOT_HALF.view(np.int32))
# Adding it to |y| < 2^22 rounds y to an integer, which then stands in the low bits.
_ROUNDER = 1.5 * 2.0**23
_ROUNDER_BITS = int(np.float32(_ROUNDER).view(np.int32))


# Relative errors of 3e-8 and 1e-8, below that of float32.
_LOG = coefficients_of(lambda t: np.log1p(t) / t / math.log(2), math.sqrt(0.5) - 1, math.sqrt(2) - 1, 9)
_EXP = coefficients_of(np.exp2, -0.5, 0.5, 6)


class _Powers:
    """Emits logarithms and powers of vectors."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.builder = e, e.builder

    def constant(self, value: float) -> Any:
        return ir.Constant(ROW, [float(f32(value))] * LANES)

    def word(self, value: int) -> Any:
        return ir.Constant(WORDS, [value] * LANES)

    def absolute(self, x: Any) -> Any:
        bits = self.builder.and_(self.builder.bitcast(x, WORDS), self.word(0x7FFFFFFF))
        return self.builder.bitcast(bits, ROW)

    def split_log2(self, a: Any) -> tuple[Any, Any]:
        """Return the exponent and the logarithm of the mantissa; their sum is log2 a for normal a > 0."""
        b = self.builder
        bits = b.bitcast(a, WORDS)
        exponent = b.ashr(b.sub(bits, self.word(_ROOT_BITS)), self.word(23))
        mantissa = b.bitcast(b.sub(bits, b.shl(exponent, self.word(23))), ROW)
        t = b.fsub(mantissa, self.constant(1.0))
        return b.sitofp(exponent, ROW), b.fmul(t, self._horner(_LOG, t))

    def power(self, a: Any, p: Any) -> Any:
        """Return a^p of a >= 0 and p > 0: 0 below the normal numbers, infinity beyond them, NaN of p stays."""
        b, e = self.builder, self.e
        exponent, rest = self.split_log2(a)
        y = e.fma(p, rest, b.fmul(p, exponent))
        shifted = b.fadd(e.clamp(y, self.constant(-200.0), self.constant(200.0)), self.constant(_ROUNDER))
        whole = b.sub(b.bitcast(shifted, WORDS), self.word(_ROUNDER_BITS))
        part = e.fma(p, rest, e.fma(p, exponent, b.fneg(b.sitofp(whole, ROW))))
        whole = self._between(whole, -127, 128)
        scale = b.bitcast(b.shl(b.add(whole, self.word(127)), self.word(23)), ROW)
        # Beyond the clamped exponents the remainder is far from [-1/2, 1/2].
        part = e.clamp(part, self.constant(-0.5), self.constant(0.5))
        return b.fmul(self._horner(_EXP, part), scale)

    def _between(self, x: Any, low: int, high: int) -> Any:
        b = self.builder
        x = b.select(b.icmp_signed("<", x, self.word(low)), self.word(low), x)
        return b.select(b.icmp_signed(">", x, self.word(high)), self.word(high), x)

    def _horner(self, coefficients: list[float], t: Any) -> Any:
        total = self.constant(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = self.e.fma(total, t, self.constant(c))
        return total


def _over_row(e: Emitter, size: Any, carried: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """Run ``body(byte offset, lanes, *carried)`` over the vectors of a row of ``size`` floats, the last one partial."""
    b = e.builder

    def step(i: Any, *held: Any) -> list[Any]:
        first = b.mul(i, I64(LANES))
        left = b.sub(size, first)
        count = b.select(b.icmp_signed("<", left, I64(LANES)), left, I64(LANES))
        lanes = b.trunc(b.sub(b.shl(I64(1), count), I64(1)), I16)
        return body(b.mul(first, I64(4)), lanes, *held)

    return e.loop(b.ashr(b.add(size, I64(LANES - 1)), I64(4)), carried, step)


def _signed(b: Any, x: Any, zero: Any) -> tuple[Any, Any]:
    """Return masks of what is not positive and of what is not negative; NaN is neither."""
    return b.fcmp_ordered("<=", x, zero), b.fcmp_ordered(">=", x, zero)


def make_features(cube: bool, portable: bool | None = None) -> Any:
    """Return ``features(row, place, size, p, inverse)``: both parts of (row * inverse)^p, ``size`` floats apart."""

    @intrinsic
    def features(typing: Any, row: Any, place: Any, size: Any, p: Any, inverse: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, place, size, p, inverse = args
            e = Emitter(builder, portable)
            powers, zero = _Powers(e), e.zeros(ROW)
            ps, inverses, other = e.splat(p), e.splat(inverse), e.offset(place, size, 4)

            def body(at: Any, lanes: Any) -> list[Any]:
                x = e.load_some(builder.add(row, at), ROW, lanes)
                a = powers.absolute(x)
                if cube:
                    value = builder.fmul(builder.fmul(a, a), a)
                else:
                    value = powers.power(builder.fmul(a, inverses), ps)
                    # Logarithms of NaN are numbers.
                    value = builder.select(builder.fcmp_unordered("uno", x, x), x, value)
                not_positive, not_negative = _signed(builder, x, zero)
                e.store_some(builder.select(not_positive, zero, value), builder.add(place, at), lanes)
                e.store_some(builder.select(not_negative, zero, value), builder.add(other, at), lanes)
                return []

            _over_row(e, size, [], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3, types.float32, types.float32), emit

    return features


def make_slopes(cube: bool, portable: bool | None = None) -> Any:
    """Return ``slopes(row, phi, grad, out, size, p, inverse, sums)``: the gradient by u = row * inverse, into ``out``.

    ``sums`` gets two floats: the sum of grad * phi, and that of grad * phi * log(|u|), the slope of the power.
    """

    @intrinsic
    def slopes(typing: Any, row: Any, phi: Any, grad: Any, out: Any, size: Any, p: Any, inverse: Any, sums: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, phi, grad, out, size, p, inverse, sums = args
            e = Emitter(builder, portable)
            powers, zero = _Powers(e), e.zeros(ROW)
            ps, inverses = e.splat(p), e.splat(inverse)
            other_phi, other_grad = e.offset(phi, size, 4), e.offset(grad, size, 4)

            def body(at: Any, lanes: Any, total: Any, slope: Any) -> list[Any]:
                u = builder.fmul(e.load_some(builder.add(row, at), ROW, lanes), inverses)
                not_positive, not_negative = _signed(builder, u, zero)
                positive, negative = (e.load_some(builder.add(g, at), ROW, lanes) for g in (grad, other_grad))
                g = builder.select(not_positive, negative, positive)
                if cube:
                    change = builder.fmul(builder.fmul(powers.constant(3.0), u), builder.fmul(u, g))
                    gv = zero
                else:
                    here, there = (e.load_some(builder.add(f, at), ROW, lanes) for f in (phi, other_phi))
                    gv = builder.fmul(g, builder.fadd(here, there))
                    a = powers.absolute(u)
                    exponent, rest = powers.split_log2(a)
                    # gv is 0 where u is, and the logarithm a number.
                    log = builder.fmul(builder.fadd(exponent, rest), powers.constant(math.log(2)))
                    slope = e.fma(gv, log, slope)
                    change = builder.fdiv(builder.fmul(ps, gv), a)
                change = builder.select(not_positive, builder.fneg(change), change)
                zeros = builder.and_(not_positive, not_negative)
                e.store_some(builder.select(zeros, zero, change), builder.add(out, at), lanes)
                return [builder.fadd(total, gv), slope]

            total, slope = _over_row(e, size, [zero, zero], body)
            e.store(e.reduce_add(total), sums)
            e.store(e.reduce_add(slope), builder.add(sums, I64(4)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32, types.float32, types.int64), emit

    return slopes


def make_square(portable: bool | None = None) -> Any:
    """Return ``square(row, size)``: the sum of squares of a row."""

    @intrinsic
    def square(typing: Any, row: Any, size: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row, size = args
            e = Emitter(builder, portable)

            def body(at: Any, lanes: Any, total: Any) -> list[Any]:
                x = e.load_some(builder.add(row, at), ROW, lanes)
                return [e.fma(x, x, total)]

            return e.reduce_add(_over_row(e, size, [e.zeros(ROW)], body)[0])

        return types.float32(types.int64, types.int64), emit

    return square


def make_combine(portable: bool | None = None) -> Any:
    """Return ``combine(out, row, size, scale, weight)``: ``out = scale * out + weight * row``."""

    @intrinsic
    def combine(typing: Any, out: Any, row: Any, size: Any, scale: Any, weight: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, row, size, scale, weight = args
            e = Emitter(builder, portable)
            scales, weights = e.splat(scale), e.splat(weight)

            def body(at: Any, lanes: Any) -> list[Any]:
                place = builder.add(out, at)
                y = builder.fmul(scales, e.load_some(place, ROW, lanes))
                e.store_some(e.fma(weights, e.load_some(builder.add(row, at), ROW, lanes), y), place, lanes)
                return []

            _over_row(e, size, [], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3, types.float32, types.float32), emit

    return combine


_powers, _cubes = make_features(False), make_features(True)
_power_slopes, _cube_slopes = make_slopes(False), make_slopes(True)
_square, _combine = make_square(), make_combine()


@njit(nogil=True, cache=True, fastmath=False)
def _row(x: Any, sizes: Any, item: Any) -> Any:
    """Return the address of a row and the number of its head."""
    pair, token = item // sizes[1], item % sizes[1]
    head = pair % sizes[0]
    return x[0] + 4 * (pair // sizes[0] * x[1] + head * x[2] + token * x[3]), head


@njit(nogil=True, cache=True, fastmath=False)
def _tanh(x: Any) -> Any:
    """Return tanh to 1e-16, absolute, of a float64 that is not negative; the library's takes twice as long."""
    e = math.exp(-2.0 * x)
    return (1.0 - e) / (1.0 + e)


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def write_features(x: Any, sizes: Any, rates: Any, power: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the features of the rows from ``start`` to ``stop``.

    x: (address, stride of batch, head, token)  sizes: (H, N, D)  rates: (H,), empty for keys
    out: address of (B, H, N, 2 D), dense
    """
    size = sizes[2]
    for item in range(start, stop):
        row, head = _row(x, sizes, item)
        place = out + 8 * item * size
        if rates.size > 0:
            norm = math.sqrt(_square(row, size))
            _powers(row, place, size, f32(power * (0.5 + _tanh(norm * rates[head]))), f32(1.0 / max(norm, EPS)))
        elif power == 3.0:
            _cubes(row, place, size, f32(3.0), f32(1.0))
        else:
            _powers(row, place, size, f32(power), f32(1.0))


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def write_gradients(
    x: Any, sizes: Any, rates: Any, power: Any, phi: Any, grad: Any, out: Any, slopes: Any, start: Any, stop: Any
) -> None:
    """Write the gradients of the rows from ``start`` to ``stop``; phi, grad: addresses like that of the features.

    out: address of (B, H, N, D), dense  slopes: (B H N,) by the rate, for queries
    """
    size = sizes[2]
    spare = np.empty(2, np.float32)
    sums = spare.ctypes.data
    for item in range(start, stop):
        row, head = _row(x, sizes, item)
        features, given, place = phi + 8 * item * size, grad + 8 * item * size, out + 4 * item * size
        if rates.size == 0:
            if power == 3.0:
                _cube_slopes(row, features, given, place, size, f32(3.0), f32(1.0), sums)
            else:
                _power_slopes(row, features, given, place, size, f32(power), f32(1.0), sums)
            continue
        norm = math.sqrt(_square(row, size))
        turn = _tanh(norm * rates[head])
        p = power * (0.5 + turn)
        inverse = 1.0 / max(norm, EPS)
        _power_slopes(row, features, given, place, size, f32(p), f32(inverse), sums)
        found = carray(pointer(sums), (2,), f32)
        steep = found[1] * power * (1.0 - turn * turn)
        slopes[item] = steep * norm
        # By the norm, through the power; and what the division by the norm takes from the direction.
        weight = steep * rates[head] / norm if norm > 0.0 else 0.0
        if norm > EPS:
            weight -= p * found[0] * inverse * inverse
        _combine(place, row, size, f32(inverse), f32(weight))
