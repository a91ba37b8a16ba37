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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Work = Callable[[int, int], Any]

_local = threading.local()


class _Process:
    """What belongs to this process alone; a forked child starts afresh."""

    def __init__(self, forked: bool) -> None:
        self.forked = forked
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.pool_size = 0
        # Workspaces of OpenMP's workers by native thread id: those are no Python threads, so what is
        # thread-local there is lost after every range.
        self.team_workspaces: dict[int, dict[tuple[str, Any], torch.Tensor]] = {}


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
        # All ranges go to the pool, also the caller's: only there do torch operations stay on one thread.
        for part in [_pool(parts).submit(run, part) for part in range(parts)]:
            part.result()
    if failures:
        raise failures[0]


def workspace(key: str, size: int, dtype: Any, *, zeroed: bool = False) -> Any:
    """Return this thread's flat tensor of at least ``size`` elements, kept between calls.

    Large temporaries would go back to the system and fault in again on every call. With ``zeroed`` a fresh one is
    zeros; whoever uses the key puts zeros back where it wrote.
    """
    import torch

    held: dict[tuple[str, Any], torch.Tensor]
    held = _team_workspaces() if getattr(_local, "team", False) else _local.__dict__.setdefault("workspaces", {})
    tensor = held.get((key, dtype))
    if tensor is None or tensor.numel() < size:
        # One made inside inference_mode could not be written to outside it, and it outlives the block.
        with torch.inference_mode(False):
            make = torch.zeros if zeroed else torch.empty
            tensor = held[(key, dtype)] = make(size, dtype=dtype, device="cpu")
    return tensor[:size]


def workspace_bytes() -> int:
    """Return the bytes that the workspaces of this thread and of OpenMP's workers hold."""
    held = [_local.__dict__.get("workspaces", {}), *_process.team_workspaces.values()]
    return sum(tensor.nbytes for each in held for tensor in each.values())


def _team_workspaces() -> dict[tuple[str, Any], torch.Tensor]:
    """Return the workspaces of this OpenMP worker; those of workers that have ended are dropped."""
    mine, held = threading.get_native_id(), _process.team_workspaces
    if mine not in held:
        for worker in list(held):
            if not os.path.exists(f"/proc/self/task/{worker}"):
                held.pop(worker, None)
        held[mine] = {}
    return held[mine]


def _pool(size: int) -> ThreadPoolExecutor:
    process = _process
    with process.lock:
        if process.pool is None or process.pool_size < size:
            import torch

            before = torch.get_num_threads()
            # An outgrown pool is dropped, not shut down: its queued ranges still finish.
            process.pool = ThreadPoolExecutor(size, thread_name_prefix="quernel")
            process.pool_size = size
            together, one_by_one = threading.Barrier(size), threading.Lock()
            for started in [process.pool.submit(_one_torch_thread, together, one_by_one) for _ in range(size)]:
                started.result()
            # The calls in the pool also set what torch gives to threads yet to come.
            torch.set_num_threads(before)
        return process.pool


def _one_torch_thread(together: threading.Barrier, one_by_one: threading.Lock) -> None:
    """Keep torch operations of this pool thread on it, MKL's too, which knows no OpenMP setting."""
    import torch

    with one_by_one:  # torch's first setting of threads in a forked child is not safe beside another
        torch.get_num_threads()  # initialises what a new thread gets; ours must come after
        torch.set_num_threads(1)
    together.wait()  # so that every thread of the pool takes one of these tasks


@functools.cache
def _libgomp() -> ctypes.CDLL | None:
    """Return torch's own libgomp, or None where torch uses another runtime."""
    import threadpoolctl
    import torch  # noqa: F401  (loads its OpenMP runtime)

    for lib in threadpoolctl.threadpool_info():
        if lib["prefix"] == "libgomp" and f"{os.sep}torch{os.sep}" in lib["filepath"]:
            return ctypes.CDLL(lib["filepath"])
    return None


def native_team() -> tuple[int, int, int] | None:
    """Return the addresses of ``GOMP_parallel``, ``omp_get_thread_num`` and ``omp_get_num_threads`` of torch's team.

    For kernels that start their ranges without Python: a range of ``parallel_ranges`` costs 30 us on a worker.
    None where only ``parallel_ranges`` is safe: in a forked child, or with another runtime.
    """
    library = None if _process.forked else _libgomp()
    return None if library is None else _addresses(library)


@functools.cache
def _addresses(library: ctypes.CDLL) -> tuple[int, int, int]:
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    first, second, third = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names)
    return first, second, third


@functools.cache
def _openmp() -> Callable[[Callable[[int], None], int], None] | None:
    """Return ``team(run, parts)`` on torch's libgomp, or None where torch uses another runtime."""
    library = _libgomp()
    if library is None:
        return None
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
            _local.team = rank() != 0  # number 0 is the calling thread itself
            # The runtime may grant fewer threads than asked for (nested regions, limits).
            for part in range(rank(), parts, granted()):
                run(part)

        gomp_parallel(callback(body), None, parts, 0)

    return team


class _OneBlasThread:
    """Holds NumPy's BLAS at one thread while anybody is inside; the last one out gives the others back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limits: Any = None

    def __enter__(self) -> None:
        import threadpoolctl

        with self._lock:
            if not self._inside:
                self._limits = threadpoolctl.threadpool_limits(1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


# For small matrices between torch's products: the threads of both would wait for each other at every step.
one_blas_thread = _OneBlasThread()
