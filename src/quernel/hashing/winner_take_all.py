"""``WinnerTakeAll``: which of a few random coordinates is largest, a hash of order (Yagnik et al., 2011).

h(x) = argmax of x over m randomly chosen coordinates, in the order they were drawn; ties go to the first. Scaling,
shifting and any other increasing function of all coordinates changes nothing. Two vectors agree with probability
sum_i C(#{j : x_j < x_i and y_j < y_i}, m - 1) / C(dim, m), the chance that one coordinate wins in both.
Cost: m comparisons a hash, no multiplication.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from scipy.special import comb

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.hashing._family import LSHFamily, Raw, check_rows, over_rows


class WinnerTakeAll(LSHFamily):
    """L codes of K winners among ``window`` coordinates each.

    Parameters
    ----------
    dim : int
        Coordinates of a vector.
    n_tables, n_concat : int
        L and K.
    window : int, default=8
        Coordinates m that compete, in [2, dim].
    n_cells : int, default=2**32
        Range of the mixed codes.
    seed : int, default=0

    Examples
    --------
    >>> import numpy as np
    >>> family = WinnerTakeAll(dim=16, n_tables=5, n_concat=2, window=4)
    >>> x = np.arange(16.0)
    >>> bool((family.codes(x) == family.codes(np.exp(x))).all())
    True
    """

    def __init__(
        self, dim: int, n_tables: int, n_concat: int, window: int = 8, n_cells: int = 2**32, *, seed: int = 0
    ) -> None:
        super().__init__(n_tables, n_concat, n_cells, seed)
        self.dim = check_int("dim", dim, low=2)
        self.window = check_int("window", window, low=2, high=self.dim)
        draw = _random.generator(np.random.SeedSequence([self.seed, self.dim]))
        keys = draw.random((self.n_tables * self.n_concat, self.dim), dtype=np.float32)
        self.places = np.argsort(keys, axis=1)[:, : self.window].astype(np.int32)

    def raw(self, X: Any) -> Raw:
        """Return which of its coordinates won each hash, int64 (n, L, K) in [0, window)."""
        rows = check_rows("X", X, self.dim)
        out = np.empty((len(rows), len(self.places)), np.int64)
        over_rows(lambda start, stop: winners(rows, self.places, out, start, stop), len(rows))
        return out.reshape(len(rows), self.n_tables, self.n_concat)

    def hash_probability(self, *similarity: Any) -> Any:
        """Return the probability that one hash is equal for two vectors x and y of distinct numbers, shape (dim,)."""
        x, y = (check_rows(name, value, self.dim)[0] for name, value in zip("xy", similarity, strict=True))
        if len(np.unique(x)) < self.dim or len(np.unique(y)) < self.dim:
            raise QuernelError("x and y must each hold distinct numbers; ties have no closed form")
        below = ((x[:, None] > x) & (y[:, None] > y)).sum(1)
        return float(comb(below, self.window - 1).sum() / comb(self.dim, self.window))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "dim": self.dim,
            "n_tables": self.n_tables,
            "n_concat": self.n_concat,
            "window": self.window,
            "n_cells": self.n_cells,
            "seed": self.seed,
        }


@njit(nogil=True, cache=True, fastmath=False)
def winners(x: Any, places: Any, out: Any, start: Any, stop: Any) -> None:
    """Write the winners among x (n, dim) at places (m, window) of rows [start, stop) to ``out`` (n, m)."""
    for i in range(start, stop):
        for p in range(places.shape[0]):
            best = 0
            for j in range(1, places.shape[1]):
                if x[i, places[p, j]] > x[i, places[p, best]]:
                    best = j
            out[i, p] = best


def _warmup() -> None:
    """Compile the hashes; ``quernel warmup`` calls it."""
    WinnerTakeAll(2, 1, 1, 2).codes(np.ones((1, 2)))
