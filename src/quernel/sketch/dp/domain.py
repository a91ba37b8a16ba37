"""Where rows may lie: declared before any row is seen, because a limit learnt from private rows would tell of them.

A row outside is an error, or is moved to the nearest allowed point with ``clip=True``. The error itself tells that such
a row exists: for data that nobody may ask about, clip.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges
from quernel._validate import check_finite, check_float
from quernel.sketch._pair_kernels import row_squares

Rows = NDArray[np.floating[Any]]
#: Rows of a ball may be longer than its radius by this share, which float32 leaves; sensitivities count it.
ROUNDING = 2.0**-22
# Rows that are longer by no more than this are shortened, not refused.
_ROUNDING = 1e-5


class Domain(ABC):
    """A set of allowed rows."""

    @abstractmethod
    def outside(self, x: Rows) -> NDArray[np.bool_]:
        """Say which rows (n, d) lie outside by more than rounding."""

    @abstractmethod
    def project(self, x: Rows) -> Rows:
        """Return the rows, those outside moved to the nearest point within."""

    @abstractmethod
    def box(self, dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return lowest and highest values of each coordinate."""

    @abstractmethod
    def radius_of(self, dim: int) -> float:
        """Return the largest distance of a row from the middle of the domain."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the domain as JSON values; ``domain_from_json`` reads them."""

    def applied(self, name: str, x: Rows, *, clip: bool) -> Rows:
        """Return rows that lie within, or raise a ``QuernelError``."""
        if not clip:
            self.refuse(name, self.outside(x))
        return self.project(x)

    def refuse(self, name: str, bad: NDArray[np.bool_]) -> None:
        """Raise a ``QuernelError`` if a row is bad."""
        if bad.any():
            raise QuernelError(
                f"{name} has {int(bad.sum())} rows outside the declared {self}, the first is row "
                f"{int(np.argmax(bad))}. Declare a larger domain (from public knowledge), or pass clip=True"
            )


@dataclass(frozen=True)
class Ball(Domain):
    """Rows of length at most ``radius``.

    Parameters
    ----------
    radius : float
        > 0, in L2.
    """

    radius: float

    def __post_init__(self) -> None:
        check_float("radius", self.radius, low=0.0, open_low=True)

    def outside(self, x: Rows) -> NDArray[np.bool_]:
        """Say which rows (n, d) lie outside by more than rounding."""
        return np.asarray(_lengths(x) > self.radius * (1 + _ROUNDING))

    def project(self, x: Rows) -> Rows:
        """Return the rows, those that are too long shortened; lengths are at most ``radius * (1 + ROUNDING)``."""
        return self._shortened(x, _lengths(x))

    def applied(self, name: str, x: Rows, *, clip: bool) -> Rows:
        """Return rows that lie within, or raise a ``QuernelError``."""
        lengths = _lengths(x)
        if not clip:
            self.refuse(name, lengths > self.radius * (1 + _ROUNDING))
        return self._shortened(x, lengths)

    def _shortened(self, x: Rows, lengths: NDArray[np.float64]) -> Rows:
        long = np.flatnonzero(lengths > self.radius * (1 + ROUNDING / 2))
        if not long.size:
            return x
        shortened = x.copy()
        shortened[long] = x[long] * (self.radius / lengths[long, None])
        return shortened

    def box(self, dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return lowest and highest values of each coordinate."""
        return np.full(dim, -self.radius), np.full(dim, self.radius)

    def radius_of(self, dim: int) -> float:
        """Return the radius."""
        return self.radius

    def to_json(self) -> dict[str, Any]:
        """Return the domain as JSON values."""
        return {"radius": float(self.radius)}


@dataclass(frozen=True)
class Box(Domain):
    """Rows whose coordinates lie in [low, high].

    Parameters
    ----------
    low, high : float or sequence of floats
        For all coordinates, or one for each.
    """

    low: Any = 0.0
    high: Any = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            held = np.asarray(getattr(self, name))
            if held.dtype.kind not in "iuf" or held.ndim > 1:
                raise QuernelError(f"{name} must be a number, or one for each coordinate; got {getattr(self, name)!r}")
            check_finite(name, held)
            # Plain tuples, so that equal boxes are equal and can be written down.
            object.__setattr__(self, name, tuple(held.astype(float).tolist()) if held.ndim else float(held))
        if np.ndim(self.low) == np.ndim(self.high) == 1 and len(self.low) != len(self.high):
            raise QuernelError(f"low and high must be equally long; got {len(self.low)} and {len(self.high)}")
        if not (np.asarray(self.low) < np.asarray(self.high)).all():
            raise QuernelError(f"low must be below high; got {self.low} and {self.high}")

    def outside(self, x: Rows) -> NDArray[np.bool_]:
        """Say which rows (n, d) lie outside."""
        low, high = self.box(x.shape[1])
        slack = _ROUNDING * (high - low)
        return np.asarray(((x < low - slack) | (x > high + slack)).any(axis=1))

    def project(self, x: Rows) -> Rows:
        """Return the rows, their coordinates moved into the box."""
        low, high = self.box(x.shape[1])
        return np.asarray(np.clip(x, low.astype(x.dtype), high.astype(x.dtype)))

    def box(self, dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return lowest and highest values of each coordinate."""
        for name in ("low", "high"):
            held = np.asarray(getattr(self, name))
            if held.ndim and len(held) != dim:
                raise QuernelError(f"{name} of the domain has {len(held)} coordinates, the rows have {dim}")
        return np.broadcast_to(np.asarray(self.low), dim).copy(), np.broadcast_to(np.asarray(self.high), dim).copy()

    def radius_of(self, dim: int) -> float:
        """Return half the diagonal."""
        low, high = self.box(dim)
        return math.sqrt(float(((high - low) ** 2).sum())) / 2

    def to_json(self) -> dict[str, Any]:
        """Return the domain as JSON values."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in ("low", "high")}


def domain_from_json(value: Any) -> Domain | None:
    """Return the domain that ``to_json`` described, None for None, a domain as it is."""
    if value is None or isinstance(value, Domain):
        return value
    if isinstance(value, dict) and set(value) == {"radius"}:
        return Ball(**value)
    if isinstance(value, dict) and set(value) == {"low", "high"}:
        return Box(**value)
    raise QuernelError(f"domain must be a Ball, a Box or None; got {value!r}")


def checked_rows(name: str, x: Any, dim: int | None) -> Rows:
    """Return finite rows (n, d), float32 where they were, else float64."""
    rows = np.asarray(x)
    if rows.dtype.kind not in "fiub" or rows.ndim != 2 or (dim is not None and rows.shape[1] != dim):
        raise QuernelError(f"{name} must hold numbers, shape (n, {dim or 'd'}); got {rows.dtype}, shape {rows.shape}")
    rows = np.ascontiguousarray(rows, dtype=np.float32 if rows.dtype == np.float32 else np.float64)
    check_finite(name, rows)
    return rows


def _lengths(x: Rows) -> NDArray[np.float64]:
    squares = np.empty(len(x))
    parallel_ranges(functools.partial(row_squares, x, squares), len(x), grain=256)
    return np.sqrt(squares)
