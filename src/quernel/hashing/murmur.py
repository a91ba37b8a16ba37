"""MurmurHash3 of bytes and integers, 32-bit and x64 128-bit, bit-equal to the published C++ code.

For compatibility with models and indexes made elsewhere (scikit-learn's hashing vectorizer, label hashes
of published systems); new code takes ``mix64``, which is faster on integers. Integers hash as the
little-endian bytes of their dtype: 4 for int32, 8 for int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quernel._errors import QuernelError
from quernel._validate import check_int

U64 = np.uint64

_M32 = U64(0xFFFFFFFF)
_C1, _C2 = U64(0xCC9E2D51), U64(0x1B873593)
_K1, _K2 = U64(0x87C37B91114253D5), U64(0x4CF5AD432745937F)
_F1, _F2 = U64(0xFF51AFD7ED558CCD), U64(0xC4CEB9FE1A85EC53)
_S8, _S13, _S16, _S33, _S64 = U64(8), U64(13), U64(16), U64(33), U64(64)


@njit(nogil=True, cache=True, fastmath=False)
def _rotate32(x: Any, r: Any) -> Any:
    return ((x << r) | (x >> (U64(32) - r))) & _M32


@njit(nogil=True, cache=True, fastmath=False)
def _rotate64(x: Any, r: Any) -> Any:
    return (x << r) | (x >> (_S64 - r))


@njit(nogil=True, cache=True, fastmath=False)
def _little_endian(data: Any, start: Any, n: Any) -> Any:
    value = U64(0)
    for i in range(n):
        value |= U64(data[start + i]) << (U64(i) * _S8)
    return value


@njit(nogil=True, cache=True, fastmath=False)
def murmur3_32_bytes(data: Any, seed: Any) -> Any:
    """Hash a uint8 array; seed and result are 32 bits in a uint64."""
    h = seed & _M32
    n = data.size
    for block in range(0, n - n % 4, 4):
        k = (_little_endian(data, block, 4) * _C1) & _M32
        h ^= (_rotate32(k, U64(15)) * _C2) & _M32
        h = (_rotate32(h, U64(13)) * U64(5) + U64(0xE6546B64)) & _M32
    if n % 4:
        k = (_little_endian(data, n - n % 4, n % 4) * _C1) & _M32
        h ^= (_rotate32(k, U64(15)) * _C2) & _M32
    h ^= U64(n) & _M32
    h = ((h ^ (h >> _S16)) * U64(0x85EBCA6B)) & _M32
    h = ((h ^ (h >> _S13)) * U64(0xC2B2AE35)) & _M32
    return h ^ (h >> _S16)


@njit(nogil=True, cache=True, fastmath=False)
def fmix64(h: Any) -> Any:
    """MurmurHash3's 64-bit finaliser."""
    h = (h ^ (h >> _S33)) * _F1
    h = (h ^ (h >> _S33)) * _F2
    return h ^ (h >> _S33)


@njit(nogil=True, cache=True, fastmath=False)
def murmur3_x64_128_bytes(data: Any, seed: Any, out: Any) -> None:
    """Hash a uint8 array; ``out`` gets the two uint64 halves."""
    h1 = seed & _M32
    h2 = seed & _M32
    n = data.size
    for block in range(0, n - n % 16, 16):
        h1 ^= _rotate64(_little_endian(data, block, 8) * _K1, U64(31)) * _K2
        h1 = (_rotate64(h1, U64(27)) + h2) * U64(5) + U64(0x52DCE729)
        h2 ^= _rotate64(_little_endian(data, block + 8, 8) * _K2, U64(33)) * _K1
        h2 = (_rotate64(h2, U64(31)) + h1) * U64(5) + U64(0x38495AB5)
    tail = n % 16
    if tail > 8:
        h2 ^= _rotate64(_little_endian(data, n - tail + 8, tail - 8) * _K2, U64(33)) * _K1
    if tail > 0:
        h1 ^= _rotate64(_little_endian(data, n - tail, min(tail, 8)) * _K1, U64(31)) * _K2
    h1 ^= U64(n)
    h2 ^= U64(n)
    h1 += h2
    h2 += h1
    h1 = fmix64(h1)
    h2 = fmix64(h2)
    h1 += h2
    h2 += h1
    out[0] = h1
    out[1] = h2


@njit(nogil=True, cache=True, fastmath=False)
def _rows_32(rows: Any, seed: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        out[i] = np.uint32(murmur3_32_bytes(rows[i], seed))


@njit(nogil=True, cache=True, fastmath=False)
def _rows_128(rows: Any, seed: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        murmur3_x64_128_bytes(rows[i], seed, out[i])


def murmur3_32(keys: Any, seed: int = 0) -> Any:
    """Hash bytes, text or integers to 32 bits.

    Parameters
    ----------
    keys : bytes, str, int or integer array
        Text is hashed as UTF-8, a Python int as int32, an array element by element in its own dtype.
    seed : int, default=0
        In [0, 2^32).

    Returns
    -------
    h : uint32 or uint32 array
        Of the shape of ``keys``; equal to ``sklearn.utils.murmurhash3_32(..., positive=True)``.

    Examples
    --------
    >>> int(murmur3_32("hello"))
    613153351
    """
    rows, shape = _byte_rows(keys)
    out = np.empty(rows.shape[0], dtype=np.uint32)
    _rows_32(rows, U64(check_int("seed", seed, low=0, high=2**32 - 1)), out)
    return out.reshape(shape)[()]


def murmur3_x64_128(keys: Any, seed: int = 0) -> np.ndarray:
    """Hash bytes, text or integers to 128 bits, as two uint64 in the order of the C++ code.

    Parameters
    ----------
    keys, seed
        As in ``murmur3_32``.

    Returns
    -------
    h : uint64 array, shape (..., 2)
        The two halves of each hash.

    Examples
    --------
    >>> [hex(half) for half in murmur3_x64_128("hello")]
    ['0xcbd8a7b341bd9b02', '0x5b1e906a48ae1d19']
    """
    rows, shape = _byte_rows(keys)
    out = np.empty((rows.shape[0], 2), dtype=U64)
    _rows_128(rows, U64(check_int("seed", seed, low=0, high=2**32 - 1)), out)
    return out.reshape(*shape, 2)


def _byte_rows(keys: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return keys as (n, width) bytes, and the shape of the result."""
    if isinstance(keys, str):
        keys = keys.encode("utf-8")
    if isinstance(keys, bytes | bytearray | memoryview):
        return np.frombuffer(keys, dtype=np.uint8).reshape(1, -1), ()
    if isinstance(keys, int) and not isinstance(keys, bool):
        keys = np.int32(check_int("keys", keys, low=-(2**31), high=2**31 - 1))
    if not isinstance(keys, np.ndarray | np.generic) or keys.dtype.kind not in "iu":
        what = keys.dtype if hasattr(keys, "dtype") else type(keys).__name__
        raise QuernelError(f"keys must be bytes, text, an integer or a NumPy array of integers; got {what}")
    flat = np.ascontiguousarray(keys, dtype=keys.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, flat.dtype.itemsize), keys.shape
