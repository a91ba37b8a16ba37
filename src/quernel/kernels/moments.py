"""Mergeable sums over rows: largest magnitudes, mean and variance, Gram matrices.

Each summary is ``update``d batch by batch with tensors (..., C) and an optional boolean mask (...) that
leaves padding out, and ``merge``d with summaries of other batches, workers or machines; the order does
not matter beyond float64 rounding, and not at all for ``AbsMax``. NaN or infinity in a row that counts
is an error. Cost: one pass over the batch, memory independent of the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int, check_type
from quernel.kernels.linalg import add_products

_MANTISSA_BITS = 4  # 16 bins an octave
_LOWEST, _HIGHEST = -20, 20  # octaves told apart: magnitudes from 1e-6 to 1e6
_BINS = (_HIGHEST - _LOWEST) << _MANTISSA_BITS
_FIRST_BIN = (127 + _LOWEST) << _MANTISSA_BITS
_MOST_ROWS = 2**31 - 1
# Rows of one float32 product before it is added in float64: short sums keep rounding at 1e-6 relative.
_GRAM_ROWS = 256
# Of a float64 product, which needs no short sums: bounds the memory of a conversion.
_GRAM_ROWS_WIDE = 4096


class AbsMax:
    """Largest magnitude of each channel, or a high percentile of the magnitudes.

    The percentile comes from a histogram with 16 bins an octave between 1e-6 and 1e6: deterministic,
    exact under ``merge``, 2.5 KB a channel. It never lies below the exact one (the value at rank
    ``ceil(percentile / 100 * rows)``) and at most 1/16 (or 1e-6) above it, nor above the maximum.

    Parameters
    ----------
    channels : int
        Size C of the last axis.
    percentile : float, default=100.0
        In (0, 100]; 100 is the maximum and needs no histogram.
    device : torch.device or str, default="cpu"
        Where the summary is kept.

    Examples
    --------
    >>> summary = AbsMax(2)
    >>> summary.update(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
    >>> summary.value.tolist()
    [2.0, 3.0]
    """

    def __init__(self, channels: int, *, percentile: float = 100.0, device: torch.device | str = "cpu") -> None:
        self.channels = check_int("channels", channels, low=1)
        self.percentile = check_float("percentile", percentile, low=0.0, high=100.0, open_low=True)
        self.count = 0
        self.maximum = torch.zeros(channels, device=device)
        self.histogram = (
            torch.zeros(channels, _BINS, dtype=torch.int32, device=device) if self.percentile < 100.0 else None
        )

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the rows of ``x`` (..., C) in; ``mask`` (...) is True where a row counts."""
        rows = _rows("x", x, mask, self.channels)
        if rows.shape[0] == 0:
            return
        self.count = _checked_count(self.count + rows.shape[0])
        magnitude = rows.abs()
        self.maximum = _larger(self.maximum, magnitude.amax(0))
        if self.histogram is not None:
            self.histogram += _binned(magnitude.float()).to(self.histogram.device)

    def merge(self, other: AbsMax) -> None:
        """Take everything in that ``other`` saw."""
        _check_mergeable(self, other, channels=self.channels, percentile=self.percentile)
        self.count = _checked_count(self.count + other.count)
        self.maximum = _larger(self.maximum, other.maximum)
        if self.histogram is not None and other.histogram is not None:
            self.histogram += other.histogram.to(self.histogram.device)

    @property
    def value(self) -> Tensor:
        """Magnitudes, shape (C,); at least float32."""
        _check_seen(self.count)
        if self.histogram is None:
            return self.maximum
        # Smallest bin that has at least ceil(p n / 100) magnitudes at or below it.
        # 99.9 is not a binary fraction; its decimal text is what was meant.
        rank = math.ceil(Fraction(repr(self.percentile)) * self.count / 100)
        bins = (self.histogram.cumsum(1, dtype=torch.int64) < rank).sum(1)
        upper_edge = ((bins + _FIRST_BIN + 1) << (23 - _MANTISSA_BITS)).to(torch.int32).view(torch.float32)
        # The last bin holds everything above 2^20, so only the maximum bounds it.
        return torch.where(bins == _BINS - 1, self.maximum, torch.minimum(upper_edge, self.maximum))


class Moments:
    """Mean and variance of each channel in float64, merged by Chan's rule.

    Parameters
    ----------
    channels : int
        Size C of the last axis.
    device : torch.device or str, default="cpu"
        Where the summary is kept.

    References
    ----------
    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Examples
    --------
    >>> summary = Moments(1)
    >>> summary.update(torch.tensor([[1.0], [3.0]]))
    >>> summary.mean.item(), summary.variance().item()
    (2.0, 2.0)
    """

    def __init__(self, channels: int, *, device: torch.device | str = "cpu") -> None:
        self.channels = check_int("channels", channels, low=1)
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)  # sum of squared deviations from the mean

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the rows of ``x`` (..., C) in; ``mask`` (...) is True where a row counts."""
        rows = _rows("x", x, mask, self.channels)
        n = rows.shape[0]
        if n == 0:
            return
        mean = rows.mean(0, dtype=torch.float64)
        # Deviations from the rounded mean stay in the dtype of the rows; their sum corrects the rounding.
        deviations = rows - mean.to(rows.dtype)
        drift = deviations.sum(0, dtype=torch.float64)
        squares = deviations.square().sum(0, dtype=torch.float64) - drift.square() / n
        self._combine(n, mean, squares)

    def merge(self, other: Moments) -> None:
        """Take everything in that ``other`` saw."""
        _check_mergeable(self, other, channels=self.channels)
        if other.count:
            self._combine(other.count, other._mean, other._squares)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, shape (C,), float64."""
        _check_seen(self.count)
        return self._mean

    def variance(self, correction: int = 1) -> Tensor:
        """Variance of each channel, shape (C,), float64; divides by ``count - correction``."""
        if self.count <= correction:
            raise QuernelError(f"variance with correction={correction} needs more than {self.count} rows")
        return self._squares.clamp(min=0) / (self.count - correction)

    def _combine(self, n: int, mean: Tensor, squares: Tensor) -> None:
        total = _checked_count(self.count + n)
        delta = mean.to(self._mean.device) - self._mean
        self._mean = self._mean + delta * (n / total)
        self._squares = self._squares + squares.to(delta.device) + delta.square() * (self.count * n / total)
        self.count = total


class Gram:
    """Sum of ``x x^T`` over rows: a (C, C) matrix in float64.

    Parameters
    ----------
    channels : int
        Size C of the last axis.
    compute_dtype : torch.float32 or torch.float64, default=torch.float32
        Precision of the products. float32 multiplies blocks of 256 rows and adds them in float64 (relative
        error about 1e-6, several times faster); float64 where a nearly singular solve follows. float64 rows
        are always multiplied in float64.
    device : torch.device or str, default="cpu"
        Where the summary is kept.

    Examples
    --------
    >>> summary = Gram(2)
    >>> summary.update(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> summary.sum.tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """

    def __init__(
        self, channels: int, *, compute_dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.channels = check_int("channels", channels, low=1)
        self.compute_dtype = check_choice("compute_dtype", compute_dtype, (torch.float32, torch.float64))
        self.count = 0
        self._sum = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the rows of ``x`` (..., C) in; ``mask`` (...) is True where a row counts."""
        rows = _rows("x", x, mask, self.channels)
        self.count = _checked_count(self.count + rows.shape[0])
        dtype = torch.promote_types(rows.dtype, self.compute_dtype)
        if dtype is torch.float64 and rows.device == self._sum.device:
            for block in rows.split(_GRAM_ROWS_WIDE):
                add_products(self._sum, block.double().T)
            return
        for block in rows.split(_GRAM_ROWS):
            block = block.to(dtype)
            self._sum += (block.T @ block).to(self._sum)

    def merge(self, other: Gram) -> None:
        """Take everything in that ``other`` saw."""
        _check_mergeable(self, other, channels=self.channels)
        self.count = _checked_count(self.count + other.count)
        self._sum += other._sum.to(self._sum)

    @property
    def sum(self) -> Tensor:
        """``X^T X``, shape (C, C), float64, exactly symmetric."""
        return (self._sum + self._sum.T).div_(2)

    def mean(self) -> Tensor:
        """``X^T X / count``, shape (C, C), float64."""
        _check_seen(self.count)
        return self.sum.div_(self.count)

    def state(self) -> dict[str, Tensor]:
        """Return the sum and the count; ``from_state`` takes them back."""
        return {"sum": self._sum, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, compute_dtype: torch.dtype = torch.float32) -> Gram:
        """Rebuild from ``state()``.

        Raises
        ------
        QuernelError
            If the sum is no square float64 matrix of finite numbers, or the count is negative.
        """
        held = state["sum"]
        if held.ndim != 2 or held.shape[0] != held.shape[1] or held.dtype != torch.float64:
            raise QuernelError(
                f"the sum of a Gram must be float64 of shape (C, C); got {held.dtype} of {tuple(held.shape)}"
            )
        check_finite("sum", held)
        built = cls(held.shape[0], compute_dtype=compute_dtype, device=held.device)
        built._sum = held.clone()
        built.count = _checked_count(check_int("count", int(state["count"]), low=0))
        return built


def _rows(name: str, x: Tensor, mask: Tensor | None, channels: int) -> Tensor:
    """Return the rows that count, shape (n, C), at least float32 and finite."""
    check_type(name, x, Tensor)
    if x.ndim == 0 or x.shape[-1] != channels:
        raise QuernelError(f"{name} must have shape (..., {channels}); got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise QuernelError(f"{name} must be floating point; got {x.dtype}")
    x = x.detach()
    if mask is None:
        rows = x.reshape(-1, channels)
    else:
        check_type("mask", mask, Tensor)
        if mask.dtype is not torch.bool or mask.shape != x.shape[:-1]:
            wanted = f"boolean with shape {tuple(x.shape[:-1])}"
            raise QuernelError(f"mask must be {wanted}; got {mask.dtype} with shape {tuple(mask.shape)}")
        rows = x[mask.to(x.device)]
    check_finite(name, rows)
    return rows if rows.dtype is torch.float64 else rows.float()


def _binned(magnitude: Tensor) -> Tensor:
    """Count magnitudes (n, C) in bins, shape (C, bins), int32: leading bits of a float are its logarithm."""
    bins = (magnitude.view(torch.int32) >> (23 - _MANTISSA_BITS)) - _FIRST_BIN  # (n, C)
    # A magnitude on a lower edge belongs to the bin below, whose upper edge it is.
    on_edge = (magnitude.view(torch.int32) & ((1 << (23 - _MANTISSA_BITS)) - 1)) == 0
    bins = (bins - on_edge.to(torch.int32)).clamp_(0, _BINS - 1).long()
    counts = torch.zeros(magnitude.shape[1], _BINS, dtype=torch.int32, device=magnitude.device)
    return counts.scatter_add_(1, bins.T, torch.ones_like(bins.T, dtype=torch.int32))


def _larger(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.maximum(a.to(dtype), b.to(a.device, dtype))


def _checked_count(count: int) -> int:
    if count > _MOST_ROWS:
        raise QuernelError(f"a summary counts at most {_MOST_ROWS} rows; got {count}. Take a sample of the data")
    return count


def _check_seen(count: int) -> None:
    if count == 0:
        raise QuernelError("the summary has seen no rows; call update() with data that is not wholly masked")


def _check_mergeable(mine: object, other: object, **settings: object) -> None:
    check_type("other", other, type(mine))
    for name, value in settings.items():
        if getattr(other, name) != value:
            raise QuernelError(f"merge needs the same {name}: {value} here, {getattr(other, name)} in other")
