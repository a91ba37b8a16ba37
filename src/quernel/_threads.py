"""``parallel_ranges``: run a function over row ranges on the threads that torch already has.

The ranges run on torch's own OpenMP team where that is libgomp: after a torch operation its workers
spin for milliseconds, and a second pool would fight them for the cores (measured here: the same int8
chain took 2.4 ms on a pool of our own, 4.3 ms right after a torch operation, 2.4 ms on torch's team).
Elsewhere, and always in a forked child (OpenMP does not survive a fork), a plain thread pool runs them.
Torch operations called inside a range run on that one thread. Numba ``parallel=True`` is never used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Work = Callable[[int, int], Any]

_local = threading.local()


class _Process:
    """What belongs to this process alone; a forked child starts afresh."""

    def __init__(self, forked: bool) -> None:
        self.forked = forked
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.pool_size = 0


_process = _Process(forked=False)


def _after_fork() -> None:
    global _process
    _process = _Process(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def num_threads() -> int:
    """Return the number of threads that torch may use here; 1 inside a parallel range."""
    if getattr(_local, "inside", False):
        return 1
    import torch

    return torch.get_num_threads()


def parallel_ranges(work: Work, n: int, *, grain: int = 1, threads: int | None = None) -> None:
    """Call ``work(start, stop)`` over disjoint ranges that cover ``range(n)``.

    Parameters
    ----------
    work : callable
        Usually a closure over a ``nogil`` kernel; must write to disjoint places only.
    n : int
        Number of rows.
    grain : int, default=1
        Smallest range worth a thread of its own.
    threads : int, optional
        At most this many; default is torch's number of threads.

    Raises
    ------
    Exception
        The first exception of any range, after all ranges ended.
    """
    if n <= 0:
        return
    parts = max(1, min(num_threads() if threads is None else threads, n // max(1, grain)))
    if parts == 1 or getattr(_local, "inside", False):
        work(0, n)
        return
    bounds = [n * i // parts for i in range(parts + 1)]
    failures: list[BaseException] = []

    def run(part: int) -> None:
        _local.inside = True
        try:
            work(bounds[part], bounds[part + 1])
        except BaseException as error:  # carried to the caller below; nothing may unwind through OpenMP
            failures.append(error)
        finally:
            _local.inside = False

    team = None if _process.forked else _openmp()
    if team is not None:
        team(run, parts)
    else:
        others = [_pool(parts - 1).submit(run, part) for part in range(1, parts)]
        run(0)
        for other in others:
            other.result()
    if failures:
        raise failures[0]


def workspace(key: str, size: int, dtype: Any) -> Any:
    """Return this thread's flat tensor of at least ``size`` elements, kept between calls.

    Large temporaries would go back to the system and fault in again on every call.
    """
    import torch

    held: dict[tuple[str, Any], torch.Tensor] = _local.__dict__.setdefault("workspaces", {})
    tensor = held.get((key, dtype))
    if tensor is None or tensor.numel() < size:
        tensor = held[(key, dtype)] = torch.empty(size, dtype=dtype)
    return tensor[:size]


def _pool(size: int) -> ThreadPoolExecutor:
    process = _process
    with process.lock:
        if process.pool is None or process.pool_size < size:
            # An outgrown pool is dropped, not shut down: its queued ranges still finish.
            process.pool = ThreadPoolExecutor(size, thread_name_prefix="quernel", initializer=_one_torch_thread)
            process.pool_size = size
        return process.pool


def _one_torch_thread() -> None:
    """Keep torch operations inside a pool thread on that thread (OpenMP's setting is per thread)."""
    import threadpoolctl
    import torch

    torch.zeros(1).add_(1)  # torch sets a new thread's OpenMP size at its first operation; ours must come after
    threadpoolctl.threadpool_limits(1, user_api="openmp")


@functools.cache
def _openmp() -> Callable[[Callable[[int], None], int], None] | None:
    """Return ``team(run, parts)`` on torch's libgomp, or None where torch uses another runtime."""
    import threadpoolctl
    import torch  # noqa: F401  (loads its OpenMP runtime)

    paths = [
        lib["filepath"]
        for lib in threadpoolctl.threadpool_info()
        if lib["prefix"] == "libgomp" and f"{os.sep}torch{os.sep}" in lib["filepath"]
    ]
    if not paths:
        return None
    library = ctypes.CDLL(paths[0])
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    # void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags): libgomp's
    # stable entry since GCC 4.9, the one that compiled `#pragma omp parallel` code calls.
    gomp_parallel = library.GOMP_parallel
    gomp_parallel.argtypes = [callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    gomp_parallel.restype = None
    rank = library.omp_get_thread_num
    granted = library.omp_get_num_threads

    def team(run: Callable[[int], None], parts: int) -> None:
        def body(_: Any) -> None:
            # The runtime may grant fewer threads than asked for (nested regions, limits).
            for part in range(rank(), parts, granted()):
                run(part)

        gomp_parallel(callback(body), None, parts, 0)

    return team
