"""``RayExecutor``: the trials of ``compress.search`` on the workers of a Ray cluster.

A ``concurrent.futures.Executor`` around Ray's tasks. A model and data that come back in every trial are put into the
object store once, and again when a tensor in them has changed. A worker that dies fails its trial, which is not
repeated, and Ray starts another worker.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from typing import Any

from quernel._errors import MissingExtraError
from quernel._validate import check_int


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
        # Kept by identity, and kept alive, so that an address is never taken for another object.
        self._stored: dict[int, tuple[Any, Any, Any]] = {}
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
        refs = [self._put(value) for value in args]
        named = {name: self._put(value) for name, value in kwargs.items()}
        future: Future[Any] = self._task.remote(self._cpus, fn, *refs, **named).future()
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

    def _put(self, value: Any) -> Any:
        state = _state_of(value)
        if state is None:
            return value
        held = self._stored.get(id(value))
        if held is None or held[1] != state:
            held = self._stored[id(value)] = (value, state, self._ray.put(value))
        return held[2]


def _state_of(value: Any) -> Any:
    """Return what changes when a tensor in ``value`` does, or None where that cannot be seen."""
    import torch

    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else (id(value), value._version)
    if isinstance(value, torch.nn.Module):
        held = [_state_of(t) for t in (*value.parameters(), *value.buffers())]
        return None if None in held else (id(value), value.training, tuple(held))
    if isinstance(value, list | tuple | dict):
        inside = [_state_of(v) for v in (value.values() if isinstance(value, dict) else value)]
        return None if None in inside or not inside else (type(value), tuple(inside))
    return None


def _call(threads: int, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a task on a worker, with as many of torch's threads as it asked for processors."""
    import torch

    torch.set_num_threads(threads)
    return fn(*args, **kwargs)
