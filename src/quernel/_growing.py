"""``GrowingArray``: rows appended in amortised constant time; as large as its rows when they came at once."""

from __future__ import annotations

from typing import Any

import numpy as np


class GrowingArray:
    """An array whose first axis grows.

    Parameters
    ----------
    rows : array
        What it begins with; kept, not copied, until something is appended.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self._room = rows
        self._n = len(rows)

    @property
    def rows(self) -> Any:
        """The rows so far, a view."""
        return self._room[: self._n]

    def __len__(self) -> int:
        return self._n

    def append(self, rows: np.ndarray) -> None:
        """Add rows of the same shape and kind."""
        total = self._n + len(rows)
        if total > len(self._room):
            # The first rows get no room to spare: most indexes are filled once.
            size = total if not self._n else max(total, self._n + self._n // 2)
            room = np.empty((size, *self._room.shape[1:]), self._room.dtype)
            room[: self._n] = self.rows
            self._room = room
        self._room[self._n : total] = rows
        self._n = total
