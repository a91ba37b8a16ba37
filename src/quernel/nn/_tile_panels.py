"""Products with the virtual matrix of a ``TileMap`` on the CPU, a panel of it at a time, none of it kept.

A panel is expanded into a workspace of the thread and multiplied by torch's own GEMM; ranges of panels run on the
library's threads. One to a few rows of input are multiplied straight from the array instead. The gradient of the array
is in ``_tile_gradient``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._threads import parallel_ranges, workspace
from quernel.nn import _tile_kernels as kernels

# Half of a second-level cache of 2 MiB: the product reads the panel where the expansion has just written it.
PANEL_BYTES = 2**20
# At most so many rows go through the product straight from the array.
FEW_ROWS = 4
# Numbers of W worth a thread of their own.
GRAIN = 2**16

_INTEGERS: dict[int, tuple[torch.dtype, Any]] = {
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}


@dataclass(frozen=True, eq=False)
class Tiles:
    """A map as the compiled passes take it.

    Attributes
    ----------
    constants : array, int64
        ``TileMap.operands()``.
    starts : array, int64 (tile rows, tile columns), or empty
    flips : array, int8 (out, in), or empty
    """

    constants: NDArray[np.int64]
    starts: NDArray[np.int64]
    flips: NDArray[np.int8]

    @classmethod
    def of(cls, operands: Sequence[int], starts: Tensor | None, flips: Tensor | None) -> Self:
        """Take the operands of an op."""
        return cls(
            np.array(operands, dtype=np.int64),
            np.zeros((0, 0), np.int64) if starts is None else starts.numpy(),
            np.zeros((0, 0), np.int8) if flips is None else flips.numpy(),
        )

    @property
    def size(self) -> int:
        """Numbers of the array."""
        return int(self.constants[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.constants[1]), int(self.constants[2])

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return int(self.constants[3]), int(self.constants[4])

    @property
    def has_runs(self) -> bool:
        """Whether a row of a tile is a run of the array whose signs come from the hash."""
        return self.tile[1] > 1 and not self.constants[7] and self.flips.size == 0

    def expand(self, memory: Tensor, out: Tensor, n0: int, k0: int) -> None:
        """Fill ``out``, contiguous and of the dtype of ``memory``, with the rectangle of W at row n0 and column k0."""
        if self.has_runs:
            kernels.expand(self.constants, self.starts, bits(memory), bits(out), n0, k0)
        else:
            top = _top(memory)
            kernels.expand_any(self.constants, self.starts, self.flips, bits(memory), bits(out), n0, k0, top)

    def expand_rows(self, memory: Tensor, ids: Tensor, out: Tensor) -> None:
        """Fill ``out`` (n, in) with rows of W."""
        held = (self.constants, self.starts, self.flips, bits(memory), ids.numpy(), bits(out), _top(memory))
        kernels.expand_rows(*held, self.has_runs)

    def scatter(self, source: Tensor, total: Tensor, n0: int, k0: int) -> None:
        """Add a rectangle of the gradient of W to ``total`` (m,), both float32 or both float64."""
        if self.has_runs:
            kernels.scatter(self.constants, self.starts, source.numpy(), total.numpy(), n0, k0, 0, self.size)
        else:
            kernels.scatter_any(self.constants, self.starts, self.flips, source.numpy(), total.numpy(), n0, k0)

    def over_rows(self, work: Callable[[int, int], None], cost: int = 1) -> None:
        """Run ``work(n0, n1)`` over ranges of whole tile rows; ``cost`` is that of a number of W."""
        high, (rows, columns) = self.tile[0], self.shape
        grain = max(1, GRAIN // (high * columns * cost))
        tiles = -(-rows // high)
        parallel_ranges(lambda a, b: work(a * high, min(b * high, rows)), tiles, grain=grain)

    def over_columns(self, work: Callable[[int, int], None], cost: int = 1) -> None:
        """Run ``work(k0, k1)`` over ranges of whole tile columns."""
        wide, (rows, columns) = self.tile[1], self.shape
        grain = max(1, GRAIN // (wide * rows * cost))
        tiles = -(-columns // wide)
        parallel_ranges(lambda a, b: work(a * wide, min(b * wide, columns)), tiles, grain=grain)


def linear(tiles: Tiles, x: Tensor, memory: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return ``scale * x @ W.T + bias``; x: (rows, in), bias of its dtype."""
    y = _fresh(len(x), tiles.shape[0], x.dtype)
    if len(x) == 0:
        return y
    if len(x) <= FEW_ROWS and tiles.has_runs and x.dtype is memory.dtype is torch.float32:
        held = tiles.constants, tiles.starts, memory.numpy(), x.numpy(), y.numpy(), np.float32(scale)
        high = tiles.tile[0]
        tiles.over_rows(lambda n0, n1: kernels.multiply(*held, n0 // high, -(-n1 // high)), cost=len(x))
        return y if bias is None else y.add_(bias)

    def work(first: int, last: int) -> None:
        for n0, n1 in _steps(first, last, tiles.tile[0], tiles.shape[1] * memory.element_size()):
            expanded = panel(n1 - n0, tiles.shape[1], memory.dtype)
            tiles.expand(memory, expanded, n0, 0)
            part = y[:, n0:n1]
            if bias is not None:
                part.copy_(bias[n0:n1])
            part.addmm_(x, expanded.to(x.dtype).mT, beta=0 if bias is None else 1, alpha=scale)

    tiles.over_rows(work, cost=len(x))
    return y


def input_gradient(tiles: Tiles, grad: Tensor, memory: Tensor, scale: float) -> Tensor:
    """Return ``scale * grad @ W``; grad: (rows, out)."""
    out = _fresh(len(grad), tiles.shape[1], grad.dtype)

    def work(first: int, last: int) -> None:
        for k0, k1 in _steps(first, last, tiles.tile[1], tiles.shape[0] * memory.element_size()):
            expanded = panel(tiles.shape[0], k1 - k0, memory.dtype)
            tiles.expand(memory, expanded, 0, k0)
            out[:, k0:k1].addmm_(grad, expanded.to(grad.dtype), beta=0, alpha=scale)

    tiles.over_columns(work, cost=max(1, len(grad)))
    return out


def expand(tiles: Tiles, memory: Tensor) -> Tensor:
    """Return W without its scale, in the dtype of ``memory``."""
    out = _fresh(*tiles.shape, memory.dtype)
    tiles.over_rows(lambda n0, n1: tiles.expand(memory, out[n0:n1], n0, 0))
    return out


def expand_rows(tiles: Tiles, memory: Tensor, ids: Tensor) -> Tensor:
    """Return rows of W; ids: (n,) int64 within its rows."""
    out = _fresh(len(ids), tiles.shape[1], memory.dtype)
    grain = max(1, GRAIN // tiles.shape[1])
    parallel_ranges(lambda i, j: tiles.expand_rows(memory, ids[i:j], out[i:j]), len(ids), grain=grain)
    return out


def scatter_rows(tiles: Tiles, source: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient of the array (m,) from those of rows of W; source: (n, in)."""
    wide = source.to(sum_dtype(source.dtype)).contiguous()
    total = wide.new_zeros(tiles.size)
    held = tiles.constants, tiles.starts, tiles.flips, wide.numpy(), ids.numpy(), total.numpy()
    kernels.scatter_rows(*held, tiles.has_runs)
    return total


def bits(tensor: Tensor) -> Any:
    """Return a contiguous tensor as an array of unsigned integers of the same width."""
    signed, unsigned = _INTEGERS[tensor.element_size()]
    return tensor.view(signed).numpy().view(unsigned)


def _top(memory: Tensor) -> Any:
    """Return the sign bit as an array of one."""
    size = memory.element_size()
    return np.array([1 << (8 * size - 1)], dtype=_INTEGERS[size][1])


def _steps(first: int, last: int, tile: int, item: int) -> list[tuple[int, int]]:
    """Cut a range into panels of whole tiles; ``item`` is the bytes of a row or column of the panel."""
    step = max(1, PANEL_BYTES // (tile * item)) * tile
    return [(start, min(start + step, last)) for start in range(first, last, step)]


def _fresh(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised matrix that threads may write: they do not know that the caller is in inference mode."""
    with torch.inference_mode(False):
        return torch.empty(rows, columns, dtype=dtype)


def panel(rows: int, columns: int, dtype: torch.dtype, key: str = "tile_panel") -> Tensor:
    """Return a matrix in this thread's workspace of that name."""
    held: Tensor = workspace(key, rows * columns, dtype).view(rows, columns)
    return held


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are summed."""
    return torch.float64 if dtype is torch.float64 else torch.float32
