"""Checks at the boundary: each names the argument, what was expected, what arrived."""

from __future__ import annotations

import itertools
import numbers
import sys
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from quernel._errors import QuernelError

Value = TypeVar("Value")
# Looked at together by ``all_finite``: larger temporaries go back to the system and fault in again.
_FINITE_BYTES = 2**21


def check_int(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """Return ``value`` as int if it is an integer in [low, high]."""
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise QuernelError(f"{name} must be an integer{_range(low, high)}; got {value!r}")
    return number


def check_float(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as float if it is a finite number in the interval; ``open_*`` exclude an end."""
    bad = isinstance(value, bool) or not isinstance(value, numbers.Real) or not _finite(value)
    if not bad:
        bad = (low is not None and (value < low or (open_low and value == low))) or (
            high is not None and (value > high or (open_high and value == high))
        )
    if bad:
        raise QuernelError(f"{name} must be a finite number{_range(low, high, open_low, open_high)}; got {value!r}")
    return float(value)


def check_probability(name: str, value: Any) -> float:
    """Return ``value`` as float if it lies in [0, 1]."""
    return check_float(name, value, low=0.0, high=1.0)


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False; text and numbers say neither."""
    if not isinstance(value, bool):
        raise QuernelError(f"{name} must be True or False; got {value!r}")
    return value


def check_choice(name: str, value: Value, choices: Collection[Value]) -> Value:
    """Return ``value`` if it is one of ``choices``."""
    try:
        known = value in choices
    except TypeError:  # an unhashable value beside a set or a mapping
        known = False
    if not known:
        raise QuernelError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def check_increasing(name: str, values: Any, *, low: int, high: int | None = None) -> tuple[int, ...]:
    """Return ``values`` as a tuple of at least one integer in [low, high], each larger than the one before.

    Examples
    --------
    >>> check_increasing("dims", [8, 16], low=1)
    (8, 16)
    """
    held = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    integers = tuple(check_int(name, value, low=low, high=high) for value in held)
    if not integers or any(later <= earlier for earlier, later in itertools.pairwise(integers)):
        raise QuernelError(f"{name} must be integers that increase; got {values!r}")
    return integers


def check_type(name: str, value: Value, kinds: type | tuple[type, ...]) -> Value:
    """Return ``value`` if it is an instance of ``kinds``."""
    if not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise QuernelError(f"{name} must be {wanted}; got {type(value).__name__}")
    return value


def check_finite(name: str, tensor: Any) -> None:
    """Raise unless every element of a tensor or array is finite."""
    if not (all_finite(tensor) if hasattr(tensor, "isfinite") else _numpy_finite(tensor)):
        raise QuernelError(f"{name} holds NaN or infinity; clean it before passing it on")


def all_finite(tensor: Any) -> bool:
    """Say whether every element of a tensor is finite.

    A sum is finite only where all its terms are, and is much faster than torch's own test. One that is not may have
    overflowed: then that test decides, some rows at a time, since it takes nearly two copies of what it looks at.
    """
    if bool(tensor.detach().sum().isfinite()):
        return True
    size = tensor.numel() * tensor.element_size()
    if tensor.ndim == 0 or size <= _FINITE_BYTES:
        return bool(tensor.isfinite().all())
    rows = max(1, _FINITE_BYTES * len(tensor) // size)
    return all(bool(part.isfinite().all()) for part in tensor.split(rows))


def _finite(value: Any) -> bool:
    try:
        # Not math.isfinite, which graphs of dynamic shapes cannot hold.
        return bool(abs(float(value)) <= sys.float_info.max)
    except OverflowError:  # an integer beyond the largest float
        return False


def _numpy_finite(array: Any) -> bool:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(array))) or bool(np.isfinite(array).all())


def _range(low: Any, high: Any, open_low: bool = False, open_high: bool = False) -> str:
    if low is None and high is None:
        return ""
    left = "(-inf" if low is None else f"{'(' if open_low else '['}{low}"
    right = "inf)" if high is None else f"{high}{')' if open_high else ']'}"
    return f" in {left}, {right}"
