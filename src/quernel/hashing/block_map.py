"""``BlockMap``: which slots of one shared array stand for the rows of a table, in contiguous hashed blocks.

A row of ``dim`` numbers is cut into blocks of Z; block number t gets one hashed start, and the k-th number of the block
is ``sign * array[(start + k) mod m]``. Nothing is stored but a seed: maps are pure functions of (seed, row, column).
For Z <= dim every row begins a block, so a row has C = ceil(dim / Z) of them, the last one short where Z does not
divide dim; for Z > dim the table is flattened and blocks run over several rows (arXiv 2108.02191).

    position t = row C Z + column  (Z <= dim),   row dim + column  (Z > dim)
    slot = (start(t div Z) + t mod Z) mod m,     start(b) = fastrange(mix64(seed, b), m)
    sign = 1 - 2 bit,  bit number t mod 64 of mix64(seed, t div 64, SIGNS)

One hash gives the signs of 64 positions. ``circular=False`` draws starts from the m - Z + 1 that need no wrap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._validate import check_int, check_type
from quernel.hashing.mixers import U64, as_u64, fastrange, fastrange_small, fastrange_u64, mix64, mix64_step
from quernel.hashing.universal import ModPrime

# The last key of a sign's hash. A block's start has one key less, so the two never meet. A tile's start has as many: in
# a matrix of more than 20,839 columns of tiles, tile (a, SIGNS) begins where the word says that signs the 64 positions
# from 64 a on. That is one tile in a row, and its start is uniform all the same.
SIGNS = 0x5167
# Of the hashes, the layout of blocks and tiles, and the place of sign bits: another version is another weight.
HASH = 1
MIXED, PRIME, GIVEN = 0, 1, 2
_FIELDS = ("size", "dim", "block", "seed", "signs", "circular")
_LOW = U64(0xFFFFFFFF)
_SIGNS = U64(SIGNS)


@njit(nogil=True, cache=True, fastmath=False)
def start_of_block(kind: Any, constants: Any, starts: Any, block: Any, per_row: Any) -> Any:
    """Return where block number ``block`` begins; all integers uint64 (see ``BlockMap.operands``)."""
    if kind == MIXED:
        h = mix64_step(constants[0], block)
        return fastrange_small(h, constants[1]) if constants[1] <= _LOW else fastrange_u64(h, constants[1])
    if kind == PRIME:
        # The pair (row, block of the row) is hashed, as published code does.
        row, chunk = block // per_row, block % per_row
        a, b, c, prime = constants[2], constants[3], constants[4], constants[5]
        return (a * (row % prime) % prime + b * (chunk % prime) % prime + c) % prime % constants[1]
    return U64(starts[block])


@njit(nogil=True, cache=True, fastmath=False)
def sign_word(state: Any, position: Any) -> Any:
    """Return 64 sign bits, those of the positions that share ``position div 64``; ``state`` is ``mix64_seed(seed)``."""
    return mix64_step(mix64_step(state, position >> U64(6)), _SIGNS)


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Slots and signs of a virtual table of rows over an array of ``size`` numbers.

    Parameters
    ----------
    size : int
        Numbers m of the shared array.
    dim : int
        Numbers of a row.
    block : int
        Consecutive numbers Z that share a start, at most ``size``.
    seed : int, default=0
        Any 64-bit integer.
    signs : bool, default=True
        Whether slots are read with random signs; without them every sign is +1.
    circular : bool, default=True
        Whether a block may wrap around the end of the array.

    Raises
    ------
    QuernelError
        If a size is out of range.

    References
    ----------
    Desai et al., "Random Offset Block Embedding Array", arXiv 2108.02191, 2022.

    Examples
    --------
    >>> import numpy as np
    >>> table = BlockMap(size=1000, dim=8, block=4, seed=1)
    >>> slots = table.index(np.array([0, 7]))
    >>> slots.shape, bool((np.diff(slots[:, :4]) % 1000 == 1).all())
    ((2, 8), True)
    """

    size: int
    dim: int
    block: int
    seed: int = 0
    signs: bool = True
    circular: bool = True
    prime: ModPrime | None = field(default=None, kw_only=True)
    starts: NDArray[np.int64] | None = field(default=None, kw_only=True)
    given_signs: NDArray[np.int8] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # What is kept are Python's integers: NumPy's could not be written as JSON.
        for name in ("size", "dim", "block"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), low=1))
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_type("signs", self.signs, bool)
        check_type("circular", self.circular, bool)
        if self.size < self.block:
            raise QuernelError(f"size must be at least block={self.block}; got {self.size}")

    @classmethod
    def mod_prime(
        cls, a: int, b: int, c: int, prime: int, size: int, dim: int, block: int, *, circular: bool = True
    ) -> Self:
        """Return the map of published code: start = ((a row + b chunk + c) mod prime) mod n, without signs."""
        check_int("prime", prime, low=2, high=2**32 - 1)  # where products fit 64 bits
        check_int("size", size, low=check_int("block", block, low=1))
        n = size if circular else size - block + 1
        return cls(size, dim, block, 0, False, circular, prime=ModPrime((a, b), c, n, prime))

    @classmethod
    def explicit(
        cls, starts: NDArray[np.int64], size: int, dim: int, block: int, signs: NDArray[np.int8] | None = None
    ) -> Self:
        """Return a map with given starts, one a block in order, and optionally one sign (+1 or -1) a position.

        For tests and for models made elsewhere: it stores eight bytes a block.
        """
        held = as_starts(starts)
        if held.ndim != 1 or (held.size and (held.min() < 0 or held.max() >= size)):
            raise QuernelError(f"starts must be one integer a block in [0, {size}); got shape {held.shape}")
        flips = None if signs is None else np.ascontiguousarray(signs, dtype=np.int8)
        if flips is not None and not np.isin(flips, (-1, 1)).all():
            raise QuernelError("signs must be +1 or -1, one a position")
        return cls(size, dim, block, 0, signs is not None, True, starts=held, given_signs=flips)

    @property
    def n_starts(self) -> int:
        """Number of places where a block may begin."""
        return self.size if self.circular else self.size - self.block + 1

    @property
    def per_row(self) -> int:
        """Blocks that a row begins: C, or 1 where blocks run over rows."""
        return -(-self.dim // self.block)

    @property
    def pitch(self) -> int:
        """Positions from one row to the next."""
        return self.per_row * self.block if self.block <= self.dim else self.dim

    @property
    def kind(self) -> int:
        """How starts are found: 0 mixed, 1 by a prime, 2 given."""
        return GIVEN if self.starts is not None else MIXED if self.prime is None else PRIME

    def positions(self, rows: Any, columns: Any = None) -> Any:
        """Return flat positions of rows (n,) and columns: uint64 (n, dim), or broadcast where both are given."""
        if columns is None:
            rows, columns = np.asarray(rows)[..., None], np.arange(self.dim)
        return as_u64("rows", rows) * U64(self.pitch) + as_u64("columns", columns)

    def index(self, rows: Any, columns: Any = None) -> NDArray[np.int64]:
        """Return the slots of rows, int64 (n, dim), or of (row, column) pairs that broadcast."""
        position = self.positions(rows, columns)
        block, offset = position // U64(self.block), position % U64(self.block)
        slot = (self._starts(block) + offset) % U64(self.size)
        return np.asarray(slot).astype(np.int64)

    def signs_of(self, rows: Any, columns: Any = None) -> NDArray[np.int8]:
        """Return the signs of rows, int8 (n, dim), or of (row, column) pairs that broadcast."""
        position = np.asarray(self.positions(rows, columns))
        if not self.signs:
            return np.ones(position.shape, np.int8)
        if self.given_signs is not None:
            return self.given_signs[position.astype(np.int64)]
        bits = (mix64(self.seed, position >> U64(6), SIGNS) >> (position & U64(63))) & U64(1)
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)

    def operands(self) -> tuple[int, NDArray[np.uint64], NDArray[np.int64]]:
        """Return (kind, constants, starts) for ``start_of_block``.

        constants: state of the seed, number of starts, and a, b, c, prime where there is one.
        """
        tail = (0, 0, 0, 0) if self.prime is None else (*self.prime.a, self.prime.b, self.prime.prime)
        constants = np.array([int(mix64(self.seed)), self.n_starts, *tail], dtype=U64)
        return self.kind, constants, np.zeros(0, np.int64) if self.starts is None else self.starts

    def config(self) -> dict[str, Any]:
        """Return the JSON-able description; a map with given starts has none."""
        if self.kind == GIVEN:
            raise QuernelError("a map with given starts cannot be written as JSON; store its arrays yourself")
        described = {name: getattr(self, name) for name in _FIELDS}
        return described | {"prime": None if self.prime is None else self.prime.config(), "hash": HASH}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild the map from ``config()``; every field must be there, since a default would be another map."""
        check_map("block map", config, (*_FIELDS, "prime"))
        prime = None if config["prime"] is None else ModPrime.from_config(config["prime"])
        return cls(*(config[name] for name in _FIELDS), prime=prime)

    def _starts(self, block: Any) -> Any:
        if self.starts is not None:
            return self.starts[np.asarray(block).astype(np.int64)].astype(U64)
        if self.prime is not None:
            per_row = U64(self.per_row)
            return self.prime(block // per_row, block % per_row)
        return fastrange(mix64(self.seed, block), self.n_starts)


def check_map(what: str, config: dict[str, Any], fields: tuple[str, ...], newest: int = HASH) -> None:
    """Raise unless a description has all fields and a known version of the hash; without one it is the first."""
    missing = [name for name in fields if name not in config]
    if missing:
        raise QuernelError(
            f"config of a {what} must have the fields {', '.join(fields)}; it lacks {', '.join(missing)}"
        )
    check_hash(config.get("hash", 1), newest)


def check_hash(version: Any, newest: int = HASH) -> None:
    """Raise unless this is a known version of a hash."""
    if check_int("hash", version, low=1) > newest:
        raise QuernelError(f"hash must be at most {newest}, the newest known here; got {version}")


def check_seed(seed: Any) -> int:
    """Return a seed as Python's integer if it fits 64 bits."""
    found = check_int("seed", seed)
    as_u64("seed", found)
    return found


def as_starts(starts: Any) -> NDArray[np.int64]:
    """Return given starts as contiguous int64; fractions are refused, not cut off."""
    held = np.asarray(starts)
    if held.size and held.dtype.kind not in "iu":
        raise QuernelError(f"starts must be integers; got {held.dtype}")
    return np.ascontiguousarray(held, dtype=np.int64)
