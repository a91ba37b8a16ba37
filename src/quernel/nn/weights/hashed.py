"""Weights that store nothing of their own: signed, scaled views of a ``SharedArray`` through a hash.

    W = scale * sign * array[slot]       slots and signs by a ``TileMap`` (matrices) or a ``BlockMap`` (tables)

The map is a pure function of a seed, so a view costs a few numbers in a file. ``mode="memory"`` reads the array in
every product and keeps nothing; ``mode="speed"`` keeps the dense weight once it has been made, until the array changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.hashing import BlockMap, TileMap
from quernel.hashing.block_map import HASH, check_hash
from quernel.nn._block_ops import BlockTable, Field, block_bag, scatter_table
from quernel.nn._shared_array import SharedArray, check_memory
from quernel.nn._tile_ops import (
    TileOperands,
    tile_expand,
    tile_linear,
    tile_rows,
    tile_scatter,
    tile_sums,
)
from quernel.nn.weights._base import StoredWeight

Mode = Literal["memory", "speed"]


class _Kept(NamedTuple):
    """A dense weight and the array that it was made of, kept so that its address cannot become another's."""

    values: Tensor
    version: int
    dense: Tensor

    def is_of(self, values: Tensor) -> bool:
        """Say whether the array is the same: in-place changes count versions up, a replaced one lies elsewhere."""
        place = (values.data_ptr(), values.dtype, values._version)
        return place == (self.values.data_ptr(), self.values.dtype, self.version)


class HashedWeight(StoredWeight):
    """Base of the views; subclasses say how to read the array and how to add into it.

    Parameters
    ----------
    memory : SharedArray
        Held as a submodule; one object for all views that share it.
    mapped : TileMap or BlockMap
        Over an array of the size of ``memory``.
    scale : float, default=1.0
        Fixed factor lambda.
    mode : {"memory", "speed"}, default="memory"
        Whether to keep the dense weight between calls; both give the same numbers.
    """

    def __init__(
        self, memory: SharedArray, mapped: TileMap | BlockMap, scale: float = 1.0, mode: Mode = "memory"
    ) -> None:
        super().__init__()
        self.memory = check_memory(memory, 1, "of which weights are made")
        if mapped.size != memory.size:
            raise QuernelError(f"mapped must be over an array of {memory.size} numbers; it is over {mapped.size}")
        self.mapped = mapped
        self.scale = check_float("scale", scale)
        self.mode: Mode = check_choice("mode", mode, ("memory", "speed"))
        self._kept: _Kept | None = None

    def expand(self, values: Tensor) -> Tensor:
        """Return the matrix that an array (m,) stands for, without the scale, (out, in)."""
        raise TypeError(f"{type(self).__name__} must define expand()")

    def fold(self, matrix: Tensor) -> Tensor:
        """Return the sum of the signed numbers of a matrix (out, in) in every slot, (m,): the transpose of expand."""
        raise TypeError(f"{type(self).__name__} must define fold()")

    def counts(self) -> Tensor:
        """Return how many numbers of the matrix are kept in every slot, float64 (m,)."""
        raise TypeError(f"{type(self).__name__} must define counts()")

    def parts(self) -> list[tuple[float, int]]:
        """Return scale and numbers of what is read with one scale: of the whole."""
        return [(self.scale, math.prod(self.shape))]

    def part_counts(self) -> Iterator[tuple[float, Tensor]]:
        """Yield the same with ``counts`` in the place of numbers."""
        yield self.scale, self.counts()

    def dense(self) -> Tensor:
        """Return W."""
        values = self.memory.values
        # Arrays that were made in inference mode count no versions: nothing says when they change.
        if self.mode == "memory" or torch.compiler.is_compiling() or values.is_meta or values.is_inference():
            return self._made()
        if torch.is_grad_enabled() and values.requires_grad:
            self._kept = None  # what trains may write through ``.data``, which counts none either
            return self._made()
        if self._kept is None or not self._kept.is_of(values):
            # A tensor of inference mode could not be used outside it, and this one outlives the block.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = _Kept(values.detach(), values._version, self._made())
        return self._kept.dense

    def _made(self) -> Tensor:
        matrix = self.expand(self.memory.values)
        return (matrix if self.scale == 1 else matrix * self.scale).reshape(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept weight out of copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def config(self) -> dict[str, Any]:
        """Return array, map, scale, mode and the version of the hash."""
        described = {"memory": self.memory.config(), "map": self.mapped.config(), "scale": self.scale}
        return described | {"mode": self.mode, "hash": HASH}

    def extra_repr(self) -> str:
        """Show shape, map and scale."""
        cells = self.mapped.tile if isinstance(self.mapped, TileMap) else self.mapped.block
        return f"shape={tuple(self.shape)}, tile={cells}, scale={self.scale:.4g}, mode={self.mode!r}"


def _tile_example() -> dict[str, Any]:
    def make() -> HashedTileWeight:
        memory = SharedArray(40, seed=1, generator=torch.Generator().manual_seed(0))
        return HashedTileWeight(memory, TileMap(40, (5, 7), (2, 4), seed=memory.next_seed()))

    return {"make": make, "input": lambda generator: (torch.randn(3, 7, generator=generator),)}


@register(
    "roast",
    pillar="nn",
    contract="weight",
    paper="2207.10702",
    status="stable",
    headline=False,
    example=_tile_example,
)
class HashedTileWeight(HashedWeight):
    """A matrix, or the kernel of a convolution, read from a shared array in hashed tiles.

    Parameters
    ----------
    memory, mapped, scale, mode
        As in ``HashedWeight``; ``mapped`` is a TileMap.
    shape : tuple of int, optional
        (out, in, *kernel) where W is seen as (out, in * kernel); default is the map's own.

    Examples
    --------
    >>> memory = SharedArray(1000, seed=1)
    >>> weight = HashedTileWeight(memory, TileMap(1000, (64, 128), (8, 8), seed=memory.next_seed()))
    >>> weight.dense().shape, weight.nbytes
    (torch.Size([64, 128]), 4000)
    """

    def __init__(
        self,
        memory: SharedArray,
        mapped: TileMap,
        scale: float = 1.0,
        mode: Mode = "memory",
        shape: tuple[int, ...] | None = None,
    ) -> None:
        check_type("mapped", mapped, TileMap)
        super().__init__(memory, mapped, scale, mode)
        self.shape = mapped.shape if shape is None else tuple(check_int("shape", size, low=1) for size in shape)
        rows, columns = self.shape[0], 1
        for size in self.shape[1:]:
            columns *= size
        if (rows, columns) != mapped.shape:
            raise QuernelError(f"shape must be {mapped.shape} as a matrix; got {self.shape}")
        self.tiles = TileOperands.of(mapped)

    def expand(self, values: Tensor) -> Tensor:
        """Return the matrix that an array (m,) stands for, without the scale, (out, in)."""
        return tile_expand(values, self.tiles)

    def fold(self, matrix: Tensor) -> Tensor:
        """Return the sum of the signed numbers of a matrix (out, in) in every slot, (m,)."""
        return tile_scatter(matrix, self.tiles)

    def counts(self) -> Tensor:
        """Return how many numbers of the matrix are kept in every slot, float64 (m,)."""
        mapped: Any = self.mapped
        unsigned = dataclasses.replace(mapped, signs=False, given_signs=None)
        ones = torch.ones(sum(mapped.shape), dtype=torch.float64)
        return tile_sums(ones[: mapped.shape[0]], ones[mapped.shape[0] :], TileOperands.of(unsigned))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ W.T + bias`` in the dtype of ``x``."""
        if self.mode == "memory":
            return tile_linear(x, self.memory.values, bias, self.scale, self.tiles)
        return F.linear(x, self.dense().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` in the dtype of ``x``."""
        return self.linear(x, None)

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Return the rows ``W[ids]``."""
        return tile_rows(self.memory.values, ids, self.tiles) * self.scale

    def config(self) -> dict[str, Any]:
        """Return shape, array, map, scale, mode and the version of the hash."""
        return super().config() | {"shape": list(self.shape)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a view of an array of zeros from ``config()``."""
        check_hash(config["hash"])
        memory, mapped = SharedArray.from_config(config["memory"]), TileMap.from_config(config["map"])
        return cls(memory, mapped, config["scale"], config["mode"], tuple(config["shape"]))


def _block_example() -> dict[str, Any]:
    def make() -> HashedBlockWeight:
        memory = SharedArray(40, seed=1, generator=torch.Generator().manual_seed(0))
        return HashedBlockWeight(memory, BlockMap(40, dim=7, block=4, seed=memory.next_seed()), 11)

    return {"make": make, "input": lambda generator: (torch.randn(3, 7, generator=generator),)}


@register(
    "roast",
    pillar="nn",
    contract="weight",
    paper="2207.10702",
    status="stable",
    headline=False,
    example=_block_example,
)
class HashedBlockWeight(HashedWeight):
    """A table of rows read from a shared array in hashed blocks.

    Parameters
    ----------
    memory, mapped, scale, mode
        As in ``HashedWeight``; ``mapped`` is a BlockMap.
    n_rows : int
        Rows of the table.
    """

    def __init__(
        self, memory: SharedArray, mapped: BlockMap, n_rows: int, scale: float = 1.0, mode: Mode = "memory"
    ) -> None:
        check_type("mapped", mapped, BlockMap)
        super().__init__(memory, mapped, scale, mode)
        self.shape = (check_int("n_rows", n_rows, low=1), mapped.dim)
        self.table = BlockTable.of(mapped, [Field(0, n_rows)])

    def expand(self, values: Tensor) -> Tensor:
        """Return the table that an array (m,) stands for, without the scale, (rows, dim)."""
        return block_bag(values, torch.arange(self.shape[0], device=values.device)[:, None], self.table)

    def fold(self, matrix: Tensor) -> Tensor:
        """Return the sum of the signed numbers of a table (rows, dim) in every slot, (m,)."""
        return scatter_table(matrix, self.table).to(matrix.dtype)

    def counts(self) -> Tensor:
        """Return how many numbers of the table are kept in every slot, float64 (m,)."""
        mapped: Any = self.mapped
        unsigned = dataclasses.replace(mapped, signs=False, given_signs=None)
        ones = torch.ones((), dtype=torch.float64).expand(self.shape)
        return scatter_table(ones, BlockTable.of(unsigned, [Field(0, self.shape[0])]))

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, dim)
        """Return the rows ``W[ids]``."""
        if self.mode == "speed":
            return F.embedding(ids, self.dense())
        found = block_bag(self.memory.values, ids.reshape(-1, 1), self.table)
        return (found * self.scale).reshape(*ids.shape, self.shape[1])

    def config(self) -> dict[str, Any]:
        """Return rows, array, map, scale, mode and the version of the hash."""
        return super().config() | {"n_rows": self.shape[0]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a view of an array of zeros from ``config()``."""
        check_hash(config["hash"])
        memory, mapped = SharedArray.from_config(config["memory"]), BlockMap.from_config(config["map"])
        return cls(memory, mapped, config["n_rows"], config["scale"], config["mode"])
