"""Axes: linear and logarithmic maps from values to pixels, and round tick values (1, 2 or 5 times a power of ten)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Below this a range has no round steps left in double precision.
TINY = 1e-290


@dataclass(frozen=True)
class Axis:
    """A range of values laid over a range of pixels."""

    low: float
    high: float
    start: float  # pixel of low
    stop: float  # pixel of high

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Return about ``count`` round values inside the range, with labels of equal precision."""
        step = _round_step((self.high - self.low) / max(count, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        spec = f".{decimals}f" if decimals <= 8 and abs(self.high) < 1e7 else ".3g"
        # Adding 0.0 turns the label "-0" into "0".
        return [(k * step, format(k * step + 0.0, spec)) for k in range(first, last + 1)]


@dataclass(frozen=True)
class LogAxis(Axis):
    """A range of positive values laid over a range of pixels by their logarithms."""

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Return the powers of ten inside the range, with 2 and 5 times them where there are few of them."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 2, 5), range(1, 10)):
            values = [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]
            if len(values) >= min(3, count):
                break
        return [(value, f"{value:,.0f}" if value >= 1 else f"{value:g}") for value in values]


def by_powers(values: Sequence[float], start: float, stop: float) -> LogAxis:
    """Return a logarithmic axis that frames positive values with some air, for speeds over several powers of ten."""
    low, high = min(values), max(values)
    air = max((high / low) ** 0.1, 1.3)
    return LogAxis(low / air, high * air, start, stop)


def from_zero(values: Sequence[float], start: float, stop: float) -> Axis:
    """Return an axis from 0 to a little above the largest value, for sizes and times."""
    top = max(values, default=0.0)
    return Axis(0.0, 1.06 * top if top > TINY else 1.0, start, stop)


def around(values: Sequence[float], start: float, stop: float) -> Axis:
    """Return an axis that frames the values with some air, for metrics."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    # Equal values still get a visible range around them.
    air = 0.1 * (high - low) if high - low > 1e-9 * size else 0.02 * size
    air = air if air > TINY else 0.5
    return Axis(low - air, high + air, start, stop)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
