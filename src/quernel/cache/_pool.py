"""``KVPool``: all keys and values of one row, written once and read in contiguous ranges.

A record is one token of one key head: its key and, behind it, its value.  What is appended together lies together, the
tokens of a head in the order they are given, so that a unit of a permuted prompt is one range and reading it one copy.
The records lie in memory, in slabs that are filled one after the other, or in a temporary file that is written by
writes and read through a mapping whose pages are given back after every read: pages touched through a mapping count as
resident.

What packs its records says how one is written and read (``_written``, ``_read``) and what it drops (``pruned``); see
``PackedKVPool``.
"""

from __future__ import annotations

import copy
import mmap
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges, workspace
from quernel._validate import check_choice, check_int
from quernel.cache._pool_kernels import choose_units, copy_ranges

STORAGES = ("ram", "memmap")
# A slab for what comes later holds an eighth of what is there, within these bounds (in tokens).
_SHARE, _SMALLEST, _LARGEST = 8, 64, 4096
# From so many words on a copy is shared among threads.
_WORTH_THREADS = 2**16


class KVPool:
    """Keys and values of one sequence in one layer, in the order in which they were appended.

    Parameters
    ----------
    heads : int
        Key heads.
    width : int
        Numbers of a record: those of a key and of a value.
    dtype : torch.dtype, default=torch.float32
        In which records are kept; they are converted on the way in and out.
    storage : {"ram", "memmap"}
        In memory, or in a file of the folder for temporary files, which is removed with the pool. Where that folder
        lies in memory itself, point ``TMPDIR`` elsewhere.

    Raises
    ------
    QuernelError
        If sizes are below 1, the storage is unknown, or the dtype is no floating-point one.

    Examples
    --------
    >>> pool = KVPool(heads=1, width=2)
    >>> first = pool.append(torch.arange(6.0).view(1, 3, 2))
    >>> out = torch.empty(1, 2, 2)
    >>> pool.gather(np.array([[first + 2, first]]), np.array([[1, 1]]), out)
    >>> out.tolist()
    [[[4.0, 5.0], [0.0, 1.0]]]
    """

    def __init__(self, heads: int, width: int, dtype: torch.dtype = torch.float32, storage: str = "ram") -> None:
        self.heads, self.width = check_int("heads", heads, low=1), check_int("width", width, low=1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise QuernelError(f"dtype must be a floating-point dtype of torch; got {dtype!r}")
        self.dtype, self.storage = dtype, check_choice("storage", storage, STORAGES)
        size = width * torch.empty((), dtype=dtype).element_size()
        # The widest words of which a record is a whole number.
        self._word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.uint8) if size % w.itemsize == 0)
        self._words = size // self._word.itemsize
        self._store: _Store = _Slabs() if storage == "ram" else _File()
        self._blocks: list[tuple[int, int]] = []  # first record and tokens of what was appended together

    @property
    def tokens(self) -> int:
        """Tokens held, the same number for every key head."""
        return sum(n for _, n in self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes stored, in memory or in the file."""
        return self._store.nbytes

    @property
    def resident_nbytes(self) -> int:
        """Those of them in memory."""
        return self._store.nbytes if self.storage == "ram" else 0

    def tensors(self) -> list[Tensor]:
        """Return what is stored in memory."""
        return self._store.tensors()

    def reserve(self, tokens: int) -> None:
        """Prepare for so many tokens that are about to be appended in parts."""
        self._store.reserve(self.heads * tokens * self._words, self._word)

    def append(self, rows: Tensor) -> int:
        """Store tokens and return the number of their first record.

        Parameters
        ----------
        rows : Tensor, shape (heads, n, width)
            Copied.

        Returns
        -------
        int
            Token i of head h is record ``first + h * n + i``.

        Raises
        ------
        QuernelError
            If the shape does not fit.
        """
        if rows.ndim != 3 or rows.shape[0] != self.heads or rows.shape[2] != self.width:
            raise QuernelError(f"rows must be ({self.heads}, n, {self.width}); got {tuple(rows.shape)}")
        n = rows.shape[1]
        spare = max(_SMALLEST, min(self.tokens // _SHARE, _LARGEST)) * self.heads * self._words
        first = self._store.append(self._written(rows.detach()), spare) // self._words
        if n:
            self._blocks.append((first, n))
        return first

    def gather(self, starts: np.ndarray, counts: np.ndarray, out: Tensor) -> None:
        """Copy ranges of records out, one behind the other for each head.

        Parameters
        ----------
        starts, counts : arrays of int64, shape (heads, R)
            First records and lengths; a count of 0 ends a head's ranges. No range crosses what was appended together.
        out : Tensor, shape (heads, n, width)
            Any dtype and device; rows of a head lie behind each other. n at least the tokens of every head.
        """
        direct = out.dtype == self.dtype and out.device.type == "cpu"
        into = out if direct else workspace("kv-pool", out.numel(), self.dtype).view(out.shape)
        stride = into.stride(0) * self.dtype.itemsize // self._word.itemsize
        flat = into.as_strided(((self.heads - 1) * into.stride(0) + into[0].numel(),), (1,))
        target = flat.view(self._word).numpy()
        size = out.shape[0] * out.shape[1] * self._words

        with self._store.opened(self._word) as parts:
            for first, source in parts:

                def run(low: int, high: int, first: int = first, source: Any = source) -> None:
                    self._read(source, first // self._words, starts, counts, target, stride, low, high)

                parallel_ranges(run, self.heads, threads=None if size > _WORTH_THREADS else 1)
        if not direct:
            out.copy_(into)

    def blocks(self) -> Iterator[Tensor]:
        """Yield copies of what was appended together, (heads, n, width) each."""
        for first, n in self._blocks:
            out = torch.empty(self.heads, n, self.width, dtype=self.dtype)
            starts = first + n * np.arange(self.heads, dtype=np.int64)[:, None]
            self.gather(starts, np.full_like(starts, n), out)
            yield out

    def pruned(self, rows: Tensor) -> Tensor:
        """Return rows (heads, n, width) without the channels that the pool drops: this one drops none."""
        return rows

    def _written(self, rows: Tensor) -> Tensor:
        """Return the words of the records of rows."""
        return rows.to(device="cpu", dtype=self.dtype).contiguous().view(self._word).flatten()

    def _read(self, source: np.ndarray, first: int, starts: np.ndarray, counts: np.ndarray, *target: Any) -> None:
        """Copy those records out that lie in ``source``, as ``copy_ranges`` does."""
        copy_ranges(source, first, self._words, starts, counts, *target)

    def clone(self) -> Self:
        """Return a pool of the same kind that shares nothing with this one."""
        other = copy.copy(self)
        other._store, other._blocks = self._store.clone(), list(self._blocks)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()


class _Store(ABC):
    """Words, numbered from 0 in the order of appending; a range that was appended at once can be read at once."""

    nbytes: int

    @abstractmethod
    def reserve(self, n: int, word: torch.dtype) -> None:
        """Prepare for n words."""

    @abstractmethod
    def append(self, words: Tensor, spare: int) -> int:
        """Store words and return the number of the first; with room for ``spare`` more if there was none."""

    @abstractmethod
    def opened(self, word: torch.dtype) -> Any:
        """Return a context of (number of the first word, words) of every part."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return what lies in memory."""

    @abstractmethod
    def clone(self) -> _Store:
        """Return a copy."""


class _Slabs(_Store):
    """Memory in slabs: what is reserved has one of its size, small blocks share slabs with room to spare."""

    def __init__(self) -> None:
        self._slabs: list[tuple[int, Tensor]] = []
        self._free = 0  # words still free at the end of the last slab
        self._end = 0

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return sum(slab.nbytes for _, slab in self._slabs)

    def reserve(self, n: int, word: torch.dtype) -> None:
        if n > self._free:
            if self._free:
                # What the last slab has to spare would never be used.
                first, slab = self._slabs[-1]
                self._slabs[-1] = first, slab[: self._end - first].clone()
            with torch.inference_mode(False):
                self._slabs.append((self._end, torch.empty(n, dtype=word)))
            self._free = n

    def append(self, words: Tensor, spare: int) -> int:
        n = words.numel()
        if n > self._free:
            self.reserve(n if n >= spare else spare, words.dtype)
        first, (base, slab) = self._end, self._slabs[-1] if self._slabs else (0, words)
        if n:
            slab[first - base : first - base + n] = words
        self._end, self._free = first + n, self._free - n
        return first

    @contextmanager
    def opened(self, word: torch.dtype) -> Iterator[list[tuple[int, np.ndarray]]]:
        yield [(first, slab.numpy()) for first, slab in self._slabs]

    def tensors(self) -> list[Tensor]:
        return [slab for _, slab in self._slabs]

    def clone(self) -> _Store:
        other = _Slabs()
        other._slabs = [(first, slab.clone()) for first, slab in self._slabs]
        other._free, other._end = self._free, self._end
        return other


class _File(_Store):
    """A temporary file without a name of its own; what is read through its mapping does not stay resident."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="quernel-", buffering=0)  # noqa: SIM115
        self.nbytes = 0
        self._mapping: mmap.mmap | None = None

    def reserve(self, n: int, word: torch.dtype) -> None:
        """Do nothing: a file grows where it ends."""

    def append(self, words: Tensor, spare: int) -> int:
        size = words.dtype.itemsize
        if not words.numel():
            return self.nbytes // size
        self._file.seek(self.nbytes)
        left = words.numpy().view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]
        first, self.nbytes = self.nbytes // size, self.nbytes + words.nbytes
        return first

    @contextmanager
    def opened(self, word: torch.dtype) -> Iterator[list[tuple[int, np.ndarray]]]:
        if not self.nbytes:
            yield []
            return
        if self._mapping is None or len(self._mapping) < self.nbytes:
            self._close_mapping()
            self._mapping = mmap.mmap(self._file.fileno(), self.nbytes, access=mmap.ACCESS_READ)
        parts = [(0, np.frombuffer(self._mapping, dtype=torch.empty(0, dtype=word).numpy().dtype))]
        try:
            yield parts
        finally:
            parts.clear()
            if hasattr(mmap, "MADV_DONTNEED"):
                self._mapping.madvise(mmap.MADV_DONTNEED)
            else:
                self._close_mapping()

    def _close_mapping(self) -> None:
        mapping, self._mapping = self._mapping, None
        try:
            if mapping is not None:
                mapping.close()
        except BufferError:
            # Somebody still looks at it, e.g. a traceback; it goes with the last look.
            return

    def tensors(self) -> list[Tensor]:
        return []

    def clone(self) -> _Store:
        other = _File()
        self._file.seek(0)
        shutil.copyfileobj(self._file, other._file)
        other.nbytes = self.nbytes
        return other


def _warmup() -> None:
    """Compile the copies out of both storages, and the choice (see ``quernel warmup``)."""
    starts, counts = np.zeros((2, 1, 1), np.int64)
    choose_units(np.zeros((1, 1), np.float32), starts, counts + 1, 1, starts.copy(), counts, 0, 1)
    for storage in STORAGES:
        pool = KVPool(1, 2, storage=storage)
        pool.append(torch.zeros(1, 1, 2))
        pool.gather(starts, counts, torch.empty(1, 1, 2))
