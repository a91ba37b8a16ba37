"""``NeighborhoodPlan``: which tokens see which in neighborhood attention, cut into tiles (arXiv 2403.04690).

The mask of a grid is a product of one mask an axis.  On an axis of length L, position i with residue g = i mod d and
place t = i // d sees places first(t) .. last(t) of its own residue, neither of which ever decreases.  A tile is a small
box of queries; all of them read one halo, the union of their windows, and few different masks serve all tiles.  Who
sees a key is a range as well, so backward has tiles of keys with halos of queries.  Built once with NumPy and kept;
nothing here depends on the numbers of a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
# Plans and tables that are kept; they take a number a token and, of each kind of tile, a number a row of its halo.
KEPT = 64
# Halos of compiled kernels are filled up to a multiple of it, and have room for as many more.
ROWS = 8


@dataclass(frozen=True)
class Axis:
    """The window of one axis: length, kernel size, stride, dilation and whether it is causal."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def seen(self, residue: int) -> tuple[Array, Array]:
        """Return the first and the last place that each place of a residue sees."""
        size = -(-(self.length - residue) // self.dilation)
        t = np.arange(size)
        group = t // self.stride * self.stride
        if self.causal:
            lead = np.minimum(group + self.stride - 1, size - 1)
            return np.maximum(lead - self.window + 1, 0), t
        lead = np.minimum(group + self.stride // 2, size - 1)
        # At the ends the window moves inward: it always holds as many places.
        first = np.clip(lead - self.window // 2, 0, size - self.window)
        return first, first + self.window - 1

    def seen_by(self, residue: int) -> tuple[Array, Array]:
        """Return the first and the last place that sees each place of a residue."""
        first, last = self.seen(residue)
        t = np.arange(len(first))
        return np.searchsorted(last, t, side="left"), np.searchsorted(first, t, side="right") - 1

    def tiles(self, tile: int, transposed: bool = False) -> tuple[Array, Array, Array]:
        """Return positions of tiles (n, tile), origins of their halos (n,), and what each place sees (n, tile, 2).

        What a place sees is its first and last row of the halo.  Places beyond the end repeat a position and see none.
        """
        lanes, origins, seen = [], [], []
        for residue in range(min(self.dilation, self.length)):
            ranges = np.stack(self.seen_by(residue) if transposed else self.seen(residue), axis=-1)
            t = np.arange(-(-len(ranges) // tile) * tile).reshape(-1, tile)
            there = t < len(ranges)
            t = np.where(there, t, t[:, :1])
            first = ranges[t[:, 0], 0]
            lanes.append(residue + self.dilation * t)
            origins.append(residue + self.dilation * first)
            seen.append(np.where(there[..., None], ranges[t] - first[:, None, None], (1, 0)))
        return np.concatenate(lanes), np.concatenate(origins), np.concatenate(seen)

    @functools.lru_cache(1024)  # noqa: B019 - a small frozen key
    def work(self, tile: int) -> int:
        """Return the rows that the halos of all tiles hold, forward and backward."""
        return sum(int((self.tiles(tile, way)[2][..., 1].max(1) + 1).sum()) for way in (False, True))


@dataclass(frozen=True, eq=False)
class Tiles:
    """Rows that are worked out together, and the rows that they read.

    Attributes
    ----------
    lanes : array, shape (tiles, lanes)
        Flat indices; places beyond a border repeat one.
    origins : array, shape (tiles,)
        The first row of each halo.
    kinds : array, shape (tiles,)
        Which offsets and which mask are a tile's.
    offsets : array, shape (kinds, m)
        Rows of a halo less its origin; the last ``beyond`` are flat indices.  Places beyond a border repeat a row.
    masks : array of bool, shape (kinds, lanes, m)
        Which lane sees which row of the halo; none for repeated ones.
    beyond : int
        Rows at the end of every halo that all lanes see.
    home : array
        Where each row that is worked out stands in ``lanes``, flattened.
    """

    lanes: Array
    origins: Array
    kinds: Array
    offsets: Array
    masks: Flags
    beyond: int
    home: Array
    _held: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        lanes: Array,
        origins: Array,
        kinds: Array,
        offsets: Array,
        masks: Flags,
        beyond: int,
        first: int,
        last: int,
    ) -> Self:
        """Take tables for the rows from ``first`` to ``last``."""
        real = np.any(masks, axis=2)[kinds].reshape(-1)
        home = np.empty(last - first, np.int64)
        home[lanes.reshape(-1)[real] - first] = np.flatnonzero(real)
        return cls(lanes, origins, kinds, offsets, masks, beyond, home)

    @property
    def halo(self) -> int:
        """Rows of a halo."""
        return self.offsets.shape[1]

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tables as tensors of a device."""
        if device not in self._held:
            names = ("lanes", "origins", "kinds", "offsets", "masks", "home")
            # Made inside inference_mode they could not be used in a graph later.
            with torch.inference_mode(False):
                self._held[device] = {n: torch.from_numpy(getattr(self, n)).to(device) for n in names}
        return self._held[device]

    def halos(self, piece: slice, device: torch.device) -> Tensor:
        """Return the rows of the halos of some tiles, (tiles, m)."""
        held = self.on(device)
        rows = held["offsets"][held["kinds"][piece]]
        rows[:, : self.halo - self.beyond] += held["origins"][piece, None]
        return rows

    @functools.cached_property
    def packed(self) -> tuple[npt.NDArray[np.generic], ...]:
        """The tables of compiled kernels, sixteen lanes a tile, where rows that no lane sees are left out.

        lanes, origins, kinds, offsets (kinds, m), a word of bits a row (kinds, m), rows that count and how many of them
        an origin moves (kinds, 2), bits of the lanes that are real (kinds,).
        """
        weights = 1 << np.arange(self.lanes.shape[1])
        words = np.einsum("klm,l->km", self.masks, weights)
        order = np.argsort(words == 0, axis=1, kind="stable")  # rows that are seen first, those beyond the grid last
        seen = np.count_nonzero(words, axis=1)
        rows = np.stack([-(-seen // ROWS) * ROWS, seen - self.beyond], axis=1)
        most = int(rows.max(initial=0))
        here = min(most, words.shape[1])
        bits, offsets = np.zeros((len(words), most), np.uint16), np.zeros((len(words), most), np.int32)
        bits[:, :here] = np.take_along_axis(words, order, 1)[:, :here]
        offsets[:, :here] = np.take_along_axis(self.offsets, order, 1)[:, :here]
        real = np.einsum("kl,l->k", self.masks.any(2), weights)
        return self.lanes.astype(np.int32), self.origins.astype(np.int32), self.kinds, offsets, bits, rows, real


class NeighborhoodPlan:
    """Tiles of queries with the keys that they see, and tiles of keys with the queries that see them.

    Parameters
    ----------
    shape, kernel_size, stride, dilation : tuple of int
        One number an axis of the grid.
    is_causal : tuple of bool
    tile : tuple of int
        Queries of a tile, an axis.
    extra : int
        Keys beyond the grid that every query sees; their indices follow those of the grid.

    Attributes
    ----------
    queries : Tiles
        Tiles of queries, halos of keys.
    keys : tuple of Tiles
        Tiles of keys, halos of queries: those of the grid, and those beyond it if there are any.

    Examples
    --------
    >>> plan = NeighborhoodPlan.of((8, 8), (3, 3), tile=(4, 4))
    >>> plan.queries.lanes.shape, plan.queries.halo, len(plan.queries.masks)
    ((4, 16), 25, 4)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        is_causal: tuple[bool, ...],
        tile: tuple[int, ...],
        extra: int = 0,
    ) -> None:
        self.axes = axes_of(shape, kernel_size, stride, dilation, is_causal)
        self.shape, self.tile, self.extra = shape, tile, extra
        self.tokens = math.prod(shape)

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int] | None = None,
        dilation: Sequence[int] | None = None,
        is_causal: Sequence[bool] | None = None,
        *,
        tile: Sequence[int] | int = 16,
        extra: int = 0,
    ) -> NeighborhoodPlan:
        """Return a plan, one of the last ones built if it is there; ``tile`` as a number chooses the box."""
        ones = [1] * len(shape)
        sizes, windows = tuple(map(int, shape)), tuple(map(int, kernel_size))
        steps, gaps = tuple(map(int, stride or ones)), tuple(map(int, dilation or ones))
        causal = tuple(map(bool, is_causal or [False] * len(shape)))
        if isinstance(tile, int):
            tile = box_of(axes_of(sizes, windows, steps, gaps, causal), tile)
        return _built(sizes, windows, steps, gaps, causal, tuple(map(int, tile)), extra)

    @functools.cached_property
    def queries(self) -> Tiles:
        """Tiles of queries, halos of keys."""
        lanes, origins, kinds, offsets, masks = self._product(False)
        if self.extra:
            beyond = self.tokens + np.arange(self.extra)
            offsets = np.concatenate([offsets, np.tile(beyond, (len(offsets), 1))], 1)
            masks = np.concatenate([masks, masks.any(2, keepdims=True).repeat(self.extra, 2)], 2)
        return Tiles.of(lanes, origins, kinds, offsets, masks, self.extra, 0, self.tokens)

    @functools.cached_property
    def keys(self) -> tuple[Tiles, ...]:
        """Tiles of keys, halos of queries."""
        grid = Tiles.of(*self._product(True), 0, 0, self.tokens)
        return (grid, self._beyond()) if self.extra else (grid,)

    def _product(self, transposed: bool) -> tuple[Array, Array, Array, Array, Flags]:
        """Return lanes, origins, kinds, offsets and masks of the grid from those of its axes."""
        lanes, origins, kinds, offsets = (np.zeros((1, 1), np.int64) for _ in range(4))
        masks = np.ones((1, 1, 1), bool)
        for axis, size, length in zip(self.axes, self.tile, self.shape, strict=True):
            mine = _table(axis, size, transposed)
            # Row by row: what was there counts for a whole row of this axis.
            lanes, origins = _outer(lanes * length, mine[0]), _outer(origins * length, mine[1][:, None])
            kinds = _outer(kinds * len(mine[3]), mine[2][:, None])
            offsets = _outer(offsets * length, mine[3])
            both = masks[:, None, :, None, :, None] & mine[4][None, :, None, :, None, :]
            masks = both.reshape(*(a * b for a, b in zip(masks.shape, mine[4].shape, strict=True)))
        return lanes, origins[:, 0], kinds[:, 0], offsets, masks

    def _beyond(self) -> Tiles:
        """Return the tiles of the keys beyond the grid, which every query sees."""
        count = math.prod(self.tile)
        places = np.arange(-(-self.extra // count) * count).reshape(-1, count)
        # All tiles but the last are full.
        there = np.stack([places[0] >= 0, places[-1] < self.extra])
        masks = np.repeat(there[:, :, None], self.tokens, 2)
        kinds, offsets = np.zeros(len(places), np.int64), np.tile(np.arange(self.tokens), (2, 1))
        kinds[-1] = 1
        lanes = self.tokens + np.minimum(places, self.extra - 1)
        origins = np.zeros(len(places), np.int64)
        return Tiles.of(lanes, origins, kinds, offsets, masks, 0, self.tokens, self.tokens + self.extra)


def axes_of(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Axis, ...]:
    """Return the windows of the axes."""
    return tuple(Axis(*numbers) for numbers in zip(shape, kernel_size, stride, dilation, is_causal, strict=True))


@functools.lru_cache(KEPT)
def box_of(axes: tuple[Axis, ...], lanes: int) -> tuple[int, ...]:
    """Return the box of ``lanes`` places, a power of two, whose halos hold the fewest rows in all."""
    boxes: list[tuple[int, ...]] = [()]
    for _ in axes:
        boxes = [(*box, 1 << power) for box in boxes for power in range(lanes.bit_length())]
    fitting = [box for box in boxes if math.prod(box) == lanes]
    return min(fitting, key=lambda box: math.prod(axis.work(size) for axis, size in zip(axes, box, strict=True)))


@functools.lru_cache(KEPT)
def _built(
    shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    tile: tuple[int, ...],
    extra: int,
) -> NeighborhoodPlan:
    return NeighborhoodPlan(shape, kernel_size, stride, dilation, is_causal, tile, extra)


@functools.lru_cache(KEPT)
def _table(axis: Axis, tile: int, transposed: bool) -> tuple[Array, Array, Array, Array, Flags]:
    """Return lanes (n, tile), origins and kinds (n,), offsets (kinds, m) and masks (kinds, tile, m) of one axis."""
    lanes, origins, seen = axis.tiles(tile, transposed)
    # Few tiles differ: those at the ends, and as many between as strides and tiles have common phases.
    ranges, kinds = np.unique(seen.reshape(len(seen), -1), axis=0, return_inverse=True)
    first, last = np.moveaxis(ranges.reshape(-1, tile, 1, 2), -1, 0)
    rows = np.arange(seen.max() + 1)
    masks = (rows >= first) & (rows <= last)
    # A range of one residue; what lies beyond a halo repeats its first row.
    offsets = np.where(masks.any(1), axis.dilation * rows, 0)
    return lanes, origins, kinds.reshape(-1), offsets, masks


def _outer(a: Array, b: Array) -> Array:
    """Return the sums of each row of ``a`` with each of ``b``, and of their columns: (n m, p q) of (n, p), (m, q)."""
    sums: Array = (a[:, None, :, None] + b[None, :, None, :]).reshape(len(a) * len(b), -1)
    return sums
