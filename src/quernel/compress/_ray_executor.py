"""``RayExecutor``: the trials of ``compress.search`` on the workers of a Ray cluster.

A ``concurrent.futures.Executor`` around Ray's tasks. A model, data and functions that come back in every trial are put
into the object store once; a worker that dies fails its trial and Ray starts another.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
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
        self._task = ray.remote(num_cpus=self._cpus)(_call)
        # Kept by identity, and kept alive, so that an address is never taken for another object.
        self._stored: dict[int, tuple[Any, Any]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start ``fn(*args, **kwargs)`` on a worker."""
        refs = [self._put(value) for value in args]
        named = {name: self._put(value) for name, value in kwargs.items()}
        future: Future[Any] = self._task.remote(self._cpus, fn, *refs, **named).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Forget stored objects, and stop the cluster if it was started here."""
        self._stored.clear()
        if self._owner and self._ray.is_initialized():
            self._ray.shutdown()

    def _put(self, value: Any) -> Any:
        if isinstance(value, str | int | float | bool | tuple | type(None)):
            return value
        if id(value) not in self._stored:
            self._stored[id(value)] = (value, self._ray.put(value))
        return self._stored[id(value)][1]


def _call(threads: int, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a task on a worker, with as many of torch's threads as it asked for processors."""
    import torch

    torch.set_num_threads(threads)
    return fn(*args, **kwargs)
