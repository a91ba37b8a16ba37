"""Addresses in jitted code: memory as arrays, and calls of C functions, without Python in between."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """Turn an integer address into what ``carray`` takes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


def make_caller(*kinds: Any, returns: Any = I32) -> Any:
    """Return an intrinsic ``call(address, arguments)`` for C functions of these LLVM types; arguments are int64."""
    result = types.void if isinstance(returns, ir.VoidType) else types.int32

    @intrinsic
    def call(typing: Any, address: Any, arguments: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place, values = args
            words = [builder.extract_value(values, i) for i in range(len(kinds))]
            words = [w if kind is I64 else builder.trunc(w, kind) for w, kind in zip(words, kinds, strict=True)]
            function = builder.inttoptr(place, ir.FunctionType(returns, kinds).as_pointer())
            answer = builder.call(function, words)
            return context.get_dummy_value() if isinstance(returns, ir.VoidType) else answer

        return result(types.int64, types.UniTuple(types.int64, len(kinds))), emit

    return call
