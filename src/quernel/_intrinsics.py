"""Vector instructions for Numba kernels that its own vectoriser does not find: VNNI, FMA, expand-load.

An ``Emitter`` writes LLVM IR inside the code generator of a ``numba.extending.intrinsic``; each of its
operations has a portable form, plain IR for any processor, with bit-equal integers. The portable form is
taken where AVX-512 + VNNI is lacking, or everywhere with ``QUERNEL_PORTABLE=1``. ``make_*`` build ready
intrinsics; a kernel file calls them once at module level. Arguments are int64 addresses: read
``array.ctypes.data`` inside the jitted function, from Python it costs a microsecond each.

Numba's disk cache watches the file of the jitted function only. ``keyed`` puts the chosen path and the text
of this file into the cache key, so it stands under ``@njit`` of every function that reaches an intrinsic::

    _dot = make_dot_u8s8()

    @njit(nogil=True, cache=True, fastmath=False)
    @keyed
    def kernel(a, b): return _dot(a.ctypes.data, b.ctypes.data, a.size)
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

VECTOR_FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"})

BIT, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
LANES = 16  # 32-bit lanes of a 512-bit vector


@functools.cache
def target_features() -> frozenset[str]:
    """Return the processor features that Numba compiles for, e.g. ``"avx512vnni"``."""
    # The code generator's own list honours NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX, the bare host's does not.
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


@functools.cache
def portable() -> bool:
    """Whether kernels take the portable path: no AVX-512 + VNNI here, or ``QUERNEL_PORTABLE=1``."""
    return os.environ.get("QUERNEL_PORTABLE") == "1" or not target_features() >= VECTOR_FEATURES


def keyed(function: Function) -> Function:
    """Give a function to be jitted a name of its own in Numba's disk cache a path and version of this file."""
    function.__qualname__ += f"_{'portable' if portable() else 'vector'}_{_digest(__file__)}"
    return function


def keyed_with(*files: str) -> Callable[[Function], Function]:
    """Return ``keyed`` for functions whose intrinsics are written in other files than their own, named here."""

    def mark(function: Function) -> Function:
        keyed(function).__qualname__ += "".join(f"_{_digest(file)}" for file in files)
        return function

    return mark


class Emitter:
    """Writes IR at the place of a builder; made inside the code generator of an intrinsic.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
        As Numba hands it to the code generator.
    portable : bool, optional
        Which form to emit; default ``portable()``.
    """

    def __init__(self, builder: Any, portable: bool | None = None) -> None:
        self.builder = builder
        self.portable = _chosen(portable)

    def load(self, address: Any, kind: Any, align: int = 1) -> Any:
        """Load a value of LLVM type ``kind``; a wrong ``align`` faults, 1 is always right."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        """Store a value."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def load_some(self, address: Any, kind: Any, mask: Any) -> Any:
        """Load the lanes of vector type ``kind`` whose bit of ``mask`` is set; the others are zero and not read."""
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        lanes = self.builder.bitcast(mask, ir.VectorType(BIT, kind.count))
        name = f"llvm.masked.load.{_mangled(kind)}.p0{_mangled(kind)}"
        return self._call(name, kind, [pointer, I32(1), lanes, self.zeros(kind)])

    def store_some(self, value: Any, address: Any, mask: Any) -> None:
        """Store the lanes of a vector whose bit of ``mask`` is set; the memory of the others is not touched."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        lanes = self.builder.bitcast(mask, ir.VectorType(BIT, value.type.count))
        name = f"llvm.masked.store.{_mangled(value.type)}.p0{_mangled(value.type)}"
        self._call(name, ir.VoidType(), [value, pointer, I32(1), lanes])

    def prefetch(self, address: Any) -> None:
        """Fetch the cache line of an address, which need not be valid, ahead of its use."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        self._call("llvm.prefetch.p0i8", ir.VoidType(), [pointer, I32(0), I32(3), I32(1)])

    def floats(self, vector: Any) -> Any:
        """Return float32 lanes of a vector of float32, of int8, or of int16 that are the bits of finite float16."""
        element, wide = vector.type.element, ir.VectorType(F32, vector.type.count)
        if isinstance(element, ir.FloatType):
            return vector
        if element.width == 8:
            return self.builder.sitofp(vector, wide)
        if not self.portable:
            return self.builder.fpext(
                self.builder.bitcast(vector, ir.VectorType(ir.HalfType(), vector.type.count)), wide
            )
        # Exponents of float32 are 112 larger; the product also brings subnormal numbers to their place.
        words = ir.VectorType(I32, vector.type.count)
        bits = self.builder.zext(vector, words)
        magnitude = self.builder.shl(self.builder.and_(bits, self._words(words, 0x7FFF)), self._words(words, 13))
        value = self.builder.fmul(self.builder.bitcast(magnitude, wide), ir.Constant(wide, [2.0**112] * wide.count))
        sign = self.builder.shl(self.builder.and_(bits, self._words(words, 0x8000)), self._words(words, 16))
        return self.builder.bitcast(self.builder.or_(self.builder.bitcast(value, words), sign), wide)

    def offset(self, address: Any, index: Any, size: int) -> Any:
        """Return ``address + index * size``."""
        return self.builder.add(address, self.builder.mul(index, ir.Constant(I64, size)))

    def zeros(self, kind: Any) -> Any:
        """Return the zero of an LLVM type."""
        return ir.Constant(kind, None)

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        """Return a vector of equal lanes."""
        one = self.builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0))
        indices = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.builder.shuffle_vector(one, one, indices)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """Return the named lanes of two vectors, those of ``b`` numbered behind those of ``a``."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def clamp(self, value: Any, low: Any, high: Any) -> Any:
        """Return ``max(min(value, high), low)`` of floats; NaN passes."""
        value = self.builder.select(self.builder.fcmp_ordered(">", value, high), high, value)
        return self.builder.select(self.builder.fcmp_ordered("<", value, low), low, value)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return ``a * b + c``; rounded once where the processor has FMA, else twice."""
        if self.portable and "fma" not in target_features():
            return self.builder.fadd(self.builder.fmul(a, b), c)
        return self._call(f"llvm.fma.{_mangled(a.type)}", a.type, [a, b, c])

    def sqrt(self, x: Any) -> Any:
        """Return the square root of a float or of each lane of a vector."""
        return self._call(f"llvm.sqrt.{_mangled(x.type)}", x.type, [x])

    def dot4_u8s8(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """Return ``total`` (16 x i32) plus four products a lane of u8 and s8 (64 x i8 each); wraps around."""
        words = ir.VectorType(I32, LANES)
        if not self.portable:
            # Three <16 x i32>: the form of all LLVM versions, rewritten while parsing by the newer ones.
            operands = [total, *(self.builder.bitcast(v, words) for v in (unsigned, signed))]
            return self._call("llvm.x86.avx512.vpdpbusd.512", words, operands)
        wide = ir.VectorType(I32, 4 * LANES)
        products = self.builder.mul(self.builder.zext(unsigned, wide), self.builder.sext(signed, wide))
        for first in range(4):
            lanes = ir.Constant(words, list(range(first, 4 * LANES, 4)))
            total = self.builder.add(total, self.builder.shuffle_vector(products, products, lanes))
        return total

    def lookup16(self, table: Any, indices: Any) -> Any:
        """Return ``table[indices]`` bytewise (64 x i8 each); each lane of 16 bytes has its own 16 entries."""
        if not self.portable:
            return self._call("llvm.x86.avx512.pshuf.b.512", table.type, [table, indices])
        found = self.zeros(table.type)
        for entry in range(16):
            places = [octet // 16 * 16 + entry for octet in range(64)]
            value = self.builder.shuffle_vector(table, table, ir.Constant(ir.VectorType(I32, 64), places))
            here = self.builder.icmp_unsigned("==", indices, ir.Constant(indices.type, [entry] * 64))
            found = self.builder.select(here, value, found)
        return found

    def dot2_bf16(self, total: Any, left: Any, right: Any) -> Any:
        """Return ``total`` (16 x float) plus two products a lane of bfloat16 (32 x i16 each), summed in float32.

        The instruction (AVX512-BF16) takes subnormal numbers as zero and may round otherwise than the portable form.
        """
        words = ir.VectorType(I32, LANES)
        if not self.portable and "avx512bf16" in target_features():
            # Three operands of the older form, rewritten while parsing by newer versions.
            operands = [total, *(self.builder.bitcast(v, words) for v in (left, right))]
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, operands)
        pairs = [self.builder.bitcast(v, words) for v in (left, right)]
        odd = [self.builder.and_(v, ir.Constant(words, [-65536] * LANES)) for v in pairs]
        even = [self.builder.shl(v, ir.Constant(words, [16] * LANES)) for v in pairs]
        for half in (even, odd):
            a, b = (self.builder.bitcast(v, total.type) for v in half)
            total = self.fma(a, b, total)
        return total

    def expand_load(self, address: Any, mask: Any, element: Any = F32) -> Any:
        """Load consecutive elements into the lanes whose bit of ``mask`` is set, zero in the others.

        The mask (i16, or i32 with 16-bit elements) has a bit for each lane. Exactly ``popcount(mask)`` elements are
        read. 16-bit elements need AVX512-VBMI2, else the portable form.
        """
        lanes = mask.type.width
        kind = ir.VectorType(element, lanes)
        available = isinstance(element, ir.FloatType) or element.width >= 32 or "avx512vbmi2" in target_features()
        if not self.portable and available:
            pointer = self.builder.inttoptr(address, element.as_pointer())
            bits = self.builder.bitcast(mask, ir.VectorType(BIT, lanes))
            return self._call(f"llvm.masked.expandload.{_mangled(kind)}", kind, [pointer, bits, self.zeros(kind)])
        size = 4 if isinstance(element, ir.FloatType) else element.width // 8
        result = cgutils.alloca_once_value(self.builder, self.zeros(kind))
        for lane in range(lanes):
            bit = self.builder.and_(mask, mask.type(1 << lane))
            with self.builder.if_then(self.builder.icmp_unsigned("!=", bit, mask.type(0))):
                below = self.builder.ctpop(self.builder.and_(mask, mask.type((1 << lane) - 1)))
                value = self.load(self.offset(address, self.builder.zext(below, I64), size), element)
                vector = self.builder.insert_element(self.builder.load(result), value, I32(lane))
                self.builder.store(vector, result)
        return self.builder.load(result)

    def reduce_add(self, vector: Any) -> Any:
        """Return the sum of the lanes; of floats in the order of a binary tree, which all paths share."""
        lanes = vector.type.count
        add = self.builder.fadd if isinstance(vector.type.element, ir.FloatType) else self.builder.add
        while lanes > 1:
            half = ir.Constant(ir.VectorType(I32, lanes // 2), list(range(lanes // 2)))
            rest = ir.Constant(ir.VectorType(I32, lanes // 2), list(range(lanes // 2, lanes)))
            low, high = (self.builder.shuffle_vector(vector, vector, part) for part in (half, rest))
            vector, lanes = add(low, high), lanes // 2
        return self.builder.extract_element(vector, I32(0))

    def loop(self, count: Any, carried: Sequence[Any], body: Callable[..., Sequence[Any]]) -> list[Any]:
        """Run ``body(index, *carried)``, which returns the next carried values, ``count`` (i64) times."""
        before = self.builder.block
        head, inside, done = (self.builder.append_basic_block(name) for name in ("head", "body", "done"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        held = [self.builder.phi(value.type) for value in carried]
        self.builder.cbranch(self.builder.icmp_signed("<", index, count), inside, done)
        self.builder.position_at_end(inside)
        following = [self.builder.add(index, I64(1)), *body(index, *held)]
        # Where the body ended: it may have opened blocks of its own.
        after = self.builder.block
        self.builder.branch(head)
        for phi, first, following_value in zip([index, *held], [I64(0), *carried], following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(following_value, after)
        self.builder.position_at_end(done)
        return held

    @staticmethod
    def _words(kind: Any, value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def _call(self, name: str, returns: Any, operands: Sequence[Any]) -> Any:
        signature = ir.FunctionType(returns, [operand.type for operand in operands])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, operands)


def make_dot_u8s8(portable: bool | None = None) -> Any:
    """Return ``dot(unsigned_address, signed_address, n) -> int32``: products of n bytes, summed with wrap-around."""
    words, octets = ir.VectorType(I32, LANES), ir.VectorType(I8, 4 * LANES)

    @intrinsic
    def dot(typing: Any, unsigned: Any, signed: Any, n: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            unsigned, signed, n = args
            e = Emitter(builder, portable)

            def step(index: Any, total: Any) -> list[Any]:
                u, s = (e.load(e.offset(address, index, 64), octets) for address in (unsigned, signed))
                return [e.dot4_u8s8(total, u, s)]

            blocks = builder.ashr(n, I64(6))
            (total,) = e.loop(blocks, [e.zeros(words)], step)
            start = builder.shl(blocks, I64(6))

            def single(index: Any, total: Any) -> list[Any]:
                u, s = (e.load(builder.add(address, builder.add(start, index)), I8) for address in (unsigned, signed))
                return [builder.add(total, builder.mul(builder.zext(u, I32), builder.sext(s, I32)))]

            return e.loop(builder.sub(n, start), [e.reduce_add(total)], single)[0]

        return types.int32(types.int64, types.int64, types.int64), emit

    return dot


def make_axpy_f32(portable: bool | None = None) -> Any:
    """Return ``axpy(y_address, x_address, scale, n)``: ``y += scale * x`` over n floats, by FMA."""
    row = ir.VectorType(F32, LANES)

    @intrinsic
    def axpy(typing: Any, y: Any, x: Any, scale: Any, n: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            y, x, scale, n = args
            e = Emitter(builder, portable)

            def update(index: Any, kind: Any, factor: Any, size: int) -> list[Any]:
                place = e.offset(y, index, size)
                e.store(e.fma(e.load(e.offset(x, index, size), kind), factor, e.load(place, kind)), place)
                return []

            factor = e.splat(scale)
            blocks = builder.ashr(n, I64(4))
            e.loop(blocks, [], lambda index: update(index, row, factor, 64))
            start = builder.shl(blocks, I64(4))
            rest = builder.sub(n, start)
            e.loop(rest, [], lambda index: update(builder.add(start, index), F32, scale, 4))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.int64), emit

    return axpy


def make_expand_f32(portable: bool | None = None) -> Any:
    """Return ``expand(out_address, values_address, bitmap) -> int64``: 64 floats from a bitmap and its packed values.

    Lane i of the 64 gets the next value where bit i is set, else zero; returns the number of values read.
    """

    @intrinsic
    def expand(typing: Any, out: Any, values: Any, bitmap: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, values, bitmap = args
            e = Emitter(builder, portable)
            read = I64(0)
            for quarter in range(4):
                mask = builder.trunc(builder.lshr(bitmap, I64(16 * quarter)), I16)
                row = e.expand_load(e.offset(values, read, 4), mask)
                e.store(row, builder.add(out, I64(64 * quarter)))
                read = builder.add(read, builder.zext(builder.ctpop(mask), I64))
            return read

        return types.int64(types.int64, types.int64, types.uint64), emit

    return expand


def _chosen(path: bool | None) -> bool:
    return portable() if path is None else path


def _mangled(kind: Any) -> str:
    """Return the suffix of an overloaded LLVM intrinsic, e.g. ``v16f32``."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_mangled(kind.element)}"
    return "f32" if isinstance(kind, ir.FloatType) else f"i{kind.width}"


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]
