"""``BitmapRows``: rows that keep some of their channels, as bitmaps and values that attention reads as they are.

The storage of Mustafar (arXiv 2505.22913): a uint64 bitmap a tile of 64 channels, bit c for channel c, and the kept
values in the order of channels.  A row keeps exactly n, so there are no offsets: d / 8 bytes rounded up to tiles, and
n values.  Rows of several heads lie in one object, in pages of ``PAGE`` rows, so that appending copies no more than a
page and leaves no room to spare but that up to a multiple of 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._threads import Work, parallel_ranges
from quernel._validate import check_int
from quernel.cache import _bitmap_kernels as kernels
from quernel.cache._bitmap_intrinsics import BFLOAT16, FLOAT16, FLOAT32, HALF, TILE, channel_order, vector_path

PAGE, STEP = 512, 64
# Longer rows would not count in the 16 bits that a row of the format may need elsewhere.
MAX_DIM = 65535
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
# The most query heads that share one pass over the rows.
GROUP = 8
# Rows of one thread at least: a range of its own costs 30 us, a row to pack about one.
_PACKED_ROWS = 256
# Tiles of one thread at least; a tile passes in a few nanoseconds.
_TILES = 16384


@dataclass
class Page:
    """Bitmaps (heads, room, tiles) and values (heads, room, n) of up to ``PAGE`` rows; those before ``skip`` are gone.

    Rows beyond the last have empty bitmaps: kernels take 16 at a time and read nothing of their values.
    """

    bitmaps: Tensor
    values: Tensor
    rows: int = 0
    skip: int = 0

    @classmethod
    def of(cls, heads: int, room: int, tiles: int, n: int, dtype: torch.dtype, device: torch.device) -> Page:
        """Make an empty page."""
        bitmaps = torch.zeros(heads, room, tiles, dtype=torch.int64, device=device)
        return cls(bitmaps, torch.empty(heads, room, n, dtype=dtype, device=device))

    def moved(self, room: int) -> Page:
        """Return a page of other room with the rows that are not gone."""
        heads, _, tiles = self.bitmaps.shape
        page = Page.of(heads, room, tiles, self.values.shape[2], self.values.dtype, self.values.device)
        page.rows = self.rows - self.skip
        page.bitmaps[:, : page.rows] = self.bitmaps[:, self.skip : self.rows]
        page.values[:, : page.rows] = self.values[:, self.skip : self.rows]
        return page


class BitmapRows:
    """Rows of ``dim`` channels of which each keeps its ``n`` largest in magnitude.

    Parameters
    ----------
    heads : int
        How many sequences of rows are held side by side.
    dim : int
        Channels of a row, at most 65535.
    n : int
        Channels that a row keeps, 1 to ``dim``.
    dtype : torch.dtype, default=torch.float32
        Of the kept values: float32, bfloat16 or float16.

    Raises
    ------
    QuernelError
        If a number is out of range or the dtype is another.

    Notes
    -----
    A row has ``8 * ceil(dim / 64) + n * itemsize`` bytes. On processors with AVX-512 (and VBMI2 for 16-bit values)
    tiles are expanded in registers; elsewhere blocks of 128 rows are unpacked first.

    References
    ----------
    D. Joo et al., "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
    arXiv 2505.22913, 2025.

    Examples
    --------
    >>> import torch
    >>> from quernel.cache import BitmapRows
    >>> rows = BitmapRows.pack(torch.tensor([[1.0, -3.0, 0.5, 2.0]]), n=2)
    >>> rows.unpack()
    tensor([[ 0., -3.,  0.,  2.]])
    >>> rows.qk(torch.ones(1, 4))
    tensor([[-1.]])
    """

    def __init__(self, heads: int, dim: int, n: int, dtype: torch.dtype = torch.float32) -> None:
        self.heads = check_int("heads", heads, low=1)
        self.dim = check_int("dim", dim, low=1, high=MAX_DIM)
        self.n = check_int("n", n, low=1, high=dim)
        if dtype not in KINDS:
            raise QuernelError(f"dtype must be float32, bfloat16 or float16; got {dtype}")
        self.dtype = dtype
        self.pages: list[Page] = []
        self._flat = False
        self._sides: np.ndarray | None = None

    @classmethod
    def pack(cls, x: Tensor, n: int, dtype: torch.dtype | None = None) -> BitmapRows:
        """Return the rows of ``x``, (T, d) or (heads, T, d), with their ``n`` largest channels.

        ``dtype`` of the values is that of ``x`` unless another is given.
        """
        _check_floats("x", x)
        if x.ndim not in (2, 3):
            raise QuernelError(f"x must have shape (T, d) or (heads, T, d); got {tuple(x.shape)}")
        rows = cls(x.shape[0] if x.ndim == 3 else 1, x.shape[-1], n, x.dtype if dtype is None else dtype)
        rows._flat = x.ndim == 2
        return rows.append(x)

    def append(self, x: Tensor) -> Self:
        """Add rows, (heads, T, d), or (T, d) where there is one head.

        Of channels of equal magnitude the first are kept; NaN counts as larger than all.

        Raises
        ------
        QuernelError
            If the shape does not fit, or a number is too large for float16 values.
        """
        _check_floats("x", x)
        x = x.detach()[None] if x.ndim == 2 else x.detach()
        if x.ndim != 3 or x.shape[0] != self.heads or x.shape[2] != self.dim:
            raise QuernelError(f"x must have shape ({self.heads}, T, {self.dim}); got {tuple(x.shape)}")
        done, total = 0, x.shape[1]
        while done < total:
            if not self.pages or self.pages[-1].rows == PAGE:
                self.pages.append(Page.of(self.heads, 0, self._tiles, self.n, self.dtype, x.device))
            page = self.pages[-1]
            count = min(PAGE - page.rows, total - done)
            room = _up(page.rows + count, STEP)
            if room > page.bitmaps.shape[1]:
                page = self.pages[-1] = page.moved(room)
                count = min(PAGE - page.rows, total - done, room - page.rows)
            places = slice(page.rows, page.rows + count)
            page.bitmaps[:, places], page.values[:, places] = packed(x[:, done : done + count], self.n, self.dtype)
            page.rows += count
            done += count
        self._sides = None
        return self

    def drop_first(self, count: int) -> None:
        """Forget the oldest rows."""
        check_int("count", count, low=0, high=len(self))
        while count:
            page = self.pages[0]
            gone = min(count, page.rows - page.skip)
            page.skip, count = page.skip + gone, count - gone
            if page.skip == page.rows:
                self.pages.pop(0)
            elif page.skip >= STEP:
                self.pages[0] = page.moved(_up(page.rows - page.skip, STEP))
        self._sides = None

    def unpack(self) -> Tensor:
        """Return the rows with zeros for what is not kept, in the dtype of the values: (heads, T, d), or as packed."""
        out = torch.empty(self.heads, len(self), self.dim, dtype=self.dtype)
        done, kind = 0, KINDS[self.dtype]
        for page in self.pages:
            count = page.rows - page.skip
            for head in range(self.heads):
                block = np.empty((count, self.dim), np.uint32)
                values = page.values[head, page.skip :]
                bitmaps = page.bitmaps[head, page.skip : page.rows].numpy().view(np.uint64)
                kernels.unpack(kind, bitmaps, values.data_ptr(), self.n, block)
                out[head, done : done + count] = torch.from_numpy(block.view(np.float32))
            done += count
        return out[0] if self._flat else out

    def qk(self, q: Tensor) -> Tensor:
        """Return the products of queries (heads, g, d) with all rows, float32 (heads, g, T); one head needs no axis."""
        queries = self._per_head("q", q, self.dim)
        parts, starts, plain = self._parts(), self._starts(), not vector_path(KINDS[self.dtype])
        out = []
        for asked in queries.split(GROUP, dim=1):
            group = power_of_two(asked.shape[1])
            padded = ordered(widened(asked, group), KINDS[self.dtype])
            answers = np.empty((self.heads, group, len(self)), np.float32)
            run = kernels.logits(KINDS[self.dtype], group, plain)
            self._over_pages(partial(run, parts, self.n, self._tiles, padded.numpy(), starts, answers))
            out.append(torch.from_numpy(answers[:, : asked.shape[1]]))
        joined = torch.cat(out, dim=1)
        return joined[0] if q.ndim == 2 else joined

    def pv(self, p: Tensor) -> Tensor:
        """Return the sums of all rows with weights (heads, g, T), float32 (heads, g, d); one head needs no axis."""
        weights = self._per_head("p", p, len(self))
        kind, parts, starts = KINDS[self.dtype], self._parts(), self._starts()
        width, plain = _up(self.dim, HALF), not vector_path(kind)
        order = np.arange(width) if plain else channel_order(kind, width)
        out = []
        for asked in weights.split(GROUP, dim=1):
            group = power_of_two(asked.shape[1])
            given = torch.zeros(self.heads, group, len(self))
            given[:, : asked.shape[1]] = asked
            answers = np.empty((self.heads, len(parts), group, width), np.float32)
            run = kernels.weigh(kind, group, plain)
            self._over_pages(partial(run, parts, self.n, self._tiles, given.numpy(), starts, order, answers))
            out.append(torch.from_numpy(answers).sum(1)[:, : asked.shape[1], : self.dim])
        joined = torch.cat(out, dim=1)
        return joined[0] if p.ndim == 2 else joined

    def _over_pages(self, work: Work) -> None:
        parallel_ranges(work, self.heads * len(self.pages), threads=self.threads())

    def _per_head(self, name: str, x: Tensor, width: int) -> Tensor:
        x_all = x[None] if x.ndim == 2 and self.heads == 1 else x
        if x_all.ndim != 3 or len(x_all) != self.heads or x_all.shape[2] != width or not x_all.shape[1]:
            raise QuernelError(f"{name} must have shape ({self.heads}, g, {width}); got {tuple(x.shape)}")
        return x_all.detach().float()

    def threads(self) -> int | None:
        """Return 1 where a thread more would cost more than it saves."""
        return 1 if self.heads * len(self) * self._tiles < 2 * _TILES else None

    @property
    def sides(self) -> np.ndarray:
        """What kernels know of the pages, int64 (pages, 6): rows, addresses, head strides, bytes of a row's values."""
        if self._sides is None:
            size, step = self.n * self.dtype.itemsize, 8 * self._tiles
            self._sides = np.array(
                [
                    (
                        page.rows - page.skip,
                        page.bitmaps.data_ptr() + page.skip * step,
                        page.values.data_ptr() + page.skip * size,
                        page.bitmaps.shape[1] * step,
                        page.values.shape[1] * size,
                        size,
                    )
                    for page in self.pages
                ],
                np.int64,
            ).reshape(-1, 6)
        return self._sides

    def _parts(self) -> np.ndarray:
        parts = np.zeros((len(self.pages), kernels.PART), np.int64)
        parts[:, 0], parts[:, 2:7] = self.sides[:, 0], self.sides[:, 1:]
        return parts

    def _starts(self) -> np.ndarray:
        ends = np.cumsum(self.sides[:, 0])
        return ends - self.sides[:, 0]

    @property
    def _tiles(self) -> int:
        return -(-self.dim // TILE)

    def tensors(self) -> list[Tensor]:
        """Return all that is stored."""
        return [t for page in self.pages for t in (page.bitmaps, page.values)]

    @property
    def nbytes(self) -> int:
        """Bytes stored, bitmaps and room to spare included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def __len__(self) -> int:
        """Rows of each head."""
        return sum(page.rows - page.skip for page in self.pages)

    def clone(self) -> Self:
        """Return a copy that shares nothing."""
        other = type(self)(self.heads, self.dim, self.n, self.dtype)
        other.pages = [Page(p.bitmaps.clone(), p.values.clone(), p.rows, p.skip) for p in self.pages]
        other._flat = self._flat
        return other

    def __deepcopy__(self, memo: Any) -> Self:
        # Not what is remembered of the pages: it holds addresses.
        return self.clone()


def packed(x: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the bitmaps, int64 (heads, T, tiles), and the ``n`` values of each of the rows ``x``, (heads, T, d)."""
    heads, count, dim = x.shape
    flat = x.float().contiguous().cpu().reshape(-1, dim).numpy().view(np.uint32)
    bitmaps = np.empty((len(flat), -(-dim // TILE)), np.uint64)
    values = np.empty((len(flat), n), np.uint32)
    parallel_ranges(partial(kernels.pack, flat, n, bitmaps, values), len(flat), grain=_PACKED_ROWS)
    kept = torch.from_numpy(values.view(np.float32))
    if dtype == torch.float16 and x.dtype != torch.float16 and bool((kept.abs() > 65504).any()):
        raise QuernelError("a number is beyond 65504, the largest of float16; store the values in bfloat16")
    numbers = torch.from_numpy(bitmaps.view(np.int64)).view(heads, count, bitmaps.shape[1])
    return numbers, kept.to(dtype).view(heads, count, n)


def power_of_two(group: int) -> int:
    """Return the least power of two that is no smaller."""
    return int(1 << (group - 1).bit_length())


def widened(query: Tensor, group: int) -> Tensor:
    """Return float32 queries (heads, group, width) with zeros beyond what there is, width a multiple of 32."""
    heads, g, dim = query.shape
    out = torch.zeros(heads, group, _up(dim, HALF))
    out[:, :g, :dim] = query
    return out


def ordered(query: Tensor, kind: int) -> Tensor:
    """Return queries in the order of channels in which rows of this kind are multiplied here."""
    if kind != BFLOAT16 or not vector_path(kind):
        return query
    return query[..., torch.from_numpy(channel_order(kind, query.shape[-1]))].contiguous()


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_floats(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.dtype not in KINDS:
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise QuernelError(f"{name} must be a tensor of float32, bfloat16 or float16; got {found}. Convert it")
