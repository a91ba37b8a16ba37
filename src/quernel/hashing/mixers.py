"""``mix64``: a seeded 64-bit hash of integers; ``fastrange`` and ``sign_bit`` turn it into slots and signs.

    mix64(seed, a, b, ...) = m(... m(m(m(seed + G) + a + G) + b + G) ...),   G = 2^64 / golden ratio,

with m the finaliser of splitmix64 (variant 13 of Stafford): two multiplications and three shifts a key,
full avalanche, and a sequence of keys hashes differently from its permutations. Not cryptographic.
Public functions take integers or arrays and broadcast; the flat jitted ones (``mix64_seed``, ``mix64_step``,
``fastrange_u64``, ``fastrange_small``, ``sign_f32``) are for fused kernels and equal them bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quernel._errors import QuernelError
from quernel._validate import check_int

U64 = np.uint64

# Typed constants: beside an int64 literal Numba would turn uint64 arithmetic into float64.
_GOLDEN = U64(0x9E3779B97F4A7C15)
_FIRST = U64(0xBF58476D1CE4E5B9)
_SECOND = U64(0x94D049BB133111EB)
_ONE, _S27, _S30, _S31, _S32 = U64(1), U64(27), U64(30), U64(31), U64(32)
_LOW = U64(0xFFFFFFFF)


@njit(nogil=True, cache=True, fastmath=False)
def mix64_step(state: Any, key: Any) -> Any:
    """Absorb one uint64 key into a uint64 state; ``mix64`` folds it over its keys, from ``mix64_seed``."""
    z = state + key + _GOLDEN
    z = (z ^ (z >> _S30)) * _FIRST
    z = (z ^ (z >> _S27)) * _SECOND
    return z ^ (z >> _S31)


@njit(nogil=True, cache=True, fastmath=False)
def mix64_seed(seed: Any) -> Any:
    """Return the state before the first key."""
    return mix64_step(U64(0), seed)


@njit(nogil=True, cache=True, fastmath=False)
def fastrange_u64(h: Any, n: Any) -> Any:
    """Return ``floor(h n / 2^64)`` for any uint64 h and n."""
    h_low, h_high = h & _LOW, h >> _S32
    n_low, n_high = n & _LOW, n >> _S32
    middle = h_high * n_low + ((h_low * n_low) >> _S32)
    other = h_low * n_high + (middle & _LOW)
    return h_high * n_high + (middle >> _S32) + (other >> _S32)


@njit(nogil=True, cache=True, fastmath=False)
def fastrange_small(h: Any, n: Any) -> Any:
    """Return the same for uint64 n <= 2^32, with two multiplications instead of four."""
    return ((h >> _S32) * n + (((h & _LOW) * n) >> _S32)) >> _S32


@njit(nogil=True, cache=True, fastmath=False)
def sign_f32(h: Any) -> Any:
    """Return +1 or -1 as float32 from the lowest bit of h."""
    return np.float32(1.0) - np.float32(2.0) * np.float32(h & _ONE)


def mix64(seed: int, *keys: Any) -> Any:
    """Hash a sequence of integer keys to 64 bits.

    Parameters
    ----------
    seed : int
        Selects the function; any 64-bit integer.
    *keys : int or integer arrays
        Broadcast against each other; negative numbers count as their two's complement. A tensor is
        passed as ``tensor.numpy()``.

    Returns
    -------
    h : uint64 or uint64 array
        Uniform over 64 bits; take slots with ``fastrange``, signs with ``sign_bit``.

    Raises
    ------
    QuernelError
        If a key is not an integer of at most 64 bits.

    References
    ----------
    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.

    Examples
    --------
    >>> hex(mix64(0, 1))
    '0x2a98f501af37e97f'
    >>> mix64(7, np.arange(4), 5).shape
    (4,)
    """
    with np.errstate(over="ignore"):  # wrapping is the arithmetic that is meant
        state = mix64_step.py_func(U64(0), as_u64("seed", seed))
        for position, key in enumerate(keys):
            state = mix64_step.py_func(state, as_u64(f"keys[{position}]", key))
    return state


def fastrange(h: Any, n: int) -> Any:
    """Map 64-bit hashes to ``range(n)`` as ``floor(h n / 2^64)``; the high bits decide.

    Parameters
    ----------
    h : uint64 or uint64 array
        Hashes, e.g. of ``mix64``.
    n : int
        Size of the range, 1 to 2^64 - 1.

    Returns
    -------
    slot : uint64 or uint64 array
        Less than ``n``; every slot has a probability of 1/n up to 2^-64.

    References
    ----------
    Lemire, "Fast random integer generation in an interval", arXiv 1805.10941.

    Examples
    --------
    >>> int(fastrange(np.uint64(2**63), 10))
    5
    """
    size = U64(check_int("n", n, low=1, high=2**64 - 1))
    with np.errstate(over="ignore"):
        return (fastrange_small if size <= _LOW else fastrange_u64).py_func(as_u64("h", h), size)


def sign_bit(h: Any) -> Any:
    """Return +1 or -1 (int8) from the lowest bit of a hash, which ``fastrange`` looks at last.

    Examples
    --------
    >>> sign_bit(np.array([2, 3], dtype=np.uint64)).tolist()
    [1, -1]
    """
    return (1 - 2 * (as_u64("h", h) & _ONE).astype(np.int8)).astype(np.int8)


def as_u64(name: str, value: Any) -> Any:
    """Return integers as uint64 by two's complement; an array stays an array."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**64:
            raise QuernelError(f"{name} must fit 64 bits; got {value}")
        return U64(value & (2**64 - 1))
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "iu":
        what = value.dtype if hasattr(value, "dtype") else type(value).__name__
        raise QuernelError(f"{name} must be an integer or a NumPy array of integers; got {what}")
    return value.astype(U64, copy=False)
