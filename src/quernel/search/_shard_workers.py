"""Where shards live: threads of this process, or actors of a Ray cluster; the same few calls either way.

A worker holds one index and answers by the name of a method. ``Workers.call`` sends one call to several shards at once
and returns, shard by shard, the answer or the exception that came instead: a ``ShardError`` where the shard is dead.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from quernel._errors import MissingExtraError, QuernelError
from quernel._registry import resolve_class
from quernel.search._index import Index

# An actor imports the package before it answers: seconds on an idle machine.
START_SECONDS = 120.0


class ShardError(QuernelError):
    """A shard does not answer; ``shard`` is its number, ``lost`` the ids of items that ``restore`` gave up before."""

    def __init__(self, shard: int, why: str) -> None:
        super().__init__(
            f"shard {shard} does not answer: {why}. Call restore() to start it again from its last save, or search "
            "with partial=True to do without it"
        )
        self.shard = shard
        self.lost = np.zeros(0, np.int64)


def told(answers: Mapping[int, Any]) -> dict[int, Any]:
    """Return the answers, or raise the first exception among them."""
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
    return dict(answers)


class Shard:
    """One index and what is asked of it."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        cls: Any = resolve_class(description["class"], file="shard", field="class")
        self.index: Index = cls.from_config(description["config"])

    def load(self, folder: str) -> None:
        """Take the index that was saved there."""
        self.index = type(self.index).load(folder)

    def add(self, items: Any, slots: Any) -> int:
        """Add items under the numbers of their slots in the whole index; return how many there are now."""
        self.index.add(items, slots)
        return len(self.index)

    def remove(self, slots: Any) -> int:
        """Delete items."""
        return self.index.remove(slots)

    def ranked(self, queries: Any, k: int, options: Mapping[str, Any]) -> Any:
        """Return a ``Ranking`` of the shard's own answer."""
        return self.index.ranked(queries, k, **options)

    def save(self, folder: str) -> None:
        """Save the index."""
        self.index.save(folder)

    def slots(self) -> Any:
        """Return the slots it can find."""
        return self.index.ids

    def nbytes(self) -> int:
        """Return the bytes it holds."""
        return self.index.nbytes

    def pid(self) -> int:
        """Return the process it lives in."""
        return os.getpid()


class Workers(ABC):
    """The shards of one index."""

    def __init__(self, description: Mapping[str, Any], n: int) -> None:
        self.description = dict(description)
        self.n = n
        self.closed = False

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method on the shards that ``arguments`` names, all at once; return answers or exceptions."""
        self.check_open()
        started = {shard: self._start(shard, method, values) for shard, values in arguments.items()}
        return {shard: self._finish(shard, work) for shard, work in started.items()}

    def all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method on every shard with the same arguments."""
        return self.call(method, dict.fromkeys(range(self.n), arguments))

    def check_open(self) -> None:
        """Raise if the shards were let go."""
        if self.closed:
            raise QuernelError(
                "this sharded index was closed: close() let its shards go. Load it from its last save, or build another"
            )

    def close(self) -> None:
        """Let go of everything that runs; a second time there is nothing left to do."""
        if not self.closed:
            self.closed = True
            self._let_go()

    @abstractmethod
    def restart(self, shard: int, folder: Path | None) -> None:
        """Put a fresh shard in the place of one, loaded from ``folder`` if there is one."""

    @abstractmethod
    def _let_go(self) -> None:
        """Stop what runs."""

    @abstractmethod
    def _start(self, shard: int, method: str, arguments: tuple[Any, ...]) -> Any:
        """Begin a call."""

    @abstractmethod
    def _finish(self, shard: int, work: Any) -> Any:
        """Wait for a call and return its answer or exception."""


class ThreadWorkers(Workers):
    """Shards in this process, each with a thread of its own that works its calls off in order, as an actor does."""

    def __init__(self, description: Mapping[str, Any], n: int) -> None:
        super().__init__(description, n)
        self._shards = [Shard(description) for _ in range(n)]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"quernel-shard-{i}") for i in range(n)]

    def restart(self, shard: int, folder: Path | None) -> None:
        """Replace the shard."""
        fresh = Shard(self.description)
        if folder is not None:
            fresh.load(str(folder))
        self._shards[shard] = fresh

    def _let_go(self) -> None:
        for thread in self._threads:
            thread.shutdown()

    def _start(self, shard: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return self._threads[shard].submit(getattr(self._shards[shard], method), *arguments)

    def _finish(self, shard: int, work: Any) -> Any:
        error = work.exception()
        return work.result() if error is None else error


class RayWorkers(Workers):
    """Shards as actors of a Ray cluster, one processor each.

    Parameters
    ----------
    description : mapping
        Class and config of the index of a shard.
    n : int
        Number of shards.
    address : str, optional
        As ``ray.init`` takes it; default joins a running cluster, or starts one on this machine.
    """

    def __init__(self, description: Mapping[str, Any], n: int, address: str | None = None) -> None:
        super().__init__(description, n)
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("quernel.search.ShardedIndex on Ray", "ray") from error
        self._ray: Any = ray
        self._owner = not ray.is_initialized()
        if self._owner:
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        self._actor: Any = ray.remote(num_cpus=1)(Shard)
        self._actors: list[Any] = [self._actor.remote(self.description) for _ in range(n)]
        try:
            self._wait(range(n))
        except ShardError:
            self.close()
            raise

    def restart(self, shard: int, folder: Path | None) -> None:
        """Start another actor; what is left of the old one is killed."""
        self._ray.kill(self._actors[shard])
        self._actors[shard] = self._actor.remote(self.description)
        try:
            self._wait([shard])
            # After the start, whose time is limited: a large shard loads for minutes.
            if folder is not None:
                told(self.call("load", {shard: (str(folder),)}))
        except Exception:
            # One that waits for a processor would let whatever is asked next wait too; one that could not load would
            # answer as if all its items were lost.
            self._ray.kill(self._actors[shard])
            raise

    def _wait(self, shards: Iterable[int]) -> None:
        """Wait until actors have started, which they never do where no processor is left for them."""
        started = {shard: self._actors[shard].pid.remote() for shard in shards}
        _, pending = self._ray.wait(list(started.values()), num_returns=len(started), timeout=START_SECONDS)
        for shard, work in started.items():
            if work in pending:
                free = self._ray.available_resources().get("CPU", 0)
                all_of_them = self._ray.cluster_resources().get("CPU", 0)
                raise ShardError(
                    shard,
                    f"it did not start within {START_SECONDS:g} s: {self.n} shards need a processor each, the cluster "
                    f"has {all_of_them:g}, of which {free:g} are free",
                )
        told({shard: self._finish(shard, work) for shard, work in started.items()})

    def _let_go(self) -> None:
        """Kill the actors, and stop a cluster that was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._owner and self._ray.is_initialized():
            self._ray.shutdown()

    def _start(self, shard: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._actors[shard], method).remote(*arguments)

    def _finish(self, shard: int, work: Any) -> Any:
        try:
            return self._ray.get(work)
        except self._ray.exceptions.RayTaskError as error:
            # What the index itself raised, on the other side; its own error is the useful one.
            return error.cause if isinstance(error.cause, Exception) else error
        except self._ray.exceptions.RayError as error:
            return ShardError(shard, str(error).strip().splitlines()[0])
