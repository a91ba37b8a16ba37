"""The three passes of an int8 layer, block by block and thread by thread, in one call without Python inside.

Between two products the caches are cold, and every Python step costs several times what it costs in a loop; on two
threads the interpreter lock would be handed over six times a block. So the product is called through the C interface
that torch keeps stable for ahead-of-time compiled models (``torch/csrc/inductor/aoti_torch``), and ``run_ranges``
starts the ranges of rows on torch's OpenMP team directly.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types

from quernel._errors import QuernelError
from quernel._threads import workspace
from quernel.nn._addresses import I32, I64, make_caller, pointer
from quernel.nn._native_ranges import parts_for, run_ranges

# Rows of one pass of the chain: enough to amortise the GEMM's repacking of the weight, few enough for the cache.
BLOCK = 512
# A thread gets at least this many rows; below, the GEMM's own threads do better.
GRAIN = 64
ALIGNMENT = 64

# What one call hands to its threads, all int64: functions of torch, its codes of dtypes and device; addresses of the
# passes and operands; sizes; how many rows at a time, and each range's memory. Last comes whether a product failed.
FIELDS = (
    *("product", "create", "delete", "int8", "int32", "device"),
    *("quantise", "dequantise", "x", "inverse", "levels", "alpha", "weight", "scale", "bias", "out"),
    *("n", "k", "m", "size"),
    *("block", "room", "scratch", "failed"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])


def apply(
    quantise: int,
    dequantise: int,
    operands: tuple[int, int, int, int, int, int, int, int],
    n: int,
    k: int,
    m: int,
    size: int,
) -> None:
    """Run the chain over all rows.

    Parameters
    ----------
    quantise, dequantise : int
        Addresses of the two passes.
    operands : (x, inverse, levels, alpha, weight, scale, bias, out)
        Addresses of contiguous memory, but for the number ``levels`` and the bits of the double ``alpha``.
    n, k, m, size : int
        Rows, input features, output features, bytes of an element of ``x`` and ``out``.

    Raises
    ------
    QuernelError
        If torch's product reports a failure.
    """
    functions = _torch_functions()
    if functions is None:
        raise QuernelError("this build of torch lacks the C interface to its int8 product; ask available() first")
    parts = parts_for(n, n, GRAIN)
    block = min(BLOCK, -(-n // parts))
    room = (block * (k + 4 * m + 4) + 3 * ALIGNMENT) // ALIGNMENT * ALIGNMENT
    scratch = workspace("int8_linear", parts * room, torch.int8)
    sizes = (n, k, m, size, block, room, scratch.data_ptr())
    if run_ranges(_rows().address, (*functions, quantise, dequantise, *operands, *sizes), n, parts):
        raise QuernelError(f"torch's int8 product failed for {n} rows, {k} inputs, {m} outputs; see its message above")


def available() -> bool:
    """Whether this build of torch has the C functions that the chain calls."""
    return _torch_functions() is not None


@functools.cache
def _torch_functions() -> tuple[int, ...] | None:
    """Return the first six fields of a call, or None where a function is missing."""
    folder = Path(torch.__file__).parent / "lib"
    files = [folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")]
    try:
        library = ctypes.CDLL(str(next(file for file in files if file.exists())))
        functions = [
            getattr(library, f"aoti_torch_{name}")
            for name in ("cpu__int_mm_out", "create_tensor_from_blob", "delete_tensor_object")
        ]
        codes = [getattr(library, f"aoti_torch_{name}")() for name in ("dtype_int8", "dtype_int32", "device_type_cpu")]
    except (StopIteration, OSError, AttributeError):
        return None
    return (*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions), *codes)


_product = make_caller(I64, I64, I64)
_create = make_caller(I64, I64, I64, I64, I64, I32, I32, I32, I64)
_delete = make_caller(I64)
_quantise = make_caller(*[I64] * 8, returns=ir.VoidType())
_dequantise = make_caller(*[I64] * 7, returns=ir.VoidType())


@njit(nogil=True, cache=True, fastmath=False)
def _call(table: Any) -> Any:
    return carray(pointer(table), (1,), CALL)[0]


@njit(nogil=True, cache=True, fastmath=False)
def _tensor(call: Any, data: Any, shape: Any, strides: Any, dtype: Any) -> Any:
    """Return a handle of a torch tensor around memory, or 0."""
    memory = np.array([*shape, *strides, 0])
    place = memory.ctypes.data
    _create(call.create, (data, 2, place, place + 16, 0, dtype, call.device, -1, place + 32))
    return memory[4]  # the last use: Numba frees an array right after it


@njit(nogil=True, cache=True, fastmath=False)
def _multiply(call: Any, codes: Any, sums: Any, rows: Any, weight: Any) -> Any:
    """Return whether ``sums = codes @ weight`` failed."""
    left = _tensor(call, codes, (rows, call.k), (call.k, 1), call.int8)
    out = _tensor(call, sums, (rows, call.m), (call.m, 1), call.int32)
    failed = left == 0 or out == 0 or weight == 0
    if not failed:
        failed = _product(call.product, (out, left, weight)) != 0
    for handle in (left, out):
        if handle != 0:
            _delete(call.delete, (handle,))
    return failed


@njit(nogil=True, cache=True, fastmath=False)
def _aligned(address: Any) -> Any:
    return (address + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _chain(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Run the passes over the rows from ``start`` to ``stop``, in the memory of range number ``part``."""
    call = _call(table)
    k, m = call.k, call.m
    sums = _aligned(call.scratch + part * call.room)
    steps = _aligned(sums + 4 * call.block * m)
    codes = _aligned(steps + 4 * call.block)
    # A view of the row-major weight: what the GEMM wants at few rows, and no worse at many.
    weight = _tensor(call, call.weight, (k, m), (1, k), call.int8)
    for first in range(start, stop, call.block):
        rows = min(call.block, stop - first)
        x, out = call.x + first * k * call.size, call.out + first * m * call.size
        _quantise(call.quantise, (x, call.inverse, call.levels, call.alpha, codes, steps, rows, k))
        if _multiply(call, codes, sums, rows, weight):
            call.failed = 1
        _dequantise(call.dequantise, (sums, steps, call.scale, call.bias, out, rows, m))
    if weight != 0:
        _delete(call.delete, (weight,))


@functools.cache
def _rows() -> Any:
    """Return the C function of a range of rows, as ``run_ranges`` calls it."""
    return cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(_chain)
