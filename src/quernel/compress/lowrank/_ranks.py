"""How many ranks each matrix keeps: one threshold over normalised spectra, or one fraction for all.

Pure functions over singular values.  A spectrum is normalised by s~_j = (s_j - s_min) / (s_max - s_min), so that
matrices of any scale compare; all values under one tau go.  Values are ordered once, so a target is met by counting
(exact to one rank, ties resolved in layer order) where a search over tau would only come close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Spectrum = NDArray[np.float64]
Shape = tuple[int, int]
MinRatio = float | Literal["auto"]


@dataclass(frozen=True)
class RankChoice:
    """Kept rank of every matrix, and the threshold that gave it (None for uniform ranks)."""

    ranks: tuple[int, ...]
    tau: float | None = None


def normalised(spectrum: Spectrum, shape: Shape) -> Spectrum:
    """Map singular values, descending, to [0, 1]; a flat spectrum to ones, so that no threshold splits it."""
    largest, smallest = float(spectrum[0]), float(spectrum[-1])
    # Rounding spreads equal values by about this much (the numerical-rank tolerance for float32).
    if largest - smallest <= max(shape) * float(np.finfo(np.float32).eps) * largest:
        return np.ones_like(spectrum)
    return (spectrum - smallest) / (largest - smallest)


def ranks_at(spectra: Sequence[Spectrum], tau: float) -> tuple[int, ...]:
    """Return how many values of each normalised spectrum are at least ``tau``."""
    return tuple(int(np.count_nonzero(values >= tau)) for values in spectra)


def saves(shape: Shape, rank: int) -> bool:
    """Say whether two factors of this rank hold fewer numbers than the matrix."""
    return rank * sum(shape) < shape[0] * shape[1]


def is_low_rank(shape: Shape, rank: int, min_ratio: MinRatio) -> bool:
    """Say whether a matrix is a low-rank component: its reduction exceeds ``min_ratio``, or break-even for "auto"."""
    if min_ratio == "auto":
        return saves(shape, rank)
    return 1.0 - rank / min(shape) > min_ratio


def stored_parameters(shapes: Sequence[Shape], ranks: Sequence[int], min_ratio: MinRatio) -> int:
    """Count weights stored when low-rank components that save any are factored and the rest stays dense."""
    return sum(
        k * (m + n) if is_low_rank((m, n), k, min_ratio) and saves((m, n), k) else m * n
        for (m, n), k in zip(shapes, ranks, strict=True)
    )


def allowed_parameters(shapes: Sequence[Shape], target: float) -> int:
    """Return how many weights may be stored once the fraction ``target`` is gone."""
    # The nudge keeps (1 - 0.9) * 1000 from becoming 99 by rounding.
    return int((1.0 - target) * sum(m * n for m, n in shapes) + 1e-6)


class Thresholds:
    """Every choice that one threshold over these normalised spectra can make, in order of values dropped."""

    def __init__(self, spectra: Sequence[Spectrum]) -> None:
        self._sizes = np.array([len(values) for values in spectra])
        values = np.concatenate(spectra)
        owners = np.repeat(np.arange(len(spectra)), self._sizes)
        order = np.argsort(values, kind="stable")
        self._values, self._owners = values[order], owners[order]
        # The largest value of every matrix is 1 and stays: a rank of 0 would cut the network.
        self.most = int(np.searchsorted(self._values, 1.0))

    @property
    def total(self) -> int:
        """Number of values in all spectra."""
        return len(self._values)

    def dropping(self, count: int) -> RankChoice:
        """Drop the ``count`` smallest values; tau is the smallest that stays."""
        dropped = np.bincount(self._owners[:count], minlength=len(self._sizes))
        return RankChoice(tuple((self._sizes - dropped).tolist()), float(self._values[count]))


def threshold_for_ranks(spectra: Sequence[Spectrum], target: float) -> RankChoice:
    """Drop the fraction ``target`` of all values, or as many as leave every matrix its flat top."""
    thresholds = Thresholds(spectra)
    return thresholds.dropping(min(round(target * thresholds.total), thresholds.most))


def threshold_for_parameters(
    spectra: Sequence[Spectrum], shapes: Sequence[Shape], target: float, min_ratio: MinRatio
) -> RankChoice:
    """Drop the fewest values with which at least the fraction ``target`` of the stored weights is gone.

    Drops as many as it may if even that is not enough; the caller compares ``stored_parameters``.
    """
    thresholds = Thresholds(spectra)
    allowed = allowed_parameters(shapes, target)
    low, high = 0, thresholds.most
    # Stored weights never grow with the number of dropped values, so bisection finds the first that fits.
    while low < high:
        middle = (low + high) // 2
        if stored_parameters(shapes, thresholds.dropping(middle).ranks, min_ratio) <= allowed:
            high = middle
        else:
            low = middle + 1
    return thresholds.dropping(low)


def uniform_ranks(shapes: Sequence[Shape], target: float, budget: str) -> RankChoice:
    """Give every matrix the same fraction of its full rank, or of its dense weights."""
    keep = 1.0 - target
    if target == 0:
        return RankChoice(tuple(min(shape) for shape in shapes))
    if budget == "rank":
        return RankChoice(tuple(max(1, round(keep * min(shape))) for shape in shapes))
    return RankChoice(tuple(min(min(m, n), max(1, int(keep * m * n / (m + n) + 1e-9))) for m, n in shapes))
