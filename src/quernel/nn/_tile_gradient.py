"""The gradient of an array that a ``TileMap`` reads, on the CPU: the same numbers whatever the number of threads.

W's gradient is formed a rectangle of whole tiles at a time, each by one thread. The rectangles follow from sizes alone,
and so do the ranges into which they fall; each range is summed for itself, in the order of its tiles, and the sums are
added in order. Who does it is free: one thread a range, with an array of its own; or, where there are more threads than
ranges, all of them one range after the other, each thread adding to its own slots of the array.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quernel._threads import num_threads, parallel_ranges, workspace
from quernel.nn import _tile_kernels as kernels
from quernel.nn import _tile_panels as panels
from quernel.nn._tile_panels import Tiles

# Numbers of a tile from which on it costs little to look at it and pass on.
LARGE_TILE = 256
# W's gradient falls into so many rectangles at least, where they hold so many numbers.
LEAST_RECTANGLES, LEAST_NUMBERS = 4, 2**17
# Of W's gradient at a time, where all threads work on one range: a quarter of a third-level cache.
WAVE_BYTES = 2**23
# Ranges are at most so many, and their arrays hold so many numbers together.
MOST_RANGES, MOST_NUMBERS = 8, 2**22

Rectangle = tuple[int, int, int, int]  # rows from, to, columns from, to
Fill = Callable[[Rectangle, Tensor], None]


def memory_gradient(tiles: Tiles, grad: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return the gradient (m,) of the array from those of the outputs, in float32 or float64."""

    def fill(rectangle: Rectangle, out: Tensor) -> None:
        n0, n1, k0, k1 = rectangle
        direct = out.dtype is x.dtype
        product = out if direct else panels.panel(n1 - n0, k1 - k0, x.dtype)
        torch.mm(grad[:, n0:n1].mT, x[:, k0:k1], out=product)
        if not direct:
            out.copy_(product)

    dtype, threads = panels.sum_dtype(x.dtype), _threads(tiles, max(1, len(x)))
    rectangles = _rectangles(tiles, dtype.itemsize)
    bounds = _bounds(len(rectangles), _ranges(tiles))

    def add(first: int, last: int, total: Tensor) -> None:
        for n0, n1, k0, k1 in rectangles[first:last]:
            part = panels.panel(n1 - n0, k1 - k0, dtype, "tile_part")
            fill((n0, n1, k0, k1), part)
            tiles.scatter(part, total, n0, k0)

    if threads <= len(bounds) or not _is_large(tiles):
        return _in_order(_by_ranges(tiles, bounds, add, dtype, threads)).mul_(scale)
    return _in_order([_by_slots(tiles, rectangles[i:j], fill, dtype, threads) for i, j in bounds]).mul_(scale)


def scatter(tiles: Tiles, source: Tensor) -> Tensor:
    """Return the gradient of the array (m,) from that of W."""
    wide = source.to(panels.sum_dtype(source.dtype)).contiguous()
    (rows, columns), high = tiles.shape, tiles.tile[0]
    if _is_large(tiles):
        total = _zeros(tiles, wide.dtype)
        _add_by_slots(tiles, [((0, rows, 0, columns), wide)], total)
        return total

    def add(first: int, last: int, total: Tensor) -> None:
        tiles.scatter(wide[first * high : last * high], total, first * high, 0)

    bounds = _bounds(-(-rows // high), _ranges(tiles))
    return _in_order(_by_ranges(tiles, bounds, add, wide.dtype, _threads(tiles, 1)))


def _is_large(tiles: Tiles) -> bool:
    return tiles.has_runs and tiles.tile[0] * tiles.tile[1] >= LARGE_TILE


def _ranges(tiles: Tiles) -> int:
    """Return into how many ranges W falls, each with an array of its own; they take a small part of the time."""
    numbers = tiles.shape[0] * tiles.shape[1]
    fitting = min(MOST_NUMBERS, numbers // 16) // tiles.size
    two = not _is_large(tiles) or tiles.size <= min(MOST_NUMBERS // 2, numbers // 8)
    return max(2 if two else 1, min(MOST_RANGES, fitting))


def _bounds(n: int, ranges: int) -> list[tuple[int, int]]:
    """Cut n items into ranges of about the same length."""
    ranges = min(n, ranges)
    return [(n * i // ranges, n * (i + 1) // ranges) for i in range(ranges)]


def _in_order(totals: list[Tensor]) -> Tensor:
    """Return the sum of the arrays of all ranges."""
    first, *others = totals
    for other in others:
        first += other
    return first


def _threads(tiles: Tiles, cost: int) -> int:
    return min(num_threads(), max(1, tiles.shape[0] * tiles.shape[1] * cost // panels.GRAIN))


def _zeros(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    # Threads write it, and they do not know that the caller is in inference mode.
    with torch.inference_mode(False):
        return torch.zeros(tiles.size, dtype=dtype)


def _rectangles(tiles: Tiles, item: int) -> list[Rectangle]:
    """Cut W into rectangles of whole tiles that fit a panel; ``item`` is the bytes of a number."""
    (rows, columns), (high, wide) = tiles.shape, tiles.tile
    most = min(panels.PANEL_BYTES // item, max(LEAST_NUMBERS, rows * columns // LEAST_RECTANGLES))
    # As square as they can be, and equal: a product reads the fewest numbers of its factors then.
    count = -(-rows * columns // most)
    down = max(1, min(count, round(math.sqrt(count * rows / columns))))
    height = -(-rows // (down * high)) * high
    width = -(-columns // (-(-count // down) * wide)) * wide
    return [
        (n0, min(n0 + height, rows), k0, min(k0 + width, columns))
        for n0 in range(0, rows, height)
        for k0 in range(0, columns, width)
    ]


def _numbers(rectangle: Rectangle) -> int:
    n0, n1, k0, k1 = rectangle
    return (n1 - n0) * (k1 - k0)


def _by_slots(tiles: Tiles, rectangles: list[Rectangle], fill: Fill, dtype: torch.dtype, threads: int) -> Tensor:
    """Form some rectangles, each by one thread, then add them, each slot by one thread; and again."""
    total = _zeros(tiles, dtype)
    for wave in _waves(rectangles, WAVE_BYTES // total.element_size()):
        numbers = [_numbers(rectangle) for rectangle in wave]
        held = workspace("tile_wave", sum(numbers), total.dtype).split(numbers)
        parts = [(r, part.view(r[1] - r[0], r[3] - r[2])) for r, part in zip(wave, held, strict=True)]

        def form(first: int, last: int, parts: list[tuple[Rectangle, Tensor]] = parts) -> None:
            for rectangle, out in parts[first:last]:
                fill(rectangle, out)

        _one_thread_each(form, len(parts), threads)
        _add_by_slots(tiles, parts, total)
    return total


def _waves(rectangles: list[Rectangle], most: int) -> list[list[Rectangle]]:
    """Group rectangles, in order, to at most so many numbers, or one."""
    waves: list[list[Rectangle]] = []
    room = 0
    for rectangle in rectangles:
        if _numbers(rectangle) > room:
            waves.append([])
            room = most
        waves[-1].append(rectangle)
        room -= _numbers(rectangle)
    return waves


def _add_by_slots(tiles: Tiles, parts: list[tuple[Rectangle, Tensor]], total: Tensor) -> None:
    arrays = [(source.numpy(), rectangle[0], rectangle[2]) for rectangle, source in parts]
    sums = total.numpy()

    def add(low: int, high: int) -> None:
        for source, n0, k0 in arrays:
            kernels.scatter(tiles.constants, tiles.starts, source, sums, n0, k0, low, high)

    threads = max(1, min(num_threads(), sum(source.size for source, *_ in arrays) // panels.GRAIN))
    parallel_ranges(add, tiles.size, threads=threads)


def _by_ranges(
    tiles: Tiles,
    bounds: list[tuple[int, int]],
    add: Callable[[int, int, Tensor], None],
    dtype: torch.dtype,
    threads: int,
) -> list[Tensor]:
    """Run ``add(first, last, total)`` over ranges, each with an array of its own; return those."""
    totals: list[Tensor] = [torch.empty(0)] * len(bounds)

    def work(start: int, stop: int) -> None:
        for i in range(start, stop):
            totals[i] = _zeros(tiles, dtype)
            add(*bounds[i], totals[i])

    _one_thread_each(work, len(bounds), threads)
    return totals


def _one_thread_each(work: Callable[[int, int], None], n: int, threads: int) -> None:
    """Run ``work`` over ranges, products of torch on one thread each: on several they may add in another order."""
    if threads > 1 and n == 1:
        # A region of its own, of which the second range is empty.
        parallel_ranges(lambda first, last: work(min(first, 1), min(last, 1)), 2, threads=2)
    else:
        parallel_ranges(work, n, threads=threads)
