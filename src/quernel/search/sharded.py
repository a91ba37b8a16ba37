"""``ShardedIndex``: one index in several parts, on the threads of this machine or on the workers of a Ray cluster.

Item number g goes to shard g mod P; a query is asked of all shards at once and their first k are merged, so an exact
index gives exactly what it gives alone, ties included. A shard that died is an error with its name, or a gap that the
answer tells of; ``restore`` starts it again from the last save. Searches go on while items are added: a shard works its
calls off in order, and what changes the index does so one at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import Arrays
from quernel._errors import FormatError, QuernelError
from quernel._io import read_folder
from quernel._registry import register, resolve_class
from quernel._validate import check_choice, check_int, check_type
from quernel.hashing import Sets
from quernel.search._index import Ids, Index, Ranking, Scores
from quernel.search._ragged import Ragged
from quernel.search._shard_workers import RayWorkers, ShardError, ThreadWorkers, Workers, told
from quernel.search.flat import FlatIndex

GENERATION = re.compile("shards-[0-9a-f]{16}")


class ShardedAnswer(tuple[Scores, Ids]):
    """Scores and ids, as ``Index.search`` returns them, with the numbers of the shards that did not answer."""

    missing: tuple[int, ...]

    def __new__(cls, scores: Scores, ids: Ids, missing: tuple[int, ...]) -> Self:
        """Make the pair."""
        made = super().__new__(cls, (scores, ids))
        made.missing = missing
        return made


def _example() -> dict[str, Any]:
    return {"make": lambda: ShardedIndex(FlatIndex(12), 3, workers="threads"), "recall": 1.0}


@register("sharded", pillar="search", contract="index", paper=None, status="experimental", example=_example)
class ShardedIndex(Index):
    """Spread an index over several workers and ask them together.

    Parameters
    ----------
    index : Index
        An empty index: every shard is one like it.
    n_shards : int, default=2
        Number of shards P.
    workers : {"ray", "threads"}, default="ray"
        Actors of a Ray cluster (extra ``ray``), or threads of this process.
    address : str, optional
        Of a Ray cluster; default joins a running one, or starts one on this machine.

    Notes
    -----
    Shards of ``FlinngIndex`` group their own items only; one index with ``n_parts=P`` groups the same way and gives the
    same answers. With ``rerank=m`` every shard rescores its own first m, so P m items are looked at.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    >>> index = ShardedIndex(FlatIndex(dim=8), n_shards=4, workers="threads").add(x)
    >>> bool((index.search(x[:5], k=3)[1] == FlatIndex(dim=8).add(x).search(x[:5], k=3)[1]).all())
    True
    """

    def __init__(
        self,
        index: Index,
        n_shards: int = 2,
        *,
        workers: Literal["ray", "threads"] = "ray",
        address: str | None = None,
    ) -> None:
        super().__init__()
        check_type("index", index, Index)
        if isinstance(index, ShardedIndex) or len(index):
            raise QuernelError("index must be an empty index that is not itself sharded: it says what a shard is")
        self.metric, self.dim = index.metric, index.dim
        self.n_shards = check_int("n_shards", n_shards, low=1)
        self.workers = check_choice("workers", workers, ("ray", "threads"))
        self._prototype = index
        description = {"class": type(index).__name__, "config": index.config()}
        self._workers: Workers
        if workers == "ray":
            self._workers = RayWorkers(description, self.n_shards, address)
        else:
            self._workers = ThreadWorkers(description, self.n_shards)
        self._saved: Path | None = None
        self._lock = threading.RLock()

    def add(self, x: Any, ids: Any = None) -> Self:
        """Add items, as ``Index.add``; all or none of them, and searches go on meanwhile."""
        items = self._items("x", x)
        with self._lock:
            checked = self._ids.checked(len(items), ids)
            before = self._ids.slots
            # First the ids: a search may find an item as soon as its shard has it.
            self._ids.append(checked)
            try:
                self._append(items, before)
            except BaseException:
                self._ids.truncate(before)
                raise
        return self

    def remove(self, ids: Any) -> int:
        """Delete items by id and return how many, as ``Index.remove``."""
        self._workers.check_open()
        with self._lock:
            return super().remove(ids)

    def search(self, q: Any, k: int = 10, *, partial: bool = False, **options: Any) -> ShardedAnswer:
        """Return the k closest items of each query, closest first.

        Parameters
        ----------
        q : array, shape (n, dim), or sets
        k : int, default=10
        partial : bool, default=False
            Do without shards that do not answer, instead of raising.
        **options
            Further options of the shards' own ``search``.

        Returns
        -------
        answer : ShardedAnswer
            The pair (scores, ids) of ``Index.search``; ``answer.missing`` holds the numbers of silent shards.

        Raises
        ------
        ShardError
            If a shard does not answer and ``partial`` is False.
        """
        missing: list[int] = []

        def ask(queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
            answers = self._workers.all("ranked", queries, k, options)
            missing.extend(shard for shard, answer in answers.items() if isinstance(answer, ShardError))
            heard = {s: a for s, a in answers.items() if not (partial and isinstance(a, ShardError))}
            return merged(told(heard), len(queries), k)

        scores, ids = self._answer(q, k, ask)
        return ShardedAnswer(scores, ids, tuple(missing))

    def restore(self) -> Ids:
        """Start dead shards again from the last save, or empty, and return the ids of the items that are lost.

        Lost are those that a dead shard was given after the last save. They can be added again under their ids.

        Raises
        ------
        ShardError
            If a shard cannot be started. The others are in order then; ``error.lost`` has the ids lost with them.
        """
        with self._lock:
            failed: list[ShardError] = []
            for shard, answer in self._workers.all("slots").items():
                if isinstance(answer, ShardError):
                    try:
                        self._workers.restart(shard, None if self._saved is None else self._saved / _name(shard))
                    except QuernelError as error:  # no processor, or a save that cannot be read
                        failed.append(error if isinstance(error, ShardError) else ShardError(shard, str(error)))
            lost = [np.zeros(0, np.int64)]
            # All that answer, not only those that were dead now: an earlier call may have ended half-way.
            for shard, slots in self._workers.all("slots").items():
                if isinstance(slots, Exception):
                    failed.append(slots if isinstance(slots, ShardError) else ShardError(shard, str(slots)))
                    continue
                mine = np.arange(shard, self._ids.slots, self.n_shards)
                wanted = mine[self._ids.alive[mine]]
                lost.append(np.setdiff1d(wanted, slots))
                # Deleted since the save, and back with it.
                again = np.setdiff1d(slots, wanted)
                if again.size:
                    told(self._workers.call("remove", {shard: (again,)}))
            ids = self._ids.of_slots(np.sort(np.concatenate(lost)))
            if ids.size:
                self._ids.remove(ids)
            if failed:
                failed[0].lost = ids
                raise failed[0]
            return ids

    def close(self) -> None:
        """Let the workers go; a cluster that was started here stops. Whatever is asked afterwards is an error."""
        self._workers.close()

    @property
    def ids(self) -> Ids:
        """Ids of the items that can be found, in the order they were added."""
        with self._lock:
            return super().ids

    @property
    def nbytes(self) -> int:
        """Bytes held by all shards and by the table of ids."""
        return super().nbytes + sum(told(self._workers.all("nbytes")).values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save every shard below ``path``, then the whole; an earlier save stays valid until the last step.

        Workers on other machines write to the same path: it must be on a file system that all of them see.
        """
        root = Path(path).absolute()
        generation = f"shards-{uuid.uuid4().hex[:16]}"
        places = {shard: (str(root / generation / _name(shard)),) for shard in range(self.n_shards)}
        with self._lock:
            told(self._workers.call("save", places))
            replaced = _generation_in(root)
            self._write(root, {"shards": generation})
            if replaced is not None:
                shutil.rmtree(replaced)
            self._saved = root / generation
        return root

    @classmethod
    def from_folder(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Any], *, path: Path | None = None, check: bool = True
    ) -> Self:
        """Rebuild what ``save`` wrote; ``quernel.load`` calls this."""
        index = super().from_folder(content, tensors, path=path, check=check)
        name = content["shards"]
        if path is None or not isinstance(name, str) or Path(name).name != name:
            raise FormatError(f"shards must be the name of a folder beside config.json; got {name!r}")
        index._saved = path / name
        for shard in range(index.n_shards):
            if not (index._saved / _name(shard)).is_dir():
                raise FormatError(f"{index._saved / _name(shard)}: the folder of a shard is missing")
            index._workers.restart(shard, index._saved / _name(shard))
        for shard, slots in told(index._workers.all("slots")).items():
            mine = np.arange(shard, index._ids.slots, index.n_shards)
            if not np.array_equal(np.sort(slots), mine[index._ids.alive[mine]]):
                raise FormatError(f"{index._saved / _name(shard)}: its items are not those that the whole index knows")
        return index

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an empty index from ``config()``."""
        if set(config) != {"index", "n_shards", "workers"}:
            raise FormatError(f"config must have index, n_shards and workers; got {sorted(config)}")
        kind: Any = resolve_class(config["index"]["class"], file="sharded index", field="class")
        return cls(kind.from_config(config["index"]["config"]), config["n_shards"], workers=config["workers"])

    def config(self) -> dict[str, Any]:
        """Return what a shard is, how many there are, and where."""
        index = {"class": type(self._prototype).__name__, "config": self._prototype.config()}
        return {"index": index, "n_shards": self.n_shards, "workers": self.workers}

    def _items(self, name: str, x: Any) -> Any:
        return self._prototype._items(name, x)

    def _append(self, items: Any, before: int = 0) -> None:
        n = len(items)
        arguments = {}
        for shard in range(self.n_shards):
            places = np.arange((shard - before) % self.n_shards, n, self.n_shards)
            if places.size:
                arguments[shard] = (
                    items.take(places) if isinstance(items, Sets | Ragged) else items[places],
                    before + places,
                )
        answers = self._workers.call("add", arguments)
        if any(isinstance(answer, Exception) for answer in answers.values()):
            # All or nothing: who took its part gives it back.
            taken = {s: (arguments[s][1],) for s, answer in answers.items() if not isinstance(answer, Exception)}
            self._workers.call("remove", taken)
            told(answers)

    def _search(self, queries: Any, k: int) -> tuple[Scores, NDArray[np.int64]]:
        return merged(told(self._workers.all("ranked", queries, k, {})), len(queries), k)

    def _forget(self, slots: NDArray[np.int64]) -> None:
        parts = {int(s): (slots[slots % self.n_shards == s],) for s in np.unique(slots % self.n_shards)}
        told(self._workers.call("remove", parts))

    def _arrays(self) -> Arrays:
        return {}

    def _restore(self, arrays: Arrays) -> None:
        """Take nothing: the shards have folders of their own."""


def merged(rankings: Mapping[int, Ranking], n: int, k: int) -> tuple[Scores, NDArray[np.int64]]:
    """Return the first k of all shards' answers: scores and slots, (n, k).

    Equal scores are ordered as one index would: by the first key, then by shard, then by the second key and the slot.
    """
    scores, slots = np.full((n, k), np.nan, np.float32), np.full((n, k), -1, np.int64)
    if not rankings:
        return scores, slots
    held = [np.concatenate(parts, axis=1) for parts in zip(*rankings.values(), strict=True)]
    shards = np.repeat(list(rankings), k)
    for row in range(n):
        own = [part[row] for part in held]
        order = np.lexsort((own[1], own[3], shards, own[2], -own[0]))[:k]  # NaN comes last
        scores[row, : len(order)], slots[row, : len(order)] = own[0][order], own[1][order]
    return scores, slots


def _generation_in(root: Path) -> Path | None:
    """Return the folder of the shards that a save at ``root`` names, if there is one; nothing else is ever deleted."""
    try:
        name = read_folder(root, check_tensors=False).content.get("shards")
    except FormatError:
        return None
    if not isinstance(name, str) or not GENERATION.fullmatch(name):
        return None
    folder = root / name
    return folder if folder.is_dir() and not folder.is_symlink() else None


def _name(shard: int) -> str:
    return f"shard-{shard:05d}"
