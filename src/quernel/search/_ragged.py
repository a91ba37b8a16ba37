"""``RaggedVectors``: many short lists of vectors in one array, with offsets; float32, float16 or int8, mapped or held.

List i is ``rows[offsets[i] : offsets[i + 1]]``. float16 rounds to 11 bits; int8 keeps a scale a vector, the largest
|coordinate| / 127. ``Ragged`` is the plain form in which lists come in: checked float32 rows and offsets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from quernel._array_folder import Arrays, readable, take
from quernel._errors import FormatError, QuernelError
from quernel._growing import GrowingArray
from quernel._validate import check_choice, check_int
from quernel.hashing._family import as_array
from quernel.search._stored_numbers import VECTOR_TYPES, VectorType, encoded

# Rows whose lengths are taken at a time, so that the temporaries stay near the cache.
_BLOCK = 2**14

Rows = NDArray[np.float32]
Slots = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """n lists of vectors as they came in: list i is ``rows[offsets[i]:offsets[i + 1]]``.

    Attributes
    ----------
    offsets : array, shape (n + 1,), int64
    rows : array, shape (total, dim), float32
    """

    offsets: NDArray[np.int64]
    rows: Rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, some: slice) -> Ragged:
        start, stop, _ = some.indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        return Ragged(offsets - offsets[0], self.rows[offsets[0] : offsets[-1]])

    def take(self, places: NDArray[np.int64]) -> Ragged:
        """Return the lists at these places, in this order."""
        parts = [self.rows[self.offsets[i] : self.offsets[i + 1]] for i in places]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return Ragged(offsets, np.concatenate([self.rows[:0], *parts]))

    @classmethod
    def of(cls, name: str, lists: Any, dim: int) -> Self:
        """Take a sequence of arrays or tensors (n_i, dim), and check every one of them.

        Raises
        ------
        QuernelError
            Naming the list that is empty, not finite, or of another shape.
        """
        if isinstance(lists, Ragged):
            lists = [lists.rows[a:b] for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]
        shape: tuple[int, ...] | None = tuple(lists.shape) if hasattr(lists, "shape") else None
        if (
            (shape is not None and len(shape) != 3)
            or isinstance(lists, str | bytes | dict)
            or not isinstance(lists, Iterable)
        ):
            raise QuernelError(
                f"{name} must be a list of arrays of shape (n_i, {dim}), one a text; got "
                f"{type(lists).__name__}{'' if shape is None else f' of shape {shape}'}. "
                "Put a single text into a list"
            )
        if shape is not None and 0 not in shape:
            # All of one size: checked at once.
            n, size, width = shape
            if width != dim:
                raise QuernelError(f"{name} must have shape (n, size, {dim}); got {shape}")
            rows = _checked(name, as_array(lists).reshape(n * size, width), dim)
            return cls(size * np.arange(n + 1, dtype=np.int64), rows)
        arrays = [_checked(f"{name}[{i}]", one, dim) for i, one in enumerate(lists)]
        sizes = np.array([len(one) for one in arrays], np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(offsets, np.concatenate(arrays) if arrays else np.zeros((0, dim), np.float32))


class RaggedVectors:
    """Lists of vectors that grow by whole lists.

    Parameters
    ----------
    dim : int
        Coordinates of a vector.
    dtype : {"float32", "float16", "int8"}, default="float32"
        How they are kept.
    """

    def __init__(self, dim: int, dtype: VectorType = "float32") -> None:
        self.dim = check_int("dim", dim, low=1)
        self.dtype = check_choice("dtype", dtype, VECTOR_TYPES)
        self._rows = GrowingArray(np.zeros((0, dim), np.dtype(dtype)))
        self._scales = GrowingArray(np.zeros(0, np.float32))
        self._offsets = GrowingArray(np.zeros(1, np.int64))
        # The largest length of a vector, and of how many it is.
        self._longest, self._measured = 0.0, 0

    def __len__(self) -> int:
        """Lists held."""
        return len(self._offsets) - 1

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each list begins, and where the last one ends."""
        found: NDArray[np.int64] = self._offsets.rows
        return found

    @property
    def rows(self) -> NDArray[Any]:
        """All vectors as they are kept."""
        found: NDArray[Any] = self._rows.rows
        return found

    @property
    def scales(self) -> NDArray[np.float32]:
        """What int8 vectors are multiplied by, one number a vector; empty for the other kinds."""
        found: NDArray[np.float32] = self._scales.rows
        return found

    def append(self, lists: Ragged) -> None:
        """Add lists.

        Raises
        ------
        QuernelError
            If a coordinate does not fit into float16; then nothing was added.
        """
        rows, scales = encoded(lists.rows, self.dtype)
        if scales is not None:
            self._scales.append(scales)
        self._rows.append(rows)
        self._offsets.append(lists.offsets[1:] + self.offsets[-1])

    def values(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return vectors [start, stop) in float32; those of a float32 store are a view."""
        rows: Rows = as_float(self.rows[start:stop]).numpy()
        return rows * self.scales[start:stop, None] if self.dtype == "int8" else rows

    def longest(self) -> float:
        """Return a bound of the vectors' lengths: the largest of all that were here at once."""
        for first in range(self._measured, len(self.rows), _BLOCK):
            part = self.values(first, min(first + _BLOCK, len(self.rows)))
            self._longest = max(self._longest, float(np.linalg.norm(part, axis=1).max()))
        self._measured = len(self.rows)
        # Upwards, past the rounding of the lengths themselves.
        return self._longest * (1 + 1e-5)

    def blocks(self, rows: int) -> NDArray[np.int64]:
        """Return numbers of lists that cut them into blocks of about so many vectors, the first 0, the last all."""
        cuts = np.searchsorted(self.offsets, np.arange(0, self.offsets[-1], rows))
        return np.unique(np.append(cuts, len(self))).astype(np.int64)

    def gathered(self, slots: Slots) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float32]]:
        """Return offsets, vectors as they are kept, and scales of these lists in this order."""
        sizes = self.offsets[slots + 1] - self.offsets[slots]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = np.empty((offsets[-1], self.dim), self.rows.dtype)
        # Numba knows no float16: its bits are copied.
        bits = np.uint16 if self.dtype == "float16" else self.rows.dtype
        _gather(self.offsets, self.rows.view(bits), slots, offsets, rows.view(bits))
        scales = np.empty(offsets[-1] if self.dtype == "int8" else 0, np.float32)
        if len(scales):
            _gather(self.offsets, self.scales[:, None], slots, offsets, scales[:, None])
        return offsets, rows, scales

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Drop the other lists; the rest is numbered again."""
        offsets, rows, scales = self.gathered(np.flatnonzero(wanted).astype(np.int64))
        self._offsets, self._rows, self._scales = (GrowingArray(array) for array in (offsets, rows, scales))
        self._measured = min(self._measured, len(rows))

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        held = {"offsets": self.offsets, "vectors": self.rows}
        return held | ({"scales": self.scales} if self.dtype == "int8" else {})

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take ``n`` lists out of the arrays of a file; the vectors of a mapped file are not read.

        Raises
        ------
        FormatError
            If something is missing, or the offsets do not divide the vectors into lists.
        """
        offsets = take(arrays, "offsets", np.int64, (n + 1,))
        rows = take(arrays, "vectors", np.dtype(self.dtype), (None, self.dim))
        scaled = self.dtype == "int8"
        scales = take(arrays, "scales", np.float32, (len(rows),)) if scaled else np.zeros(0, np.float32)
        # A bad number would be read as an address.
        if offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) <= 0).any():
            raise FormatError("array 'offsets' does not divide array 'vectors' into lists")
        self._offsets, self._rows, self._scales = (GrowingArray(array) for array in (offsets, rows, scales))


def as_float(rows: NDArray[Any], out: Tensor | None = None) -> Tensor:
    """Return rows as a float32 tensor; converted into ``out`` where that is given and they are not float32."""
    held = readable(rows)
    if held.dtype == torch.float32:
        return held
    return held.float() if out is None else out.copy_(held)


def _checked(name: str, one: Any, dim: int) -> Rows:
    try:
        rows = as_array(one)
    except (TypeError, ValueError) as error:
        raise QuernelError(f"{name} must be an array of shape (n, {dim}): {error}") from error
    if rows.dtype.kind not in "fiu":
        raise QuernelError(f"{name} must hold real numbers; got {rows.dtype}")
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise QuernelError(f"{name} must have shape (n, {dim}); got {rows.shape}")
    if not len(rows):
        raise QuernelError(f"{name} has no vectors; leave empty texts out")
    if not np.isfinite(rows).all():
        raise QuernelError(f"{name} holds NaN or infinity; clean it before passing it on")
    return np.ascontiguousarray(rows, np.float32)


@njit(nogil=True, cache=True, fastmath=False)
def _gather(offsets: Any, rows: Any, slots: Any, places: Any, out: Any) -> None:
    for i in range(len(slots)):
        first = offsets[slots[i]]
        for j in range(offsets[slots[i] + 1] - first):
            for c in range(rows.shape[1]):
                out[places[i] + j, c] = rows[first + j, c]
