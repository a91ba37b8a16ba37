"""``PackedKVPool``: a pool whose keys and values keep their largest channels, packed as ``BitmapRows`` packs them.

Mustafar's storage (arXiv 2505.22913) inside the pool of retrieval.  A record is the bitmap of a key, its kept channels,
and the same of the value: as long as any other, so that a unit is one range here too, in memory or in a file.  Reading
it unpacks it, and attention runs over the dense working set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.cache._bitmap_intrinsics import TILE
from quernel.cache._bitmap_kernels import expand_ranges
from quernel.cache._pool import KVPool
from quernel.cache.bitmap_rows import KINDS, packed
from quernel.cache.pruning import kept_channels

POOL_DTYPES = ("float32", "bfloat16", "float16", "float64")


class PackedKVPool(KVPool):
    """Keys and values of one sequence in one layer, of each the largest channels.

    Parameters
    ----------
    heads : int
        Key heads.
    dims : tuple of (int, int)
        Channels of a key and of a value.
    sparsities : tuple of (float, float)
        Share of them that is dropped, in [0, 1): ``dim - floor(sparsity * dim)`` stay, of equal magnitudes the first.
    dtype : torch.dtype, default=torch.float32
        Of the kept channels: float32, bfloat16 or float16.
    storage : {"ram", "memmap"}
        See ``KVPool``.

    Raises
    ------
    QuernelError
        If a size is below 1, a sparsity leaves no channel, the storage is unknown, or the dtype is another.

    Notes
    -----
    A key takes ``8 * ceil(dim / 64) + kept * itemsize`` bytes, and a value likewise.

    Examples
    --------
    >>> pool = PackedKVPool(heads=1, dims=(4, 2), sparsities=(0.5, 0.0))
    >>> first = pool.append(torch.tensor([[[1.0, -3.0, 0.5, 2.0, 7.0, 8.0]]]))
    >>> next(pool.blocks())
    tensor([[[ 0., -3.,  0.,  2.,  7.,  8.]]])
    """

    def __init__(
        self,
        heads: int,
        dims: tuple[int, int],
        sparsities: tuple[float, float],
        dtype: torch.dtype = torch.float32,
        storage: str = "ram",
    ) -> None:
        super().__init__(heads, sum(check_int("dims", dim, low=1) for dim in dims), dtype, storage)
        _check_dtype(dtype)
        self.dims, self.sparsities = dims, sparsities
        names = ("k_sparsity", "v_sparsity")
        self.kept = [kept_channels(*side) for side in zip(dims, sparsities, names, strict=True)]
        # A word a number.
        self._word = torch.int32 if dtype.itemsize == 4 else torch.int16
        self._words = sum(-(-dim // TILE) * 8 // dtype.itemsize + n for dim, n in zip(dims, self.kept, strict=True))
        self._sides = np.array([*zip(dims, self.kept, strict=True)], np.int64)

    def pruned(self, rows: Tensor) -> Tensor:
        """Return rows as they are read after they were appended."""
        pool = PackedKVPool(self.heads, self.dims, self.sparsities, self.dtype)
        pool.append(rows)
        return next(pool.blocks())

    def _written(self, rows: Tensor) -> Tensor:
        sides = [packed(x, n, self.dtype) for x, n in zip(rows.split(self.dims, dim=-1), self.kept, strict=True)]
        return torch.cat([part.view(self._word) for side in sides for part in side], dim=-1).flatten()

    def _read(self, source: np.ndarray, first: int, starts: np.ndarray, counts: np.ndarray, *target: Any) -> None:
        expand_ranges(self.dtype.itemsize)(source, first, self._words, self._sides, starts, counts, *target)


def dtype_named(pool_dtype: str | None) -> torch.dtype | None:
    """Return the dtype of a pool; None, which is the model's, for None.

    Raises
    ------
    QuernelError
        If it is not one of ``POOL_DTYPES``.
    """
    name = check_choice("pool_dtype", pool_dtype, (None, *POOL_DTYPES))
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


def packing(k_sparsity: float, v_sparsity: float, dtype: torch.dtype | None) -> tuple[float, float] | None:
    """Return the sparsities of a packed pool, None where both are 0 and the pool is not packed.

    Raises
    ------
    QuernelError
        If a sparsity is outside [0, 1), or the dtype of the pool cannot be packed.
    """
    sparsities = (
        check_float("k_sparsity", k_sparsity, low=0.0, high=1.0, open_high=True),
        check_float("v_sparsity", v_sparsity, low=0.0, high=1.0, open_high=True),
    )
    if not any(sparsities):
        return None
    if dtype is not None:
        _check_dtype(dtype)
    return sparsities


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in KINDS:
        raise QuernelError(f"a packed pool holds float32, bfloat16 or float16; got {dtype}. Give another pool_dtype")


def make_pool(
    keys: Tensor, values: Tensor, dtype: torch.dtype | None, storage: str, sparsities: tuple[float, float] | None
) -> KVPool:
    """Return an empty pool for keys and values like these, (Hk, n, d) each; ``dtype`` is by default theirs."""
    heads, dims, dtype = keys.shape[0], (keys.shape[-1], values.shape[-1]), dtype or keys.dtype
    if sparsities is None:
        return KVPool(heads, sum(dims), dtype, storage)
    return PackedKVPool(heads, dims, sparsities, dtype, storage)


def _warmup() -> None:
    """Compile the packing and the reading of both widths of a number (see ``quernel warmup``)."""
    for dtype in (torch.float32, torch.bfloat16):
        for storage in ("ram", "memmap"):
            pool = PackedKVPool(1, (2, 2), (0.5, 0.5), dtype, storage)
            pool.append(torch.zeros(1, 1, 4))
            next(pool.blocks())
