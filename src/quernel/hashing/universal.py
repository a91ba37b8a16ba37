"""``ModPrime``: the universal family of Carter and Wegman, ``((a . x + b) mod p) mod n``.

Two different key tuples collide with probability at most 1/n + 1/p over the draw of a and b. The prime is
2^61 - 1, where reduction is shifts and adds, or any prime below 2^32 for given constants of published
code. Slower than ``mix64`` by a factor of 2 to 4, and provable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.hashing.mixers import U64, as_u64

MERSENNE_61 = 2**61 - 1

_P61 = U64(MERSENNE_61)
_LOW29, _LOW = U64(2**29 - 1), U64(2**32 - 1)
_S3, _S29, _S32, _S61 = U64(3), U64(29), U64(32), U64(61)


@njit(nogil=True, cache=True, fastmath=False)
def mod_mersenne(x: Any) -> Any:
    """Return ``x mod (2^61 - 1)`` for any uint64 x."""
    x = (x & _P61) + (x >> _S61)
    return x - (x >= _P61) * _P61


@njit(nogil=True, cache=True, fastmath=False)
def multiply_mod_mersenne(a: Any, b: Any) -> Any:
    """Return ``a b mod (2^61 - 1)`` for a, b below 2^61 - 1, through 32-bit halves."""
    a_low, a_high = a & _LOW, a >> _S32
    b_low, b_high = b & _LOW, b >> _S32
    middle = a_high * b_low + a_low * b_high  # < 2^62
    low = a_low * b_low
    # 2^64 = 8 and 2^61 = 1 modulo p; the four terms stay below 2^63 together.
    total = ((a_high * b_high) << _S3) + (middle >> _S29) + ((middle & _LOW29) << _S32) + (low & _P61) + (low >> _S61)
    return mod_mersenne(total)


@dataclass(frozen=True)
class ModPrime:
    """A hash function ``((a_1 x_1 + ... + a_k x_k + b) mod p) mod n`` of k integer keys.

    Usually made by ``ModPrime.draw``; given constants reproduce published code.

    Parameters
    ----------
    a : sequence of int
        One factor a key, in [1, p).
    b : int
        Offset in [0, p).
    n : int
        Size of the range, at most p.
    prime : int, default=2**61 - 1
        2^61 - 1 or a prime below 2^32 (not checked to be prime).

    Examples
    --------
    >>> h = ModPrime(a=(3, 5), b=7, n=10, prime=101)
    >>> int(h(10, 20)), (3 * 10 + 5 * 20 + 7) % 101 % 10
    (6, 6)
    """

    a: tuple[int, ...]
    b: int
    n: int
    prime: int = MERSENNE_61

    def __post_init__(self) -> None:
        object.__setattr__(self, "prime", check_int("prime", self.prime, low=2, high=MERSENNE_61))
        if self.prime >= 2**32 and self.prime != MERSENNE_61:
            raise QuernelError(f"prime must be 2**61 - 1 or below 2**32, where products fit; got {self.prime}")
        object.__setattr__(self, "a", tuple(check_int("a", a, low=1, high=self.prime - 1) for a in self.a))
        if not self.a:
            raise QuernelError("a must hold one factor a key; got none")
        object.__setattr__(self, "b", check_int("b", self.b, low=0, high=self.prime - 1))
        object.__setattr__(self, "n", check_int("n", self.n, low=1, high=self.prime))

    @classmethod
    def draw(cls, seed: int, n: int, *, n_keys: int = 1, prime: int = MERSENNE_61) -> Self:
        """Draw a function of ``n_keys`` keys from the family."""
        check_int("n_keys", n_keys, low=1)
        check_int("prime", prime, low=2, high=MERSENNE_61)
        generator = _random.generator(seed)
        a = generator.integers(1, prime, size=n_keys, dtype=np.int64)
        return cls(tuple(a.tolist()), int(generator.integers(0, prime, dtype=np.int64)), n, prime)

    def __call__(self, *keys: Any) -> Any:
        """Hash integer keys (ints or arrays, broadcast) to uint64 in ``range(n)``.

        Keys are taken modulo the prime, so two that differ by a multiple of it always collide.
        """
        if len(keys) != len(self.a):
            raise QuernelError(f"this function hashes {len(self.a)} keys; got {len(keys)}")
        multiply, reduce = self._arithmetic()
        total: Any = U64(self.b)
        with np.errstate(over="ignore"):
            for position, (a, key) in enumerate(zip(self.a, keys, strict=True)):
                total = reduce(total + multiply(U64(a), reduce(as_u64(f"keys[{position}]", key))))
        return total % U64(self.n)

    def config(self) -> dict[str, Any]:
        """Return the constants as JSON values."""
        return {"a": list(self.a), "b": self.b, "n": self.n, "prime": self.prime}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild the function from its constants."""
        a: Sequence[int] = config["a"]
        return cls(tuple(a), config["b"], config["n"], config["prime"])

    def _arithmetic(self) -> tuple[Any, Any]:
        if self.prime == MERSENNE_61:
            return multiply_mod_mersenne.py_func, mod_mersenne.py_func
        prime = U64(self.prime)
        return (lambda a, b: a * b % prime), (lambda x: x % prime)
