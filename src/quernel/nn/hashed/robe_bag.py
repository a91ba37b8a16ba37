"""Bags of ROBE rows: ``torch.nn.EmbeddingBag``, and all fields of a click model at once, over one small shared array.

    out = sum over the ids i of a bag of  weight_i scale_f row(first_f + i),     f the field of i

Fields follow each other in one virtual table (arXiv 2108.02191), so a batch of ids of all fields is one call; sums are
taken while rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int, check_type
from quernel.hashing.block_map import BlockMap
from quernel.nn._block_ops import Field, block_bag, max_rows
from quernel.nn._shared_array import SharedArray
from quernel.nn.hashed._robe import (
    Robe,
    array_of,
    check_told_apart,
    map_of,
    padding_of,
    parts_of,
    scale_of,
    vocabularies,
)


def _bag_example() -> dict[str, Any]:
    def make() -> RobeEmbeddingBag:
        return RobeEmbeddingBag([50, 9, 20], 8, size=60, mode=None, generator=torch.Generator().manual_seed(0))

    return {"make": make, "input": lambda generator: (torch.randint(0, 9, (4, 3), generator=generator),)}


@register(
    "robe", pillar="nn", contract="module", paper="2108.02191", status="stable", headline=False, example=_bag_example
)
class RobeEmbeddingBag(Robe):
    """Sums or means of rows of one table, or the rows of many fields at once, from one small shared array.

    Parameters
    ----------
    num_embeddings : int or sequence of int
        One vocabulary: a layer like ``torch.nn.EmbeddingBag``. Several: one id a field, as a click model reads them.
    dim : int
        Numbers of a row.
    memory, size, block, sparse, generator
        As in ``RobeEmbedding``.
    mode : {"sum", "mean", None}, default="sum"
        What becomes of the rows of a bag, of all fields where there are several; None keeps them apart.
    field : int, optional
        Tells apart layers that share an array: each gets its own hash. A layer over a given array needs it, or an
        ``offset``.
    offset : int, optional
        Number of the first row; fields follow each other. Default 0.
    padding_idx : int, optional
        An id that is not there: left out of sums, means and gradients; in every field where there are several.
    scale : float, sequence of float, "like" or None, default=None
        Fixed factor of the rows of each field; "like" gives every field the initial magnitude of a table of its own.
    include_last_offset : bool, default=False
        As in ``torch.nn.EmbeddingBag``.

    Notes
    -----
    An array of its own is filled as in the authors' DLRM, uniformly up to the largest vocabulary to the power -0.5.
    No row is formed in memory on the way to a sum.

    References
    ----------
    Desai et al., "Random Offset Block Embedding Array", arXiv 2108.02191, 2022.

    Examples
    --------
    >>> fields = RobeEmbeddingBag([1000, 200_000, 50], 16, size=4096, mode=None)
    >>> fields(torch.tensor([[999, 123_456, 0], [1, 2, 3]])).shape
    torch.Size([2, 3, 16])
    >>> bag = RobeEmbeddingBag(200_000, 16, size=4096, mode="mean")
    >>> bag(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 3])).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        num_embeddings: int | Sequence[int],
        dim: int,
        *,
        size: int | None = None,
        memory: SharedArray | None = None,
        block: int | None = None,
        mode: Literal["sum", "mean"] | None = "sum",
        field: int | None = None,
        offset: int | None = None,
        padding_idx: int | None = None,
        scale: float | Sequence[float] | Literal["like"] | None = None,
        include_last_offset: bool = False,
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_told_apart(memory, field, offset)
        memory = array_of(memory, size, vocabularies(num_embeddings), generator)
        mapped = map_of(memory, dim, block, () if field is None else (check_int("field", field, low=0),))
        first = 0 if offset is None else offset
        self._set(num_embeddings, memory, mapped, mode, first, padding_idx, scale, include_last_offset, sparse)

    def _set(
        self,
        num_embeddings: int | Sequence[int],
        memory: SharedArray,
        mapped: BlockMap,
        mode: str | None,
        offset: int,
        padding_idx: int | None,
        scale: float | Sequence[float] | str | None,
        include_last_offset: bool,
        sparse: bool,
    ) -> None:
        sizes = vocabularies(num_embeddings)
        self.num_embeddings = sizes if isinstance(num_embeddings, list | tuple) else sizes[0]
        modes: tuple[str | None, ...] = ("sum", "mean") if self.one_table else ("sum", "mean", None)
        self.mode = check_choice("mode", mode, modes)
        self.offset = check_int("offset", offset, low=0)
        self.include_last_offset = check_type("include_last_offset", include_last_offset, bool)
        if self.offset + sum(sizes) > max_rows(mapped):
            raise QuernelError(
                f"num_embeddings and offset must stay below the {max_rows(mapped)} rows of the map; got "
                f"{sum(sizes)} from {offset} on"
            )
        self.padding_idx = padding_of(padding_idx, min(sizes))
        scales = scale if isinstance(scale, list | tuple) else [scale] * len(sizes)
        if len(scales) != len(sizes):
            raise QuernelError(f"scale must be one number, or {len(sizes)}, one a field; got {len(scales)}")
        self.scale = [scale_of(one, rows, memory.bound) for one, rows in zip(scales, sizes, strict=True)]
        padding = -1 if self.padding_idx is None else self.padding_idx
        firsts = [self.offset + sum(sizes[:f]) for f in range(len(sizes))]
        rest = zip(firsts, sizes, self.scale, strict=True)
        self._hold(memory, mapped, [Field(first, rows, padding, one) for first, rows, one in rest], sparse)

    @property
    def one_table(self) -> bool:
        """Whether all ids are of one vocabulary."""
        return isinstance(self.num_embeddings, int)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return one row a bag, or the rows of all fields.

        Parameters
        ----------
        ids : integer Tensor, shape (B, L), or (n,) with ``offsets``; (..., F) for F fields
        offsets : integer Tensor, shape (B,), optional
            Where each bag begins; for one vocabulary.
        per_sample_weights : Tensor of the shape of ``ids``, optional
            Factors of the rows; not for means.

        Returns
        -------
        out : Tensor, shape (B, dim); for fields (..., dim), or (..., F, dim) with ``mode=None``
        """
        check_type("ids", ids, Tensor)
        if per_sample_weights is not None and self.mode == "mean":
            raise QuernelError("per_sample_weights must be None with mode='mean', as in torch; use mode='sum'")
        values, mean, sparse = self.memory.values, self.mode == "mean", self.sparse
        if isinstance(self.num_embeddings, int):
            bounds = None if offsets is None else self._bounds(offsets, ids.shape[0])
            return block_bag(
                values, ids, self._table, bounds=bounds, weights=per_sample_weights, mean=mean, sparse=sparse
            )
        n_fields, lead = len(self.num_embeddings), ids.shape[:-1]
        if offsets is not None or ids.ndim < 1 or ids.shape[-1] != n_fields:
            raise QuernelError(
                f"ids must have shape (..., {n_fields}), one id a field, and no offsets; got {tuple(ids.shape)}"
            )
        if per_sample_weights is not None and per_sample_weights.shape != ids.shape:
            raise QuernelError(
                f"per_sample_weights must have the shape of ids, {tuple(ids.shape)}; got "
                f"{tuple(per_sample_weights.shape)}"
            )
        length = 1 if self.mode is None else n_fields
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1, length)
        rows = block_bag(values, ids.reshape(-1, length), self._table, weights=weights, mean=mean, sparse=sparse)
        return rows.reshape(*lead, *([n_fields] if self.mode is None else []), self.dim)

    def config(self) -> dict[str, Any]:
        """Return array, map, vocabularies, scales and mode."""
        names = ("num_embeddings", "mode", "offset", "scale", "include_last_offset")
        return {name: getattr(self, name) for name in names} | self._base_config()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a layer over an array of zeros from ``config()``."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        named = ("mode", "offset", "padding_idx", "scale", "include_last_offset", "sparse")
        new._set(config["num_embeddings"], *parts_of(config), *(config[name] for name in named))
        return new

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.num_embeddings}, {self.dim}, block={self.block}, mode={self.mode!r}"

    def _bounds(self, offsets: Tensor, n: int) -> Tensor:
        check_type("offsets", offsets, Tensor)
        if offsets.ndim != 1 or offsets.is_floating_point():
            raise QuernelError(f"offsets must be integers of shape (B,); got {offsets.dtype} {tuple(offsets.shape)}")
        held = offsets.long()
        return held if self.include_last_offset else torch.cat([held, held.new_full((1,), n)])
