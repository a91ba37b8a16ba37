"""``TileMap``: which slots of one shared array stand for a weight matrix, in contiguous hashed tiles.

A matrix W of shape (out, in) is cut into tiles of T_n x T_k; tile (a, b) is stored row by row from one hashed start:

    W[n, k] = sign * array[start(a, b) + (n mod T_n) T_k + (k mod T_k)],   a = n div T_n,  b = k div T_k
    start(a, b) = fastrange(mix64(seed, a, b), m - T_n T_k + 1)
    sign = 1 - 2 bit,  bit number t mod 64 of mix64(seed, t div 64, SIGNS),  t = (a B + b) T_n T_k + place in the tile

Tiles overlap freely and never wrap; entries beyond a ragged edge are not used (arXiv 2207.10702). B is the number of
tiles in a row. The shape of a tile, the hash and the seed are part of the model: another one is another weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_int, check_type
from quernel.hashing.block_map import HASH, SIGNS, as_starts, check_map, check_seed
from quernel.hashing.mixers import U64, fastrange, fastrange_small, fastrange_u64, mix64, mix64_step

Order = Literal["n-major", "k-major"]
_LOW = U64(0xFFFFFFFF)


@njit(nogil=True, cache=True, fastmath=False)
def start_of_tile(state: Any, n_starts: Any, a: Any, b: Any) -> Any:
    """Return where tile (a, b) begins; all integers uint64, ``state`` is ``mix64_seed(seed)``."""
    h = mix64_step(mix64_step(state, a), b)
    return fastrange_small(h, n_starts) if n_starts <= _LOW else fastrange_u64(h, n_starts)


@dataclass(frozen=True, eq=False)
class TileMap:
    """Slots and signs of a virtual matrix over an array of ``size`` numbers.

    Parameters
    ----------
    size : int
        Numbers m of the shared array, at least those of a tile.
    shape : (int, int)
        (out, in) of the matrix.
    tile : (int, int), default=(32, 32)
        Rows and columns of a tile.
    seed : int, default=0
        Any 64-bit integer; give every layer its own.
    signs : bool, default=True
        Whether slots are read with random signs.
    order : {"n-major", "k-major"}, default="n-major"
        How a tile is stored: by rows of W, or by its columns.

    Raises
    ------
    QuernelError
        If a size is out of range, or the array is smaller than a tile.

    References
    ----------
    Desai et al., "Efficient model compression with Random Operation Access Specific Tile hashing", arXiv 2207.10702.

    Examples
    --------
    >>> tiles = TileMap(size=500, shape=(6, 10), tile=(4, 8), seed=3)
    >>> slots = tiles.index()
    >>> slots.shape, int(slots[0, 1] - slots[0, 0]), int(slots[1, 0] - slots[0, 0])
    ((6, 10), 1, 8)
    """

    size: int
    shape: tuple[int, int]
    tile: tuple[int, int] = (32, 32)
    seed: int = 0
    signs: bool = True
    order: Order = "n-major"
    starts: NDArray[np.int64] | None = field(default=None, kw_only=True)
    given_signs: NDArray[np.int8] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_int("size", self.size, low=1))
        object.__setattr__(self, "seed", check_seed(self.seed))
        for name, pair in (("shape", self.shape), ("tile", self.tile)):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise QuernelError(f"{name} must be two integers; got {pair!r}")
            object.__setattr__(self, name, tuple(check_int(f"{name}[{i}]", v, low=1) for i, v in enumerate(pair)))
        check_type("signs", self.signs, bool)
        check_choice("order", self.order, ("n-major", "k-major"))
        if self.size < self.area:
            raise QuernelError(
                f"size must be at least {self.area}, the numbers of a tile {self.tile}; got {self.size}. "
                "Take a larger array or a smaller tile"
            )

    @classmethod
    def explicit(
        cls,
        starts: NDArray[np.int64],
        size: int,
        shape: tuple[int, int],
        tile: tuple[int, int],
        *,
        order: Order = "n-major",
        signs: NDArray[np.int8] | None = None,
    ) -> Self:
        """Return a map with given starts, int (tile rows, tile columns), and optionally signs of W's shape.

        For tests and for models made elsewhere.
        """
        made = cls(size, shape, tile, 0, signs is not None, order)
        held = as_starts(starts)
        if held.shape != made.grid or held.min() < 0 or held.max() > size - made.area:
            raise QuernelError(
                f"starts must have shape {made.grid} with values in [0, {size - made.area}]; got shape {held.shape}"
            )
        flips = None if signs is None else np.ascontiguousarray(signs, dtype=np.int8)
        if flips is not None and (flips.shape != made.shape or not np.isin(flips, (-1, 1)).all()):
            raise QuernelError(f"signs must be +1 or -1 of shape {made.shape}; got shape {flips.shape}")
        return cls(size, shape, tile, 0, signs is not None, order, starts=held, given_signs=flips)

    @property
    def area(self) -> int:
        """Numbers of a tile."""
        return self.tile[0] * self.tile[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape[0] // self.tile[0]), -(-self.shape[1] // self.tile[1])

    @property
    def n_starts(self) -> int:
        """Number of places where a tile may begin."""
        return self.size - self.area + 1

    def tile_starts(self) -> NDArray[np.int64]:
        """Return the start of every tile, int64 of shape ``grid``."""
        if self.starts is not None:
            return self.starts
        a, b = np.ogrid[: self.grid[0], : self.grid[1]]
        return fastrange(mix64(self.seed, a, b), self.n_starts).astype(np.int64)

    def index(self) -> NDArray[np.int64]:
        """Return the slot of every entry, int64 of shape ``shape``: eight bytes each, for tests and counts."""
        a, b, place = self._places()
        return self.tile_starts()[a, b] + place

    def signs_of(self) -> NDArray[np.int8]:
        """Return the sign of every entry, int8 of shape ``shape``."""
        if not self.signs:
            return np.ones(self.shape, np.int8)
        if self.given_signs is not None:
            return self.given_signs
        a, b, place = self._places()
        position = ((a * self.grid[1] + b) * self.area + place).astype(U64)
        bits = (mix64(self.seed, position >> U64(6), SIGNS) >> (position & U64(63))) & U64(1)
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)

    def operands(self) -> tuple[int, ...]:
        """Return (m, out, in, T_n, T_k, state, signs, k-major) for fused kernels, as int64.

        ``state`` is that of ``start_of_tile``; given starts and signs are passed beside them.
        """
        state = mix64(self.seed).astype(np.int64)
        return self.size, *self.shape, *self.tile, int(state), int(self.signs), int(self.order == "k-major")

    def config(self) -> dict[str, Any]:
        """Return the JSON-able description; a map with given starts has none."""
        if self.starts is not None:
            raise QuernelError("a map with given starts cannot be written as JSON; store its arrays yourself")
        described = {"size": self.size, "shape": list(self.shape), "tile": list(self.tile), "seed": self.seed}
        return described | {"signs": self.signs, "order": self.order, "hash": HASH}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild the map from ``config()``; every field must be there, since a default would be another map."""
        check_map("tile map", config, ("size", "shape", "tile", "seed", "signs", "order"))
        shape, tile = tuple(config["shape"]), tuple(config["tile"])
        return cls(config["size"], shape, tile, config["seed"], config["signs"], config["order"])

    def _places(self) -> tuple[Any, Any, Any]:
        """Return tile row, tile column and place within the tile of every entry; they broadcast to ``shape``."""
        n, k = np.ogrid[: self.shape[0], : self.shape[1]]
        (a, i), (b, j) = np.divmod(n, self.tile[0]), np.divmod(k, self.tile[1])
        return a, b, (i * self.tile[1] + j if self.order == "n-major" else j * self.tile[0] + i)
