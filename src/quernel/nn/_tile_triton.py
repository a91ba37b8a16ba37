"""Triton kernels of a ``TileMap`` for GPUs: products with the virtual matrix, its gradients, expansion and scatter.

One program works on one block of the result and walks over the tiles that it needs: a start is one hash a tile, signs
are the bits of one word for 64 numbers, and W stays in registers on its way to ``tl.dot``. Additions into the array are
atomic, in float32, so their order is not fixed. Tiles are part of the model and never tuned; rows of the input are.
Importing this file needs Triton: see ``_tile_plain.fused``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quernel.hashing.block_map import SIGNS
from quernel.nn._tile_plain import SIDES

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_SIGNS = tl.constexpr(SIGNS)
# Rows of the input that one program takes at a time, at most, and how many times: sizes that kernels are compiled for.
_MOST_ROWS, _MOST_STEPS = 64, 8


def takes(operands: Sequence[int], *tensors: Tensor) -> bool:
    """Say whether the kernels are for such a map and such numbers; the rest is for torch's own operations."""
    size, _, _, high, wide, *_ = operands
    return high in SIDES and wide in SIDES and size < 2**31 and all(t.dtype in _FLOATS for t in tensors)


@triton.jit
def _step(state: tl.tensor, key: tl.tensor) -> tl.tensor:
    """One step of ``mix64``, all uint64."""
    z = state + key + _GOLDEN
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def _tile(
    a: tl.tensor,
    b: tl.tensor,
    size: tl.tensor,
    columns: tl.tensor,
    seed: tl.tensor,
    SIGNED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return slots and sign factors of tile (a, b), both (HIGH, WIDE)."""
    AREA: tl.constexpr = HIGH * WIDE
    # Everything that is hashed is uint64, loop counters too.
    zero = tl.full((), 0, tl.uint64)
    state, a, b = zero + seed, zero + a, zero + b
    h = _step(_step(state, a), b)
    n = zero + size - AREA + 1
    start = (((h >> 32) * n + (((h & 0xFFFFFFFF) * n) >> 32)) >> 32).to(tl.int64)
    place = tl.arange(0, AREA)
    if SIGNED:
        # Areas are multiples of 64, so a tile's first word begins with the tile.
        first = (a * tl.cdiv(columns, WIDE) + b) * (AREA // 64)
        words = _step(_step(state, first + tl.arange(0, AREA // 64)), zero + _SIGNS)
        bits = (words[:, None] >> (zero + tl.arange(0, 64))[None, :]) & 1
        signs = 1.0 - 2.0 * tl.reshape(bits, (AREA,)).to(tl.float32)
    else:
        signs = tl.full((AREA,), 1.0, tl.float32)
    slots = start + place
    if BY_COLUMNS:
        return tl.trans(tl.reshape(slots, (WIDE, HIGH))), tl.trans(tl.reshape(signs, (WIDE, HIGH)))
    return tl.reshape(slots, (HIGH, WIDE)), tl.reshape(signs, (HIGH, WIDE))


@triton.jit(do_not_specialize=["seed"])
def _linear_kernel(
    x: tl.tensor,
    memory: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    batch: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    seed: tl.tensor,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    SIGNED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Write ``scale * x W^T + bias``; x: (batch, columns), y: (batch, rows)."""
    a = tl.program_id(1)
    m, n = tl.program_id(0) * BATCH + tl.arange(0, BATCH), a * HIGH + tl.arange(0, HIGH)
    total = tl.zeros((BATCH, HIGH), tl.float32)
    for b in range(TILES):
        k = b * WIDE + tl.arange(0, WIDE)
        slots, signs = _tile(a, b, size, columns, seed, SIGNED, HIGH, WIDE, BY_COLUMNS)
        w = (tl.load(memory + slots).to(tl.float32) * signs).to(x.dtype.element_ty)
        inside = (m[:, None] < batch) & (k[None, :] < columns)
        part = tl.load(x + m[:, None].to(tl.int64) * columns + k[None, :], mask=inside, other=0.0)
        total += tl.dot(part, tl.trans(w), input_precision=PRECISION)
    total *= scale
    if BIASED:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    there = (m[:, None] < batch) & (n[None, :] < rows)
    tl.store(y + m[:, None].to(tl.int64) * rows + n[None, :], total.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed"])
def _input_kernel(
    grad: tl.tensor,
    memory: tl.tensor,
    dx: tl.tensor,
    batch: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    seed: tl.tensor,
    PRECISION: tl.constexpr,
    SIGNED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Write ``scale * grad W``; grad: (batch, rows), dx: (batch, columns)."""
    b = tl.program_id(1)
    m, k = tl.program_id(0) * BATCH + tl.arange(0, BATCH), b * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((BATCH, WIDE), tl.float32)
    for a in range(TILES):
        n = a * HIGH + tl.arange(0, HIGH)
        slots, signs = _tile(a, b, size, columns, seed, SIGNED, HIGH, WIDE, BY_COLUMNS)
        w = (tl.load(memory + slots).to(tl.float32) * signs).to(grad.dtype.element_ty)
        inside = (m[:, None] < batch) & (n[None, :] < rows)
        part = tl.load(grad + m[:, None].to(tl.int64) * rows + n[None, :], mask=inside, other=0.0)
        total += tl.dot(part, w, input_precision=PRECISION)
    there = (m[:, None] < batch) & (k[None, :] < columns)
    at = dx + m[:, None].to(tl.int64) * columns + k[None, :]
    tl.store(at, (total * scale).to(dx.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed"])
def _memory_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    dm: tl.tensor,
    batch: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    seed: tl.tensor,
    PRECISION: tl.constexpr,
    SIGNED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Add ``scale * grad^T x`` to the gradient of the array, float32 (size,); a tile and STEPS blocks a program."""
    a, b = tl.program_id(0), tl.program_id(1)
    n, k = a * HIGH + tl.arange(0, HIGH), b * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((HIGH, WIDE), tl.float32)
    for step in range(STEPS):
        m = (tl.program_id(2) * STEPS + step) * BATCH + tl.arange(0, BATCH)
        left = (m[:, None] < batch) & (n[None, :] < rows)
        g = tl.load(grad + m[:, None].to(tl.int64) * rows + n[None, :], mask=left, other=0.0)
        right = (m[:, None] < batch) & (k[None, :] < columns)
        part = tl.load(x + m[:, None].to(tl.int64) * columns + k[None, :], mask=right, other=0.0)
        total += tl.dot(tl.trans(g), part, input_precision=PRECISION)
    slots, signs = _tile(a, b, size, columns, seed, SIGNED, HIGH, WIDE, BY_COLUMNS)
    there = (n[:, None] < rows) & (k[None, :] < columns)
    tl.atomic_add(dm + slots, total * signs * scale, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["seed"])
def _expand_kernel(
    memory: tl.tensor,
    w: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    seed: tl.tensor,
    SIGNED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
) -> None:
    """Write W, (rows, columns), a tile a program."""
    a, b = tl.program_id(0), tl.program_id(1)
    n, k = a * HIGH + tl.arange(0, HIGH), b * WIDE + tl.arange(0, WIDE)
    slots, signs = _tile(a, b, size, columns, seed, SIGNED, HIGH, WIDE, BY_COLUMNS)
    values = tl.load(memory + slots).to(tl.float32) * signs
    there = (n[:, None] < rows) & (k[None, :] < columns)
    tl.store(w + n[:, None].to(tl.int64) * columns + k[None, :], values.to(w.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed"])
def _scatter_kernel(
    source: tl.tensor,
    dm: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    seed: tl.tensor,
    SIGNED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
) -> None:
    """Add a matrix (rows, columns) to the array, float32 (size,), a tile a program."""
    a, b = tl.program_id(0), tl.program_id(1)
    n, k = a * HIGH + tl.arange(0, HIGH), b * WIDE + tl.arange(0, WIDE)
    slots, signs = _tile(a, b, size, columns, seed, SIGNED, HIGH, WIDE, BY_COLUMNS)
    there = (n[:, None] < rows) & (k[None, :] < columns)
    at = source + n[:, None].to(tl.int64) * columns + k[None, :]
    tl.atomic_add(dm + slots, tl.load(at, mask=there, other=0.0).to(tl.float32) * signs, mask=there, sem="relaxed")


def linear(operands: Sequence[int], x: Tensor, memory: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return ``scale * x @ W.T + bias``; x: (rows, in)."""
    numbers, kinds, (down, across) = _told(operands)
    y, block = x.new_empty(len(x), operands[1]), _block(len(x))
    held = (x.contiguous(), memory.contiguous(), x if bias is None else bias, y, len(x), scale, *numbers)
    if y.numel():
        with torch.cuda.device_of(x):
            _linear_kernel[triton.cdiv(len(x), block), down](
                *held, bias is not None, _precision(), *kinds, block, across
            )
    return y


def input_gradient(operands: Sequence[int], grad: Tensor, memory: Tensor, scale: float) -> Tensor:
    """Return ``scale * grad @ W``; grad: (rows, out)."""
    numbers, kinds, (down, across) = _told(operands)
    dx, block = grad.new_empty(len(grad), operands[2]), _block(len(grad))
    if dx.numel():
        held = (grad.contiguous(), memory.contiguous(), dx, len(grad), scale, *numbers)
        with torch.cuda.device_of(grad):
            _input_kernel[triton.cdiv(len(grad), block), across](*held, _precision(), *kinds, block, down)
    return dx


def memory_gradient(operands: Sequence[int], grad: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return the gradient (m,) of the array, float32, from those of the outputs."""
    numbers, kinds, grid = _told(operands)
    dm = torch.zeros(operands[0], dtype=torch.float32, device=x.device)
    if len(x):
        block = _block(len(x))
        blocks = triton.cdiv(len(x), block)
        steps = min(_MOST_STEPS, triton.next_power_of_2(blocks))
        held = (grad.contiguous(), x.contiguous(), dm, len(x), scale, *numbers)
        with torch.cuda.device_of(x):
            _memory_kernel[*grid, triton.cdiv(blocks, steps)](*held, _precision(), *kinds, block, steps)
    return dm


def expand(operands: Sequence[int], memory: Tensor) -> Tensor:
    """Return W without its scale, (out, in)."""
    numbers, kinds, grid = _told(operands)
    w = memory.new_empty(operands[1], operands[2])
    with torch.cuda.device_of(memory):
        _expand_kernel[grid](memory.contiguous(), w, *numbers, *kinds)
    return w


def scatter(operands: Sequence[int], source: Tensor) -> Tensor:
    """Return the gradient of the array (m,), float32, from that of W."""
    numbers, kinds, grid = _told(operands)
    dm = torch.zeros(operands[0], dtype=torch.float32, device=source.device)
    with torch.cuda.device_of(source):
        _scatter_kernel[grid](source.contiguous(), dm, *numbers, *kinds)
    return dm


def _told(operands: Sequence[int]) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[int, int]]:
    """Return the numbers of a map, what kernels are compiled for, and its grid of tiles."""
    size, rows, columns, high, wide, state, signed, by_columns = operands
    kinds = (bool(signed), high, wide, bool(by_columns))
    return (size, rows, columns, state), kinds, (triton.cdiv(rows, high), triton.cdiv(columns, wide))


def _block(rows: int) -> int:
    """Return how many rows of the input a program takes; a product of matrices takes no fewer than 16."""
    return min(_MOST_ROWS, max(16, triton.next_power_of_2(rows)))


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
