"""The options of neighborhood attention, one number an axis, and whether they fit a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quernel._errors import QuernelError
from quernel._validate import check_int

Numbers = int | Sequence[int]
Sizes = tuple[int, ...]
AxisNumbers = tuple[int, int, int, int, bool]


@dataclass(frozen=True)
class Options:
    """Checked options: a number an axis each."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def numbers(self) -> tuple[Sizes, Sizes, Sizes, Sizes, tuple[bool, ...]]:
        """Shape, windows, strides, dilations and whether axes are causal, as functions take them."""
        return self.shape, self.kernel_size, self.stride, self.dilation, self.is_causal

    @property
    def axes(self) -> Iterator[AxisNumbers]:
        """Yield length, window, stride, dilation and whether it is causal of each axis."""
        yield from zip(*self.numbers, strict=True)


def per_axis(name: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Return one positive integer an axis."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * ndim
    if len(values) != ndim:
        raise QuernelError(f"{name} must be an integer or {ndim} of them, one an axis; got {value!r}")
    many = ndim > 1
    return tuple(check_int(f"{name} of axis {i}" if many else name, n, low=1) for i, n in enumerate(values))


def flags_of(is_causal: Any, ndim: int) -> tuple[bool, ...]:
    """Return one flag an axis."""
    flags = tuple(is_causal) if isinstance(is_causal, Sequence) else (is_causal,) * ndim
    if len(flags) != ndim or not all(isinstance(flag, bool) for flag in flags):
        raise QuernelError(f"is_causal must be a bool or {ndim} of them, one an axis; got {is_causal!r}")
    return flags


def check_strides(kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Raise unless every group of queries lies in its own window."""
    for i, (window, step) in enumerate(zip(kernel_size, stride, strict=True)):
        if step > window:
            raise QuernelError(f"stride must be at most kernel_size on every axis; got {step} > {window} on axis {i}")


def checked_options(shape: tuple[int, ...], kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> Options:
    """Return the options, a number an axis.

    Raises
    ------
    QuernelError
        If their number is not that of the axes, or a window does not fit; on a causal axis, where windows begin with
        the sequence, any fits.
    """
    ndim = len(shape)
    named = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    windows, steps, gaps = (per_axis(name, value, ndim) for name, value in named.items())
    causal = flags_of(is_causal, ndim)
    check_strides(windows, steps)
    for i, (length, window, gap) in enumerate(zip(shape, windows, gaps, strict=True)):
        if window * gap > length and not causal[i]:
            span = f"kernel_size {window}" if gap == 1 else f"kernel_size {window} times dilation {gap}"
            raise QuernelError(
                f"the window must fit the grid: {span} exceeds the {length} tokens of axis {i}. Take a smaller window "
                "there, or full attention for grids this small"
            )
    return Options(tuple(shape), windows, steps, gaps, causal)
