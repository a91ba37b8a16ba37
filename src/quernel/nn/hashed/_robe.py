"""What the ROBE layers share: the array, the map that a layer reads it by, and how both are checked and saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int, check_type
from quernel.hashing.block_map import BlockMap
from quernel.nn._block_ops import BlockTable, Field, scatter_table
from quernel.nn._shared_array import SharedArray, check_memory

# One cache line of float32, and one vector.
DEFAULT_BLOCK = 16


class RobeArray(SharedArray):
    """The shared memory of ROBE embeddings: ``size`` trainable numbers.

    Parameters
    ----------
    size : int
        Numbers m.
    seed : int, default=0
        From which the maps of all readers derive theirs; any 64-bit integer.
    signs : bool, default=True
        Whether readers give their numbers random signs. With them inner products of rows are unbiased.
    bound : float, optional
        Of the initial values, uniform in (-bound, bound); default ``size ** -0.5``. The paper takes the largest
        vocabulary to the power -0.5.
    device, dtype : optional
        As in ``torch.nn.Linear``.
    generator : torch.Generator, optional
        For the initial values; default is torch's own.

    Examples
    --------
    >>> from quernel.nn import RobeEmbedding
    >>> memory = RobeArray(1000, seed=7)
    >>> user = RobeEmbedding(10_000, 16, memory=memory, field=0)
    >>> item = RobeEmbedding(50_000, 16, memory=memory, field=1)
    >>> sum(p.numel() for p in torch.nn.ModuleList([user, item]).parameters())
    1000
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        signs: bool = True,
        bound: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_int("size", size, low=1)
        bound = size**-0.5 if bound is None else bound
        super().__init__(size, seed=seed, bound=bound, device=device, dtype=dtype, generator=generator)
        self.signs = check_type("signs", signs, bool)

    @torch.no_grad()
    def fit(self, tables: Sequence[tuple[Robe, Tensor]]) -> None:
        """Fill the array so that layers over it come closest to tables: each slot gets the mean of what reads it.

        Parameters
        ----------
        tables : sequence of (layer, Tensor (rows, dim))
            Layers of one vocabulary over this array, and the tables that they stand for. Each counts relative to its
            layer's ``scale``. Of independent numbers, a fraction size / numbers of the variance is kept.
        """
        wide = torch.promote_types(self.values.dtype, torch.float32)
        sums, counts = (torch.zeros(self.size, dtype=wide, device=self.values.device) for _ in range(2))
        for layer, weight in tables:
            (scale,) = layer.scales
            sums += scatter_table(weight, layer.unscaled()) / scale
            counts += scatter_table(sums.new_ones(()).expand(weight.shape), layer.unscaled(signs=False))
        self.values.copy_(sums / counts.clamp_min(1))

    def config(self) -> dict[str, Any]:
        """Return size, seed, bound, dtype and signs."""
        return super().config() | {"signs": self.signs}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an array of zeros from ``config()``; a loader fills it."""
        new = super().from_config(config)
        new.signs = check_type("signs", config["signs"], bool)
        return new


class Robe(nn.Module):
    """What the layers share: an array, a map of it, and the fields that the map's rows belong to."""

    memory: SharedArray
    map: BlockMap
    padding_idx: int | None

    def _hold(self, memory: SharedArray, mapped: BlockMap, fields: list[Field], sparse: bool) -> None:
        check_memory(memory, mapped.block, f"one block of {mapped.block}")
        if mapped.size != memory.size:
            raise QuernelError(f"map must be over the {memory.size} numbers of memory; it is over {mapped.size}")
        self.memory, self.map = memory, mapped
        self.sparse = check_type("sparse", sparse, bool)
        self._fields = fields
        self._table = BlockTable.of(mapped, fields).on(memory.values.device)

    @property
    def scales(self) -> list[float]:
        """Fixed factors of the rows of each field."""
        return [field.scale for field in self._fields]

    def unscaled(self, signs: bool = True) -> BlockTable:
        """Return the virtual table with factors of 1, and without its signs if asked."""
        mapped = self.map if signs else replace(self.map, signs=False)
        fields = [replace(field, scale=1.0) for field in self._fields]
        return BlockTable.of(mapped, fields).on(self.memory.values.device)

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return self.map.dim

    @property
    def embedding_dim(self) -> int:
        """The same under torch's name."""
        return self.map.dim

    @property
    def block(self) -> int:
        """Consecutive numbers Z that share a hash."""
        return self.map.block

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the array with the rate of a dense model, without weight decay: a slot is many numbers by their signs.

        For a model with layers over arrays of all kinds take ``quernel.nn.roast_param_groups``.
        """
        return [{"params": [self.memory.values], "lr": check_float("lr", lr, low=0.0), "weight_decay": 0.0}]

    def parts(self) -> list[tuple[float, int]]:
        """Return factor and numbers of each field; an open vocabulary counts as much as its array holds."""
        rows = [self.memory.size // self.dim if self._is_open else field.limit for field in self._fields]
        return [(field.scale, n * self.dim) for field, n in zip(self._fields, rows, strict=True)]

    def part_counts(self) -> Iterator[tuple[float, Tensor]]:
        """Yield for each field its factor and how many of its numbers are kept in every slot, float64 (m,)."""
        if self._is_open:
            raise QuernelError("num_embeddings is None: how many rows of an open vocabulary share a slot is not known")
        one = torch.ones((), dtype=torch.float64, device=self.memory.values.device)
        for field in self._fields:
            alone = BlockTable.of(replace(self.map, signs=False), [replace(field, scale=1.0)]).on(one.device)
            yield field.scale, scatter_table(one.expand(field.limit, self.dim), alone)

    @property
    def _is_open(self) -> bool:
        return False

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._table = self._table.on(self.memory.values.device)
        return self

    def _base_config(self) -> dict[str, Any]:
        described = {"memory": self.memory.config(), "map": self.map.config()}
        return described | {"padding_idx": self.padding_idx, "sparse": self.sparse}


def array_of(
    memory: SharedArray | None, size: int | None, sizes: list[int], generator: torch.Generator | None
) -> SharedArray:
    """Return the array that was given, or a new one with the initial values of the paper."""
    if (memory is None) == (size is None):
        raise QuernelError(
            "memory or size must be given, one of them: a RobeArray to share, or the numbers of a new one"
        )
    if memory is not None:
        return check_memory(memory, 1, "")
    bound = max(sizes) ** -0.5 if sizes else None
    return RobeArray(check_int("size", size, low=1), bound=bound, generator=generator)


def check_told_apart(memory: SharedArray | None, field: int | None, offset: int | None) -> None:
    """Raise if a layer over a given array would read it by the map of every other such layer."""
    if memory is not None and field is None and offset is None:
        raise QuernelError(
            "field or offset must be given with memory: layers with the same map would have the same rows. Pass "
            "another field=0, 1, ... to each layer of the array, or offset= to follow on in one table"
        )


def map_of(memory: SharedArray, dim: int, block: int | None, keys: tuple[int, ...]) -> BlockMap:
    check_int("dim", dim, low=1)
    block = min(dim, DEFAULT_BLOCK) if block is None else check_int("block", block, low=1)
    check_memory(memory, block, f"one block of {block}")
    return BlockMap(memory.size, dim, block, memory.derived_seed(*keys), getattr(memory, "signs", True))


def parts_of(config: dict[str, Any]) -> tuple[SharedArray, BlockMap]:
    described = config["memory"]
    kind = RobeArray if "signs" in described else SharedArray
    return kind.from_config(described), BlockMap.from_config(config["map"])


def vocabularies(num_embeddings: int | Sequence[int]) -> list[int]:
    given = list(num_embeddings) if isinstance(num_embeddings, list | tuple) else [num_embeddings]
    if not given:
        raise QuernelError("num_embeddings must be an integer or one a field; got none")
    return [check_int("num_embeddings", rows, low=1) for rows in given]


def padding_of(padding_idx: int | None, rows: int | None) -> int | None:
    if padding_idx is None:
        return None
    given = check_int(
        "padding_idx", padding_idx, low=0 if rows is None else -rows, high=None if rows is None else rows - 1
    )
    return given + rows if given < 0 and rows is not None else given


def scale_of(scale: float | str | None, rows: int | None, bound: float) -> float:
    if scale is None:
        return 1.0
    if scale != "like":
        return check_float("scale", scale)
    if rows is None or bound == 0:
        raise QuernelError("scale='like' needs num_embeddings and an array with bound > 0; pass a number")
    return float(rows**-0.5 / bound)
