"""ROBE: embedding tables read from one small shared array in hashed blocks (arXiv 2108.02191).

Row e of a virtual table of any length is cut into blocks of Z numbers, and block c is a window of the array M:

    row(e)[c Z + k] = sign * scale * M[(h(e, c) + k) mod m],   k = 0 .. Z - 1

M is trained, the hash h and the signs are functions of a seed. Z = 1 is element-wise hashing; Z = dim slides one window
over the array, so two rows overlap shifted and are almost never the same. Memory is m numbers whatever the vocabulary;
a look-up costs ceil(dim / Z) hashes and about as many cache lines, as many as a table's own rows where Z = dim.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.hashing.block_map import BlockMap
from quernel.nn._block_ops import Field, block_bag, max_rows
from quernel.nn._shared_array import SharedArray
from quernel.nn.hashed._robe import Robe, array_of, check_told_apart, map_of, padding_of, parts_of, scale_of


def _embedding_example() -> dict[str, Any]:
    def make() -> RobeEmbedding:
        return RobeEmbedding(50, 6, size=40, block=4, padding_idx=3, generator=torch.Generator().manual_seed(0))

    return {"make": make, "input": lambda generator: (torch.randint(0, 50, (4, 3), generator=generator),)}


@register(
    "robe",
    pillar="nn",
    contract="module",
    paper="2108.02191",
    status="stable",
    headline=False,
    example=_embedding_example,
)
class RobeEmbedding(Robe):
    """An embedding table of any length, read from one small shared array in hashed blocks.

    Parameters
    ----------
    num_embeddings : int or None
        Size of the vocabulary; None leaves it open: any id of up to about 60 bits has a row.
    dim : int
        Numbers of a row.
    block : int, optional
        Consecutive numbers Z that share a hash; default 16, or ``dim`` where that is less. Fastest where it divides
        ``dim`` or equals it. Larger than ``dim``, blocks run over several rows.
    memory : RobeArray, optional
        The array, shared with whoever else is given it.
    size : int, optional
        Instead of ``memory``: numbers of an array of its own.
    field : int, optional
        Tells apart the tables that share an array: each gets its own hash. Default 0 where the array is its own.
    offset : int, optional
        Instead of ``field``: row i is number ``offset + i`` of one table over all fields.
    padding_idx : int, optional
        Its row is zero and gets no gradient.
    scale : float, "like" or None, default=None
        Fixed factor of all rows. "like" gives rows the initial magnitude that a table of their own would have in
        DLRM, ``num_embeddings ** -0.5``, whatever the array was filled with. None is 1.
    sparse : bool, default=False
        Whether the gradient of the array is sparse, for ``torch.optim.SparseAdam`` and SGD; pays for large arrays.
    generator : torch.Generator, optional
        For the initial values of an array of its own.

    Raises
    ------
    QuernelError
        If a size is out of range, a given array comes without ``field`` or ``offset``, or an id is not in the
        vocabulary.

    Notes
    -----
    Differs from the authors' code: the array is circular, numbers have random signs (``RobeArray(signs=False)`` goes
    without), the hash mixes 64 bits (``RobeEmbedding.over`` takes a ``BlockMap.mod_prime``), and no index is stored.

    References
    ----------
    Desai et al., "Random Offset Block Embedding Array", arXiv 2108.02191, 2022.

    Examples
    --------
    >>> table = RobeEmbedding(1_000_000, 16, size=1000)
    >>> table(torch.tensor([[0, 999_999]])).shape, sum(p.numel() for p in table.parameters())
    (torch.Size([1, 2, 16]), 1000)
    """

    def __init__(
        self,
        num_embeddings: int | None,
        dim: int,
        *,
        block: int | None = None,
        memory: SharedArray | None = None,
        size: int | None = None,
        field: int | None = None,
        offset: int | None = None,
        padding_idx: int | None = None,
        scale: float | Literal["like"] | None = None,
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        vocabulary = [] if num_embeddings is None else [check_int("num_embeddings", num_embeddings, low=1)]
        if field is not None and offset is not None:
            raise QuernelError(f"field or offset must be given, not both; got field={field} and offset={offset}")
        check_told_apart(memory, field, offset)
        memory = array_of(memory, size, vocabulary, generator)
        keys = (check_int("field", 0 if field is None else field, low=0),) if offset is None else ()
        mapped = map_of(memory, dim, block, keys)
        self._set(num_embeddings, memory, mapped, 0 if offset is None else offset, padding_idx, scale, sparse)

    def _set(
        self,
        num_embeddings: int | None,
        memory: SharedArray,
        mapped: BlockMap,
        offset: int,
        padding_idx: int | None,
        scale: float | str | None,
        sparse: bool,
    ) -> None:
        self.offset, rows = check_int("offset", offset, low=0), max_rows(mapped)
        if num_embeddings is None and self.offset < rows:
            limit = rows - self.offset
        else:
            limit = check_int("num_embeddings", num_embeddings, low=1)
        if self.offset + limit > rows:
            raise QuernelError(
                f"num_embeddings and offset must stay below the {rows} rows of the map; got {num_embeddings} from "
                f"{offset} on"
            )
        self.num_embeddings = None if num_embeddings is None else limit
        self.padding_idx = padding_of(padding_idx, num_embeddings)
        self.scale = scale_of(scale, num_embeddings, memory.bound)
        padding = -1 if self.padding_idx is None else self.padding_idx
        self._hold(memory, mapped, [Field(self.offset, limit, padding, self.scale)], sparse)

    @classmethod
    def over(
        cls,
        memory: SharedArray,
        mapped: BlockMap,
        num_embeddings: int | None,
        *,
        offset: int = 0,
        padding_idx: int | None = None,
        scale: float | Literal["like"] | None = None,
        sparse: bool = False,
    ) -> Self:
        """Return a table with a given map, such as ``BlockMap.mod_prime`` with the constants of published code.

        A table over ``BlockMap.explicit`` computes and trains, but cannot be saved: its map is no function of a seed.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        check_type("mapped", mapped, BlockMap)
        new._set(num_embeddings, memory, mapped, offset, padding_idx, scale, sparse)
        return new

    @property
    def _is_open(self) -> bool:
        return self.num_embeddings is None

    def forward(self, ids: Tensor) -> Tensor:  # any shape -> (*ids.shape, dim)
        """Return the rows of ``ids``, any integer dtype, in the dtype of the array."""
        check_type("ids", ids, Tensor)
        rows = block_bag(self.memory.values, ids.reshape(-1, 1), self._table, sparse=self.sparse)
        return rows.reshape(*ids.shape, self.dim)

    @torch.no_grad()
    def materialize(self) -> nn.Embedding:
        """Return the whole table as a plain layer, ``num_embeddings * dim`` numbers."""
        if self.num_embeddings is None:
            raise QuernelError("num_embeddings is None: a table over an open vocabulary has no end")
        values = self.memory.values
        rows = self(torch.arange(self.num_embeddings, device=values.device))
        return nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=self.padding_idx, sparse=self.sparse)

    def config(self) -> dict[str, Any]:
        """Return array, map, vocabulary and scale."""
        described = {"num_embeddings": self.num_embeddings, "offset": self.offset, "scale": self.scale}
        return described | self._base_config()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a table over an array of zeros from ``config()``."""
        named = {name: config[name] for name in ("offset", "padding_idx", "scale", "sparse")}
        return cls.over(*parts_of(config), config["num_embeddings"], **named)

    def extra_repr(self) -> str:
        """Show the sizes."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.dim}, block={self.block}{padding}"
