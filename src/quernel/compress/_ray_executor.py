"""``RayExecutor``: the trials of ``compress.search`` on the workers of a Ray cluster.

A ``concurrent.futures.Executor`` around Ray's tasks. A model and data that come back in every trial are put into the
object store once, by their contents: one that was changed meanwhile is another one. A worker that dies fails its trial,
which is not repeated, and Ray starts another worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from typing import Any

from quernel._errors import MissingExtraError
from quernel._validate import check_int

# Larger arguments go through the object store; Ray sends smaller ones along with the call.
STORED_BYTES = 2**16


class RayExecutor(Executor):
    """Run functions on a Ray cluster; needs the extra ``ray``.

    Parameters
    ----------
    address : str, optional
        Of a running cluster, as ``ray.init`` takes it. Default joins the one this process is connected to, or starts
        one on this machine that ``shutdown`` stops again.
    num_cpus : int, optional
        Processors of a cluster started here; default all.
    cpus_per_task : int, default=1
        Processors that a task asks for; torch runs on that many threads in it.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.

    Notes
    -----
    What is submitted must be picklable: functions of modules, not closures over open files. Times are never measured
    on workers: ``search`` times what may be chosen in its own process, alone.

    Examples
    --------
    >>> import quernel
    >>> with quernel.compress.RayExecutor(num_cpus=2) as executor:  # doctest: +SKIP
    ...     result = quernel.compress.search(model, budget, executor=executor)
    """

    def __init__(self, address: str | None = None, *, num_cpus: int | None = None, cpus_per_task: int = 1) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("quernel.compress.RayExecutor", "ray") from error
        self._cpus = check_int("cpus_per_task", cpus_per_task, low=1)
        self._ray: Any = ray
        self._owner = not ray.is_initialized()
        if self._owner:
            ray.init(address=address, num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
        # A trial that killed its worker, for want of memory say, would kill the next one too.
        self._task = ray.remote(num_cpus=self._cpus, max_retries=0)(_call)
        self._stored: dict[bytes, Any] = {}
        self._futures: set[Future[Any]] = set()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start ``fn(*args, **kwargs)`` on a worker.

        Raises
        ------
        RuntimeError
            After ``shutdown``, as every executor does.
        """
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        packed = [self._packed(value) for value in (*args, *kwargs.values())]
        future: Future[Any] = self._task.remote(self._cpus, fn, tuple(kwargs), *packed).future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, wait for those that run, forget stored objects, stop a cluster that was started here."""
        self._closed = True
        if cancel_futures:
            for future in tuple(self._futures):
                future.cancel()
        # A cluster that stops takes its tasks with it: they are waited for in any case.
        if wait or self._owner:
            wait_for(tuple(self._futures))
        self._stored.clear()
        if self._owner and self._ray.is_initialized():
            self._ray.shutdown()

    def _packed(self, value: Any) -> Any:
        """Return what Ray makes of an argument, or where that is stored; what has not changed is stored once."""
        packed = self._ray.cloudpickle.dumps(value)
        if len(packed) < STORED_BYTES:
            return packed
        key = hashlib.blake2b(packed, digest_size=32).digest()
        if key not in self._stored:
            self._stored[key] = self._ray.put(packed)
        return self._stored[key]


def _call(threads: int, fn: Callable[..., Any], names: tuple[str, ...], /, *packed: bytes) -> Any:
    """Run a task on a worker, with as many of torch's threads as it asked for processors; ``names`` are the last's."""
    import ray
    import torch

    torch.set_num_threads(threads)
    values = [ray.cloudpickle.loads(one) for one in packed]
    first = len(values) - len(names)
    return fn(*values[:first], **dict(zip(names, values[first:], strict=True)))
