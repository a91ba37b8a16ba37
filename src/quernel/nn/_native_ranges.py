"""Run compiled functions over ranges of items, on torch's OpenMP team where there is one, without Python inside.

A layer of ten microseconds cannot pay the thirty that a Python callback costs on a second thread. The work is a C
function ``work(table, start, stop, part)`` of int64: ``table`` is the address of the numbers that the caller handed
over and of one more, the result; ``part`` tells the ranges apart so that each may have memory of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types

from quernel._threads import native_team, num_threads, parallel_ranges
from quernel.nn._addresses import I32, I64, make_caller, pointer

# Before the caller's numbers: work, items, parts, and two questions to OpenMP.
HEAD = 5


def parts_for(n: int, cost: int, grain: int) -> int:
    """Return how many threads ``n`` items of total ``cost`` deserve, each at least ``grain``."""
    if cost < 2 * grain or n < 2:
        return 1
    return max(1, min(num_threads(), n, cost // grain))


def run_ranges(work: int, fields: tuple[int, ...], n: int, parts: int, *, before: int = 0, after: int = 0) -> int:
    """Call ``work`` over ``range(n)`` in ``parts`` ranges of like length.

    Parameters
    ----------
    work : int
        Address of the C function.
    fields : tuple of int
        What ``table`` points to; a 0 is put behind them.
    n, parts : int
        Items and ranges; at most one thread a range.
    before, after : int, default=0
        Addresses of C functions of ``table`` that run once, on this thread, around the ranges; 0 is none.

    Returns
    -------
    result : int
        The number behind the fields, which any of the functions may have set.
    """
    team = native_team() if parts > 1 else None
    if parts == 1:
        return int(_run(0, 0, before, after, (work, n, parts, 0, 0, *fields, 0)))
    if team is not None:
        start, rank, granted = team
        return int(_run(start, _member().address, before, after, (work, n, parts, rank, granted, *fields, 0)))
    memory = np.array([*fields, 0])
    table = memory.ctypes.data

    def run(first: int, last: int) -> None:
        for part in range(first, last):
            _one(work, table, n * part // parts, n * (part + 1) // parts, part)

    _once(before, table)
    parallel_ranges(run, parts, threads=parts)
    _once(after, table)
    return int(memory[-1])


_work = make_caller(I64, I64, I64, I64, returns=ir.VoidType())
_around = make_caller(I64, returns=ir.VoidType())
_ask = make_caller(I64)  # OpenMP's questions take no argument; one in a register does no harm
_parallel = make_caller(I64, I64, I32, I32, returns=ir.VoidType())


@functools.cache
def _member() -> Any:
    """Return the C function that each thread of the team runs."""

    @cfunc(types.void(types.int64), cache=True, fastmath=False)
    def member(numbers: Any) -> None:
        head = carray(pointer(numbers), (HEAD,), np.int64)
        n, parts = head[1], head[2]
        # The runtime may grant fewer threads than asked for (nested regions, limits).
        for part in range(_ask(head[3], (0,)), parts, _ask(head[4], (0,))):
            _work(head[0], (numbers + 8 * HEAD, n * part // parts, n * (part + 1) // parts, part))

    return member


@njit(nogil=True, cache=True, fastmath=False)
def _one(work: Any, table: Any, start: Any, stop: Any, part: Any) -> None:
    _work(work, (table, start, stop, part))


@njit(nogil=True, cache=True, fastmath=False)
def _once(function: Any, table: Any) -> None:
    if function != 0:
        _around(function, (table,))


@njit(nogil=True, cache=True, fastmath=False)
def _run(parallel: Any, member: Any, before: Any, after: Any, numbers: Any) -> Any:
    """Run everything on this thread, or the ranges by ``member`` on the team that ``parallel`` starts."""
    memory = np.array(numbers)
    table = memory.ctypes.data + 8 * HEAD
    _once(before, table)
    if parallel == 0:
        _work(memory[0], (table, 0, memory[1], 0))
    else:
        _parallel(parallel, (member, memory.ctypes.data, memory[2], 0))
    _once(after, table)
    return memory[-1]  # the last use: Numba frees an array right after it
