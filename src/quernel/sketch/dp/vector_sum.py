"""``PrivateVectorSum``, ``release_vector_sum``: a noisy sum of vectors of bounded length, the base of mean embeddings.

Row x of length at most B is rounded to integers q(x) = round(x / (B g)), g = 2^-20, and the sum of the q is released
with discrete noise. Neighbours move it by at most 1 / g + sqrt(D) / 2 steps in L2, sqrt(D) / g + D / 2 in L1; twice
that if a record is exchanged. With a count c0 > 0, one more coordinate of c0 a row gives the number of rows with it.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_bool, check_finite, check_float, check_int
from quernel.sketch.dp.domain import ROUNDING, Ball, checked_rows
from quernel.sketch.dp.ledger import PrivacyLedger
from quernel.sketch.dp.mechanism import Neighbours, Sensitivity
from quernel.sketch.dp.noise import Integers
from quernel.sketch.dp.structure import PrivateStructure, PublicRelease
from quernel.sketch.dp.terms import PrivacyTerms

#: One step of the lattice, for contributions of length 1.
GRAIN = 2.0**-20
_BLOCK = 1024


def count_steps(count_weight: float) -> int:
    """Return how many steps of the lattice one row adds to the coordinate that counts, 0 for none."""
    return round(check_float("count_weight", count_weight, low=0.0, high=1.0) / GRAIN)


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable", headline=False)
class PublicVectorSum(PublicRelease):
    """A noisy sum of vectors that may be published; ``PrivateVectorSum.release`` makes it.

    Attributes
    ----------
    values : array, shape (dim,), float64
        The sum, unbiased.
    n_rows : float or None
        Number of rows: exact where it is public ("replace"), noisy where it was counted, else None.
    privacy : dict
        Epsilon, delta, neighbours, mechanism, sensitivity and scale in units of the values.
    """

    def __init__(self, dim: int, n_rows: float | None, privacy: dict[str, Any]) -> None:
        self.dim = check_int("dim", dim, low=1)
        self.n_rows = None if n_rows is None else check_float("n_rows", n_rows)
        self.privacy = privacy
        self.values = np.zeros(dim)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The sum over the number of rows, at least 1: slightly biased where that is noisy."""
        if self.n_rows is None:
            raise QuernelError("the number of rows was not released; give PrivateVectorSum a count_weight > 0")
        return self.values / max(self.n_rows, 1.0)

    def query(self, y: ArrayLike) -> NDArray[np.float64]:
        """Return the dot products of the sum with rows y (n, dim)."""
        return np.asarray(checked_rows("y", y, self.dim) @ self.values, np.float64)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"dim": self.dim, "n_rows": self.n_rows, "privacy": self.privacy}

    def _arrays(self) -> Arrays:
        return {"values": self.values}

    def _restore(self, arrays: Arrays) -> None:
        self.values = take(arrays, "values", np.float64, (self.dim,))
        check_finite("array 'values'", self.values)


class PrivateVectorSum(PrivateStructure):
    """Collect vectors of bounded length and release their sum with noise.

    Parameters
    ----------
    dim : int
        Length D of a vector.
    bound : float, default=1.0
        Largest L2 length B; known without looking at the rows.
    epsilon, delta, neighbours, mechanism, unsafe_float, insecure_noise_seed
        See ``PrivacyTerms``.
    count_weight : float, default=0.0
        What a row adds to a coordinate that counts rows, in units of ``bound``; 0.1 costs half a percent of noise.
        Ignored with "replace", where the number of rows is public.
    clip : bool, default=False
        Shorten rows that are too long instead of refusing them.

    Examples
    --------
    >>> total = PrivateVectorSum(3, epsilon=1.0, delta=1e-6, insecure_noise_seed=0).partial_fit(np.eye(3))
    >>> release = total.release()
    >>> release.values.shape, release.privacy["mechanism"]
    ((3,), 'laplace')
    """

    dim: int

    def __init__(
        self,
        dim: int,
        *,
        bound: float = 1.0,
        epsilon: float = 1.0,
        delta: float = 0.0,
        neighbours: Neighbours = "add_remove",
        mechanism: str = "auto",
        count_weight: float = 0.0,
        clip: bool = False,
        unsafe_float: bool = False,
        insecure_noise_seed: int | None = None,
    ) -> None:
        super().__init__(PrivacyTerms(epsilon, delta, neighbours, mechanism, unsafe_float, insecure_noise_seed))
        self.dim = check_int("dim", dim, low=1)
        self.bound = check_float("bound", bound, low=0.0, open_low=True)
        self.clip = check_bool("clip", clip)
        self.count_weight = count_weight
        self._count_steps = 0 if neighbours == "replace" else count_steps(count_weight)
        self._rows = 0
        self._total = np.zeros(dim, np.int64)

    @property
    def grain(self) -> float:
        """What one step of the sums stands for."""
        return self.bound * GRAIN

    def partial_fit(self, X: ArrayLike, y: object = None) -> Self:
        """Add rows (n, dim); ``y`` is ignored."""
        rows = checked_rows("X", X, self.dim)
        total = np.zeros_like(self._total)
        for start in range(0, len(rows), _BLOCK):
            block = Ball(self.bound).applied("X", rows[start : start + _BLOCK], clip=self.clip)
            total += np.rint(block.astype(np.float64) / self.grain).astype(np.int64).sum(0)
        self._total += total
        self._rows += len(rows)
        return self

    def sensitivity(self) -> Sensitivity:
        """Return how far the sums move between neighbours."""
        twice = 1 + (self.terms.neighbours == "replace")
        count, n = self._count_steps * self.grain, self.dim + (self._count_steps > 0)
        length = self.bound * (1 + ROUNDING)
        return Sensitivity.on_lattice(
            twice * (math.sqrt(self.dim) * length + count),
            twice * math.hypot(length, count),
            n_coords=n,
            grain=self.grain,
            neighbours=self.terms.neighbours,
        )

    def config(self) -> dict[str, Any]:
        """Return what two sums must agree on to be merged."""
        settings = {"dim": self.dim, "bound": self.bound, "count_weight": self.count_weight, "clip": self.clip}
        return settings | self.terms.to_json()

    def _sums(self) -> Integers:
        count = [self._rows * self._count_steps] if self._count_steps else []
        return np.concatenate((self._total, np.array(count, np.int64)))

    def _add(self, other: Self) -> None:
        self._total += other._total
        self._rows += other._rows

    def _forget(self) -> None:
        self._total, self._rows = np.zeros_like(self._total), 0

    def _published(self, values: NDArray[np.float64], privacy: dict[str, Any]) -> PublicVectorSum:
        n_rows = None
        if self.terms.neighbours == "replace":
            n_rows = float(self._rows)
        elif self._count_steps:
            n_rows = float(values[-1]) / (self._count_steps * self.grain)
        made = PublicVectorSum(self.dim, n_rows, privacy)
        made.values = values[: self.dim]
        return made


def release_vector_sum(
    vectors: ArrayLike,
    *,
    bound: float = 1.0,
    epsilon: float,
    delta: float = 0.0,
    ledger: PrivacyLedger | None = None,
    label: str | None = None,
    **options: Any,
) -> PublicVectorSum:
    """Release the sum of the rows of ``vectors`` with noise, in one call.

    Parameters
    ----------
    vectors : array, shape (n, D)
        Rows of L2 length at most ``bound``.
    bound, epsilon, delta
        See ``PrivateVectorSum``.
    ledger : PrivacyLedger, optional
        The budget of the data set that the rows come from; give it unless this is the only release from it.
    label : str, optional
        What the ledger calls it.
    **options
        ``neighbours``, ``mechanism``, ``count_weight``, ``clip``, ``unsafe_float``, ``insecure_noise_seed``.

    Returns
    -------
    release : PublicVectorSum

    Examples
    --------
    >>> features = np.full((1000, 4), 0.5)
    >>> release = release_vector_sum(features, epsilon=1.0, delta=1e-6, insecure_noise_seed=0)
    >>> bool(np.abs(release.values - 500).max() < 6 * release.noise_std)
    True
    """
    rows = checked_rows("vectors", vectors, None)
    total = PrivateVectorSum(rows.shape[1], bound=bound, epsilon=epsilon, delta=delta, **options)
    release: PublicVectorSum = total.partial_fit(rows).release(ledger, label=label)
    return release
