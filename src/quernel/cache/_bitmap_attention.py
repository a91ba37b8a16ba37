"""Attention of one new token over packed rows and dense ones, with one softmax over both.

Each run of up to eight pages, and each dense stretch, gives its maximum m, its sum of 2^(x - m) and the values so
weighted; joined by ``sum 2^(m - M) o / sum 2^(m - M) s`` with M the largest m that is softmax over all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quernel._threads import parallel_ranges, workspace
from quernel.cache import _bitmap_kernels as kernels
from quernel.cache._bitmap_intrinsics import HALF, channel_order, vector_path
from quernel.cache.bitmap_rows import GROUP, KINDS, BitmapRows, ordered, power_of_two, widened

# Pages of an item: 4,096 rows, enough to make what is joined afterwards small.
RUN = 8

Stretch = tuple[Tensor, Tensor]


def attend(
    query: Tensor,
    keys: BitmapRows,
    values: BitmapRows,
    dense: Sequence[Stretch],
    scale: float,
    *,
    plain: bool | None = None,
) -> Tensor:
    """Return softmax(scale q k^T) v over all rows, in the dtype of the query.

    Parameters
    ----------
    query : Tensor, shape (heads, g, d)
        The query heads of each key head.
    keys, values : BitmapRows
        As many rows of both, appended alike.
    dense : sequence of (Tensor, Tensor), shapes (heads, n, d) and (heads, n, d_v)
        Keys and values that are not packed.
    scale : float
        Of the logits.
    plain : bool, optional
        Unpack the rows first; default where the processor cannot expand them in registers.
    """
    kind = KINDS[keys.dtype]
    plain = not vector_path(kind) if plain is None else plain
    key_width, value_width = (-(-rows.dim // HALF) * HALF for rows in (keys, values))
    parts, runs = _parts(keys, values, dense, key_width, value_width)
    sizes = np.array([keys.n, -(-keys.dim // 64), values.n, -(-values.dim // 64)], np.int64)
    order = np.arange(value_width) if plain else channel_order(kind, value_width)
    count = keys.heads * (len(runs) - 1)
    answers = []
    for asked in query.detach().split(GROUP, dim=1):
        group = power_of_two(asked.shape[1])
        # The kernels' exponentials are powers of two.
        padded = widened(asked.float() * (scale * math.log2(math.e)), group)
        plain_query = padded.numpy()
        packed_query = plain_query if plain else ordered(padded, kind).numpy()
        maxima, sums = np.empty((count, group), np.float32), np.empty((count, group), np.float32)
        out = np.empty((count, group, value_width), np.float32)
        run = kernels.attend(kind, group, plain)
        work = partial(run, parts, runs, sizes, packed_query, plain_query, order, maxima, sums, out)
        parallel_ranges(work, count, threads=keys.threads())
        found = [torch.from_numpy(part).unflatten(0, (keys.heads, -1)) for part in (maxima, sums, out)]
        joined = _joined(*found)
        answers.append(joined[:, : asked.shape[1], : values.dim])
    return (answers[0] if len(answers) == 1 else torch.cat(answers, dim=1)).to(query.dtype)


def _joined(maxima: Tensor, sums: Tensor, out: Tensor) -> Tensor:
    """Join the runs of each head: (heads, runs, group, ...) -> (heads, group, width)."""
    if maxima.shape[1] == 1:
        return out[:, 0] / sums[:, 0, :, None]
    factors = (maxima - maxima.amax(1, keepdim=True)).exp2_()
    return torch.einsum("hrg,hrgd->hgd", factors, out) / (factors * sums).sum(1)[..., None]


def _parts(
    keys: BitmapRows, values: BitmapRows, dense: Sequence[Stretch], key_width: int, value_width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Describe pages and dense stretches, and where runs of parts of one kind begin."""
    stretches = [pair for pair in dense if pair[0].shape[1]]
    pages = len(keys.pages)
    parts = np.empty((pages + len(stretches), kernels.PART), np.int64)
    parts[:pages, 0], parts[:pages, 1] = keys.sides[:, 0], 0
    parts[:pages, 2:7], parts[:pages, 7:] = keys.sides[:, 1:], values.sides[:, 1:]
    for i, (k, v) in enumerate(stretches):
        parts[pages + i] = (k.shape[1], 1, *_side(k, key_width, f"k{i}"), *_side(v, value_width, f"v{i}"))
    runs = [*range(0, pages, RUN), *range(pages, len(parts) + 1)]
    return parts, np.array(runs, np.int64)


def _side(rows: Tensor, width: int, name: str) -> tuple[int, int, int, int, int]:
    """Describe dense rows (heads, n, d): as they lie if kernels can read them, else a float32 copy.

    Kernels read 16 rows at a time and whole halves of tiles.
    """
    heads, n, dim = rows.shape
    whole = -(-n // 16) * 16
    end = rows.storage_offset() + (heads - 1) * rows.stride(0) + whole * dim
    fits = dim == width and rows.stride()[1:] == (dim, 1) and end <= rows.untyped_storage().nbytes() // 4
    if rows.dtype != torch.float32 or not fits:
        flat = workspace(f"bitmap-{name}", heads * whole * width, torch.float32).view(heads, whole, width)
        flat[:, :n, :dim], flat[:, :n, dim:] = rows, 0
        rows = flat
    return 0, rows.data_ptr(), 0, 4 * rows.stride(0), 4 * width
