"""How indexes keep the numbers of vectors: float32, float16 (11 bits), or int8 with a float32 scale a vector."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError

VectorType = Literal["float32", "float16", "int8"]
VECTOR_TYPES: tuple[VectorType, ...] = ("float32", "float16", "int8")
_INT8_MAX = np.float32(127)
_FLOAT16_MAX = float(np.finfo(np.float16).max)
# Rows rounded at a time, so that the temporaries stay near the cache.
_BLOCK = 2**14

Rows = NDArray[np.float32]


def check_storable(name: str, rows: Rows, dtype: VectorType) -> None:
    """Raise if a number is beyond what the type holds."""
    if dtype == "float16" and rows.size and float(np.abs(rows).max()) > _FLOAT16_MAX:
        raise QuernelError(
            f"{name} must be within {_FLOAT16_MAX:g} to be stored as float16; got {np.abs(rows).max():g}. "
            'Scale the vectors, or take dtype="float32"'
        )


def encoded(rows: Rows, dtype: VectorType) -> tuple[NDArray[Any], Rows | None]:
    """Return rows as they are kept, and the scale of each for int8: its largest |coordinate| / 127.

    Raises
    ------
    QuernelError
        If a number is beyond what float16 holds.

    Examples
    --------
    >>> codes, scales = encoded(np.array([[1.0, -0.5]], np.float32), "int8")
    >>> codes.tolist(), (codes * scales[:, None]).round(2).tolist()
    ([[127, -64]], [[1.0, -0.5]])
    """
    if dtype != "int8":
        check_storable("x", rows, dtype)
        return rows.astype(dtype, copy=False), None
    codes, scales = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    for first in range(0, len(rows), _BLOCK):
        part = rows[first : first + _BLOCK]
        largest = np.abs(part).max(axis=1, initial=0.0)
        # A vector of zeros keeps the scale finite.
        scale = np.where(largest > 0, largest / _INT8_MAX, np.float32(1))
        scales[first : first + len(part)] = scale
        codes[first : first + len(part)] = np.rint(part / scale[:, None])
    return codes, scales
