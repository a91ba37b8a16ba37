"""``PStable``: the cell of a random projection, a locality-sensitive hash of distance (Datar et al., 2004).

h(x) = floor((<a, x> + b) / w), b uniform in [0, w). With Gaussian a two points at Euclidean distance c agree with
probability  erf(w / (c sqrt 2)) - (2 c / (sqrt(2 pi) w)) (1 - exp(-w^2 / 2 c^2)),
with Cauchy a two points at L1 distance c with probability  (2 / pi) atan(w / c) - (c / (pi w)) ln(1 + (w / c)^2).
Cost: dim L K multiply-adds a row.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.special import erf

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float
from quernel.hashing._directions import Directions, Projections
from quernel.hashing._family import LSHFamily, Raw, check_rows

# Beyond this many cells from zero, float32 no longer holds every integer.
_LARGEST = 2**24
# Where t * t still fits a float64.
_FAR = 1e150


class PStable(LSHFamily):
    """L codes of K cells of random projections.

    Parameters
    ----------
    dim : int
        Coordinates of a point.
    n_tables, n_concat : int
        L and K.
    width : float
        Width w of a cell, in units of distance.
    n_cells : int, default=2**32
        Range of the mixed codes.
    norm : {"l2", "l1"}, default="l2"
        Which distance is hashed.
    directions : {"gaussian", "rademacher", "sparse"}, optional
        For "l2"; default Gaussian, for which the law is exact.
    density : float, default=1/3
        Share of the coordinates that a sparse direction reads.
    seed : int, default=0

    Examples
    --------
    >>> import numpy as np
    >>> family = PStable(dim=3, n_tables=16, n_concat=2, width=4.0)
    >>> family.codes(np.zeros((5, 3))).shape, round(float(family.collision_probability(2.0)), 4)
    ((5, 16), 0.3715)
    """

    def __init__(
        self,
        dim: int,
        n_tables: int,
        n_concat: int,
        width: float,
        n_cells: int = 2**32,
        *,
        norm: Literal["l2", "l1"] = "l2",
        directions: Literal["gaussian", "rademacher", "sparse"] | None = None,
        density: float = 1 / 3,
        seed: int = 0,
    ) -> None:
        super().__init__(n_tables, n_concat, n_cells, seed)
        self.width = check_float("width", width, low=0.0, open_low=True)
        self.norm = check_choice("norm", norm, ("l2", "l1"))
        if norm == "l1" and directions is not None:
            raise QuernelError(f'directions is for norm="l2"; norm="l1" has Cauchy ones; got {directions!r}')
        check_choice("directions", directions, (None, "gaussian", "rademacher", "sparse"))
        self.directions, self.density = directions, density
        kind: Directions = "cauchy" if norm == "l1" else directions or "gaussian"
        n = self.n_tables * self.n_concat
        # Divided by the width here, so that a cell is one unit and float32 keeps the digits that matter.
        self.projections = Projections(dim, n, kind, self.seed, scale=1 / self.width, density=density)
        self.dim = self.projections.dim
        self.offsets = _random.generator(np.random.SeedSequence([self.seed, 1])).random(n, dtype=np.float32)

    def margins(self, X: Any) -> NDArray[np.float32]:
        """Return how far into its cell each projection lies, in [0, 1), float32 (n, L, K)."""
        values = self._shifted(X)
        return values - np.floor(values)

    def raw(self, X: Any) -> Raw:
        """Return the cells, int64 (n, L, K).

        Raises
        ------
        QuernelError
            If a point lies so far out that float32 cannot tell its cells apart.
        """
        values = np.floor(self._shifted(X))
        # A Cauchy direction is enormous now and then, which spoils one hash; a point that is far out spoils them all.
        reach = values if self.norm == "l2" else np.abs(check_rows("X", X, self.dim)).sum(axis=1) / self.width
        if reach.size and np.abs(reach).max() >= _LARGEST:
            raise QuernelError(
                f"X has points more than {_LARGEST} cells of width {self.width:g} from zero; centre or scale X, or "
                "take a larger width"
            )
        return values.astype(np.int64)

    def hash_probability(self, *similarity: Any) -> Any:
        """Return the probability that one cell is equal at this distance; 1 at distance 0."""
        (distance,) = similarity
        return pstable_probability(distance, self.width, self.norm)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "dim": self.dim,
            "n_tables": self.n_tables,
            "n_concat": self.n_concat,
            "width": self.width,
            "n_cells": self.n_cells,
            "norm": self.norm,
            "directions": self.directions,
            "density": self.density,
            "seed": self.seed,
        }

    def _shifted(self, X: Any) -> NDArray[np.float32]:
        rows = check_rows("X", X, self.dim)
        values = self.projections.project(rows) + self.offsets
        return np.ascontiguousarray(values).reshape(len(rows), self.n_tables, self.n_concat)


def pstable_probability(distance: Any, width: float, norm: str = "l2") -> Any:
    """Return the collision probability of one p-stable hash.

    Parameters
    ----------
    distance : float or array
        Euclidean ("l2") or L1 distance, non-negative.
    width : float
        Width of a cell.
    norm : {"l2", "l1"}
    """
    c = np.asarray(distance, dtype=float)
    if not (c >= 0).all():
        raise QuernelError(f"distance must not be negative or NaN; got {distance!r}")
    check_choice("norm", norm, ("l2", "l1"))
    # One unit of width where the distance is 0: both formulas are 1 there by their limit.
    safe = np.where(c > 0, c, 1.0)
    t = np.minimum(width / safe, _FAR)
    if norm == "l2":
        value = erf(t / np.sqrt(2)) - np.sqrt(2 / np.pi) / t * -np.expm1(-t * t / 2)
    else:
        value = 2 / np.pi * np.arctan(t) - np.log1p(t * t) / (np.pi * t)
    return np.where(c > 0, value, 1.0)[()]


@njit(nogil=True, cache=True, fastmath=False)
def floor_cells(projections: Any, offsets: Any, out: Any) -> None:
    """Write floor(projection + offset) of one row, (>= m,) and (m,), as int64 to ``out`` (m,)."""
    for p in range(out.shape[0]):
        out[p] = np.int64(np.floor(projections[p] + offsets[p]))
