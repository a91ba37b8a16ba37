"""``Chains``: rows added to hash tables after they were sorted, each bucket's rows linked in order of arrival.

Appending costs one write and one read a table, on average over many; reading a bucket follows its links. Twelve
bytes a bucket and four an entry, so it is for the few rows that wait to be sorted in (see ``tables.BucketTables``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._growing import GrowingArray


class Chains:
    """Buckets of L tables over codes in ``range(n_codes)``, as links between row numbers.

    Attributes
    ----------
    heads, lasts : array, shape (L * n_codes,), int32
        First and last row of a bucket, -1 where it is empty.
    nexts : array, shape (n, L), int32
        The row after this one in its bucket of a table, -1 at the end.

    Examples
    --------
    >>> import numpy as np
    >>> chains = Chains(n_tables=1, n_codes=4)
    >>> chains.append(np.array([[2], [0], [2]]))
    >>> chains.bucket(0, 2)
    [0, 2]
    """

    def __init__(self, n_tables: int, n_codes: int) -> None:
        self.n_codes = n_codes
        self.heads = np.full(n_tables * n_codes, -1, np.int32)
        self.lasts = np.full(n_tables * n_codes, -1, np.int32)
        self._nexts = GrowingArray(np.zeros((0, n_tables), np.int32))

    @property
    def nexts(self) -> NDArray[np.int32]:
        """The row after each in its bucket, (n, L)."""
        rows: NDArray[np.int32] = self._nexts.rows
        return rows

    def append(self, codes: NDArray[Any]) -> None:
        """Add rows of codes (n, L), each below ``n_codes``."""
        start = len(self.nexts)
        self._nexts.append(np.full(codes.shape, -1, np.int32))
        _link(codes, self.n_codes, self.heads, self.lasts, self.nexts, start)

    def bucket(self, table: int, code: int) -> list[int]:
        """Return the rows of one bucket."""
        found, row = [], int(self.heads[table * self.n_codes + code])
        while row >= 0:
            found.append(row)
            row = int(self.nexts[row, table])
        return found


@njit(nogil=True, cache=True, fastmath=False)
def _link(codes: Any, n_codes: Any, heads: Any, lasts: Any, nexts: Any, start: Any) -> None:
    for i in range(codes.shape[0]):
        row = start + i
        for t in range(codes.shape[1]):
            place = t * n_codes + np.int64(codes[i, t])
            if heads[place] < 0:
                heads[place] = row
            else:
                nexts[lasts[place], t] = row
            lasts[place] = row
