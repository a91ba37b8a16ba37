"""``PairTable``: one row of numbers for every ordered pair of token ids, in a hashed table (arXiv 2106.08235).

    row(u, v, b) = [chunk_1 of row h_1, ..., chunk_k of row h_k],     h_c = fastrange(mix64(seed, u, v, b, c), m)

b is a bucket of their distance, or absent. With k hash functions two pairs share a whole row with probability m^-k.
``direct=True`` numbers pairs exactly, (u V + v) B + b, for small vocabularies. Memory: m dim numbers, or, as views of
one ROBE array, as many as you give it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.hashing.block_map import check_hash
from quernel.hashing.mixers import mix64
from quernel.nn._block_plain import wide_dtype
from quernel.nn._pair_ops import pair_rows, pair_sum
from quernel.nn._pair_plain import STORED, Layout, shares_of
from quernel.nn._shared_array import SharedArray
from quernel.nn.hashed._robe import RobeArray
from quernel.nn.hashed.robe_bag import RobeEmbeddingBag
from quernel.nn.weights._base import dtype_name, unique_bytes
from quernel.nn.weights.dense import DTYPES

Storage = Literal["dense", "bf16", "robe"]
Combine = Literal["concat", "sum"]
# Beyond it ``fastrange`` would take the long product.
MOST_ROWS = 2**32 - 1
BUDGET_BYTES = 2**32
# Of the hash of pairs and the place of chunks: another version is another table.
HASH = 1
_OPTIONS = ("n_rows", "dim", "n_hashes", "seed", "direct", "storage", "vocab", "combine", "sparse", "std")


def _example() -> dict[str, Any]:
    def make() -> PairTable:
        generator = torch.Generator().manual_seed(0)
        return PairTable(40, 8, vocab=16, sparse=False, generator=generator)

    def ids(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 16, (4, 3), generator=generator), torch.randint(0, 16, (4, 3), generator=generator)

    return {"make": make, "input": ids}


@register(
    "pairconnect", pillar="nn", contract="module", paper="2106.08235", status="stable", headline=False, example=_example
)
class PairTable(nn.Module):
    """A trainable row for every ordered pair of ids, hashed into ``n_rows`` rows or numbered exactly.

    Parameters
    ----------
    n_rows : int
        Rows m of the table; at least V^2 times the buckets of distance for ``direct=True``.
    dim : int
        Numbers of a row.
    n_hashes : int, optional
        Hash functions k, a divisor of ``dim``; default 2, or 1 for ``direct=True``.
    seed : int, default=0
        Decides the hashes; any 64-bit integer.
    direct : bool, default=False
        Number pairs exactly; needs ``vocab``. No collisions.
    storage : {"dense", "bf16", "robe"}, default="dense"
        Rows in float32 (or ``dtype``), in bfloat16 (half the bytes, read into float32), or as views of one small array.
    vocab : int, optional
        Size V of the vocabulary; ids beyond it are refused. None leaves it open.
    combine : {"concat", "sum"}, default="concat"
        k chunks of ``dim / k`` beside each other, or k rows of ``dim``, k times the bytes, summed with trained weights.
    size : int, optional
        For "robe": numbers of an array of its own.
    memory : RobeArray, optional
        For "robe": an array shared with other tables; theirs must have other seeds.
    block : int, optional
        For "robe": consecutive numbers that share a hash, as in ``RobeEmbedding``.
    sparse : bool, optional
        Whether gradients are sparse, row by row, for ``torch.optim.SparseAdam``, ``Adagrad`` and ``SGD``. Default True,
        and False for "robe", whose array is small.
    std : float, default=0.02
        Standard deviation of the initial rows; 0 is fine, what stands beside the layer trains first.
    budget_bytes : int, default=2**32
        A larger table is refused.
    device, dtype, generator : optional
        As elsewhere; ``dtype`` float32, float64 or bfloat16.

    Raises
    ------
    QuernelError
        If a size is out of range, ``direct=True`` has too few rows, or the table exceeds its budget.

    Notes
    -----
    Trained rows are better stored in bfloat16 after training: ``PairTable.to_storage("bf16")``. A gradient of all rows
    costs m dim numbers a step, whatever the batch, and Adam twice that in state.

    References
    ----------
    Xu et al., "PairConnect: A Compute-Efficient MLP Alternative to Attention", arXiv 2106.08235, 2021.

    Examples
    --------
    >>> table = PairTable(1000, 16, vocab=50)
    >>> one, other = table(torch.tensor([3, 7]), torch.tensor([7, 3]))
    >>> one.shape, bool((one == other).any())
    (torch.Size([16]), False)
    """

    def __init__(
        self,
        n_rows: int,
        dim: int,
        *,
        n_hashes: int | None = None,
        seed: int = 0,
        direct: bool = False,
        storage: Storage = "dense",
        vocab: int | None = None,
        combine: Combine = "concat",
        size: int | None = None,
        memory: SharedArray | None = None,
        block: int | None = None,
        sparse: bool | None = None,
        std: float = 0.02,
        budget_bytes: int = BUDGET_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.direct = check_type("direct", direct, bool)
        self.vocab = None if vocab is None else check_int("vocab", vocab, low=1, high=2**31 - 1)
        self.n_rows = check_int("n_rows", n_rows, low=1, high=MOST_ROWS)
        self.dim = check_int("dim", dim, low=1)
        self.n_hashes = (1 if direct else 2) if n_hashes is None else check_int("n_hashes", n_hashes, low=1)
        self.combine = check_choice("combine", combine, ("concat", "sum"))
        self.storage = check_choice("storage", storage, ("dense", "bf16", "robe"))
        self.sparse = storage != "robe" if sparse is None else check_type("sparse", sparse, bool)
        self.std = check_float("std", std, low=0.0)
        self.seed = check_int("seed", seed)
        self._state = int(np.uint64(mix64(self.seed)).view(np.int64))
        if direct and self.n_hashes != 1:
            raise QuernelError(f"n_hashes must be 1 for direct=True, which hashes nothing; got {self.n_hashes}")
        if combine == "concat" and self.dim % self.n_hashes:
            raise QuernelError(
                f"n_hashes must divide dim={self.dim}; got {self.n_hashes}. Take another, or combine='sum'"
            )
        self.check_direct(1)
        if storage != "robe" and (size, memory, block) != (None, None, None):
            raise QuernelError("size, memory and block are for storage='robe'; drop them")
        self._check_budget(check_int("budget_bytes", budget_bytes, low=1), size, dtype)
        if self.combine == "sum":
            self.mix = nn.Parameter(torch.full((self.n_hashes,), self.n_hashes**-0.5, device=device))
        if storage == "robe":
            if (size is None) == (memory is None):
                raise QuernelError(
                    "size or memory must be given for storage='robe': numbers of a new array, or one to share"
                )
            if memory is None:
                options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
                memory = RobeArray(check_int("size", size, low=1), seed=self.seed, bound=std * 3**0.5, **options)
            self._hold_views(memory, block)
        else:
            dtype = torch.bfloat16 if storage == "bf16" else torch.get_default_dtype() if dtype is None else dtype
            check_choice("dtype", dtype, STORED)
            self.weight = nn.Parameter(torch.empty(self.n_rows * self.n_hashes, self.chunk, device=device, dtype=dtype))
            self.reset_parameters(generator)

    @property
    def chunk(self) -> int:
        """Numbers that one hash function finds."""
        return self.dim if self.combine == "sum" else self.dim // self.n_hashes

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return unique_bytes(self)

    @property
    def dtype_of_sums(self) -> torch.dtype:
        """Dtype of the sums of stored rows: bfloat16 rows are a storage, but a model cast to it computes in it."""
        stored = self.weight.dtype
        return stored if self.storage == "dense" else wide_dtype(stored)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh rows."""
        if self.storage == "robe":
            self.views.memory.reset_parameters(generator)
        elif self.std == 0:
            self.weight.zero_()
        elif not self.weight.is_meta:
            # In place and in parts: a table may be larger than what is free beside it.
            for part in self.weight.split(2**16):
                part.copy_(torch.empty(part.shape, device=part.device).normal_(0, self.std, generator=generator))

    def check_direct(self, buckets: int) -> None:
        """Raise if exact numbering with so many buckets of distance needs more rows than there are."""
        if not self.direct:
            return
        if self.vocab is None:
            raise QuernelError("vocab must be given for direct=True: pairs are numbered u * vocab + v")
        needed = self.vocab**2 * buckets
        if needed > self.n_rows:
            raise QuernelError(
                f"n_rows must be at least vocab^2 * buckets = {self.vocab}^2 * {buckets} = {needed} for direct=True; "
                f"got {self.n_rows}. Use more rows, fewer rel_buckets, or direct=False"
            )

    def layout(
        self,
        *,
        window: int | None = 1,
        distances: int = 1,
        keyed: bool = False,
        normaliser: int = 0,
        causal: bool = True,
        heads: int = 1,
    ) -> Layout:
        """Return what the ops need to know of this table and of a layer over it."""
        return Layout(
            self._state, self.n_rows, self.n_hashes, self.chunk, self.vocab or 0, int(self.direct), window or 0,
            distances, int(keyed), normaliser, int(causal), heads,
        )  # fmt: skip

    def sums(
        self,
        ids: Tensor,
        layout: Layout,
        *,
        scores: Tensor | None = None,
        relative: Tensor | None = None,
        queries: int = 0,
    ) -> Tensor:  # (B, T) -> (B, Q, dim)
        """Return the weighted sums of the rows of each query's pairs; see ``PairConnect``."""
        if self.storage == "robe":
            y = self._sums_of_views(ids, layout, scores, relative, queries)
        else:
            weight = self.weight
            y = pair_sum(weight, ids, layout, scores=scores, relative=relative, queries=queries, sparse=self.sparse)
            y = y.to(self.dtype_of_sums)
        return self._combined(y)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:  # two of one shape -> (*shape, dim)
        """Return the rows of pairs (u, v), without a distance."""
        check_type("u", u, Tensor)
        if check_type("v", v, Tensor).shape != u.shape:
            raise QuernelError(f"v must have the shape of u, {tuple(u.shape)}; got {tuple(v.shape)}")
        # A sequence of two: query u at place 0 looks at v, which is one token ahead, distance -1, first in the list.
        both = torch.stack([u.reshape(-1), v.reshape(-1)], dim=1)
        rows = pair_rows(both, self.layout(window=2, causal=False), self.n_rows * self.n_hashes)[:, 0, :, 0]
        y = (
            self.views(rows.reshape(-1, 1))
            if self.storage == "robe"
            else F.embedding(rows, self.weight, sparse=self.sparse)
        )
        return self._combined(y.reshape(*u.shape, self.n_hashes * self.chunk))

    @torch.no_grad()
    def to_storage(self, storage: Literal["dense", "bf16"]) -> PairTable:
        """Return a table with the same rows in another storage."""
        if check_choice("storage", storage, ("dense", "bf16")) and self.storage == "robe":
            raise QuernelError("storage='robe' has no rows of its own to store; it stays as it is")
        described = self.config() | {"storage": storage}
        new = type(self).from_config(described | {"dtype": "float32" if storage == "dense" else "bfloat16"})
        new.load_state_dict(self.state_dict())  # copies, and rounds where the storage is narrower
        return new.to(self.weight.device).train(self.training)

    def config(self) -> dict[str, Any]:
        """Return sizes, kinds, seed and, for "robe", the description of the views."""
        described = {name: getattr(self, name) for name in _OPTIONS} | {"hash": HASH}
        if self.storage == "robe":
            return described | {"views": self.views.config()}
        return described | {"dtype": dtype_name(self.weight.dtype)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a table without values from ``config()``; a loader fills it."""
        check_hash(config.get("hash", 1), HASH)
        held = {name: config[name] for name in _OPTIONS}
        if config["storage"] == "robe":
            views = RobeEmbeddingBag.from_config(config["views"])
            new = cls(**held, memory=views.memory, block=views.block)
            new.views = views
            if views.num_embeddings != new.n_rows * new.n_hashes + 1 or views.dim != new.chunk:
                raise QuernelError("views must be of the rows of the table, and one for padding")
            return new
        dtype = DTYPES[check_choice("dtype", config["dtype"], tuple(DTYPES))]
        new = cls(**held, device="meta", budget_bytes=2**62)
        new.weight = nn.Parameter(torch.zeros(new.weight.shape, dtype=check_choice("dtype", dtype, STORED)))
        if new.combine == "sum":
            new.mix = nn.Parameter(torch.zeros(new.mix.shape))
        return new

    def extra_repr(self) -> str:
        """Show sizes and storage."""
        kind = "direct" if self.direct else f"n_hashes={self.n_hashes}"
        return f"{self.n_rows}, {self.dim}, {kind}, storage={self.storage!r}, vocab={self.vocab}"

    def _hold_views(self, memory: SharedArray, block: int | None) -> None:
        rows = self.n_rows * self.n_hashes
        options: dict[str, Any] = {"memory": memory, "block": block, "sparse": self.sparse}
        # The last row stands for pairs that are not there.
        self.views = RobeEmbeddingBag(rows + 1, self.chunk, padding_idx=rows, field=self.seed % 2**63, **options)

    def _sums_of_views(
        self, ids: Tensor, layout: Layout, scores: Tensor | None, relative: Tensor | None, queries: int
    ) -> Tensor:
        if self.n_hashes % layout.heads:
            raise QuernelError(f"n_heads must divide n_hashes={self.n_hashes} for storage='robe'; got {layout.heads}")
        rows = pair_rows(ids, layout, self.n_rows * self.n_hashes, queries=queries)  # (B, Q, hashes, distances)
        values = self.views.memory.values
        shares = shares_of(scores, relative, rows, layout, ids.shape[1], wide_dtype(values.dtype))
        shares = shares.repeat_interleave(self.n_hashes // layout.heads, dim=2)
        y = self.views(rows.flatten(0, 2), per_sample_weights=shares.reshape(-1, shares.shape[-1]))
        return y.reshape(*rows.shape[:2], layout.width)

    def _combined(self, y: Tensor) -> Tensor:
        if self.combine == "concat":
            return y
        return (y.unflatten(-1, (self.n_hashes, self.dim)) * self.mix.to(y.dtype)[:, None]).sum(-2)

    def _check_budget(self, budget: int, size: int | None, dtype: torch.dtype | None) -> None:
        numbers = self.n_rows * self.n_hashes * self.chunk if self.storage != "robe" else size or 0
        wide = torch.get_default_dtype() if dtype is None else dtype
        needed = numbers * (2 if self.storage == "bf16" else wide.itemsize)
        if needed > budget:
            raise QuernelError(
                f"n_rows={self.n_rows} rows of {self.n_hashes * self.chunk} numbers take {needed} bytes, more than "
                f"budget_bytes={budget}. Use fewer rows, storage='bf16' or 'robe', or a larger budget"
            )
