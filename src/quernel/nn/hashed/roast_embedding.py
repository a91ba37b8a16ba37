"""``RoastEmbedding``: a table of rows read from the shared array of a whole model, in hashed blocks (arXiv 2207.10702).

    row(i)[c Z : (c + 1) Z] = scale * signs * array[start(i, c) : start(i, c) + Z]

The look-up operation of ROAST, the same as ROBE's; here the array is that of linear and convolution layers too.
Cost: one hash and one short copy a block.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.hashing import BlockMap
from quernel.nn._shared_array import SharedArray, check_memory
from quernel.nn._stored import StoredEmbedding
from quernel.nn.weights.hashed import HashedBlockWeight, HashedWeight, Mode

# Two lines of a cache.
LONGEST_BLOCK = 32


def _example() -> dict[str, Any]:
    def make() -> RoastEmbedding:
        memory = SharedArray(40, seed=3, generator=torch.Generator().manual_seed(0))
        return RoastEmbedding(11, 6, memory=memory, block=4)

    return {"make": make, "input": lambda generator: (torch.randint(0, 11, (2, 5), generator=generator),)}


@register(
    "roast", pillar="nn", contract="module", paper="2207.10702", status="stable", headline=False, example=_example
)
class RoastEmbedding(StoredEmbedding):
    """An embedding table read from a shared array in hashed blocks.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        As in ``torch.nn.Embedding``.
    padding_idx : int, optional
        Row that is zero and gets no gradient; negative counts from the end.
    memory : SharedArray
        What the rows are made of.
    block : int, optional
        Consecutive numbers Z of a block; default the smaller of ``embedding_dim`` and 32.
    signs : bool, default=True
        Whether numbers are read with random signs.
    scale : float, optional
        Fixed factor. Default: what gives rows the standard deviation 1 of ``torch.nn.Embedding``.
    mode : {"memory", "speed"}, default="memory"
        "speed" keeps the dense table in evaluation.
    seed : int, optional
        Of the map. Default: the next one of ``memory``.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import RoastEmbedding, SharedArray
    >>> table = RoastEmbedding(100_000, 64, memory=SharedArray(5000), scale=0.02)
    >>> table(torch.tensor([[1, 99_999]])).shape, sum(p.numel() for p in table.parameters())
    (torch.Size([1, 2, 64]), 5000)
    """

    weight: HashedWeight

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        memory: SharedArray,
        block: int | None = None,
        signs: bool = True,
        scale: float | None = None,
        mode: Mode = "memory",
        seed: int | None = None,
    ) -> None:
        rows = check_int("num_embeddings", num_embeddings, low=1)
        dim = check_int("embedding_dim", embedding_dim, low=1)
        block = min(dim, LONGEST_BLOCK) if block is None else check_int("block", block, low=1)
        check_memory(memory, block, "those of one block; take a larger array or a shorter block")
        if scale is None:
            scale = 1 / memory.std if memory.std > 0 else 1.0
        seed = memory.next_seed() if seed is None else check_int("seed", seed)
        weight = HashedBlockWeight(memory, BlockMap(memory.size, dim, block, seed, signs), rows, scale, mode)
        super().__init__(weight, _row("padding_idx", padding_idx, rows))

    @classmethod
    def over(cls, weight: HashedWeight, padding_idx: int | None = None) -> Self:
        """Return a table around an existing view, which a tied linear layer may hold too."""
        new = cls.__new__(cls)  # __init__ would make another view
        check_type("weight", weight, HashedWeight)
        StoredEmbedding.__init__(new, weight, _row("padding_idx", padding_idx, weight.shape[0]))
        return new

    @property
    def memory(self) -> SharedArray:
        """The shared array."""
        return self.weight.memory

    def materialize(self) -> Tensor:
        """Return the dense table (num_embeddings, embedding_dim), scaled; the padding row is zero."""
        table = self.weight.dense()
        if self.padding_idx is None:
            return table
        kept = torch.ones(self.num_embeddings, 1, dtype=table.dtype, device=table.device)
        kept[self.padding_idx] = 0
        return table * kept

    def forward(self, ids: Tensor) -> Tensor:  # any shape -> (*ids.shape, embedding_dim)
        """Return the rows of ``ids``."""
        rows = self.weight.rows(ids)
        return rows if self.padding_idx is None else rows.masked_fill((ids == self.padding_idx)[..., None], 0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty table from ``config()``."""
        weight = check_type("weight", cls._parts(config)[0], HashedWeight)
        return cls.over(weight, config["padding_idx"])  # type: ignore[arg-type]


def _row(name: str, row: int | None, rows: int) -> int | None:
    return None if row is None else check_int(name, row, low=-rows, high=rows - 1) % rows
