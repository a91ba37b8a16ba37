"""Slots and signs of a ``TileMap`` in torch's own operations, for devices and maps without compiled passes.

Bit for bit the map of ``quernel.hashing.TileMap``. An index of the whole matrix is built and dropped on every call:
right everywhere, and slow. The hash is that of ``_block_plain``, in signed arithmetic.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quernel.hashing.block_map import SIGNS
from quernel.nn._block_plain import fastrange_of, mix

# Sides of tiles that the Triton kernels take.
SIDES = (16, 32, 64, 128)


def slots(operands: Sequence[int], starts: Tensor | None, device: torch.device) -> Tensor:
    """Return the slot of every number of W, int64 (out, in)."""
    size, _, _, high, wide, state, _, _ = operands
    a, b, place = _places(operands, device)
    if starts is None:
        begins = fastrange_of(mix(mix(state, a), b), size - high * wide + 1)
    else:
        begins = starts.to(device)[a, b]
    return begins + place


def signs(operands: Sequence[int], flips: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the sign of every number of W, +1 or -1, (out, in)."""
    _, rows, columns, high, wide, state, signed, _ = operands
    if flips is not None:
        return flips.to(device, dtype)
    if not signed:
        return torch.ones(rows, columns, dtype=dtype, device=device)
    a, b, place = _places(operands, device)
    position = (a * -(-columns // wide) + b) * high * wide + place
    bits = mix(mix(state, position >> 6), SIGNS) >> (position & 63)
    return (1 - 2 * (bits & 1)).to(dtype)


def expand(operands: Sequence[int], starts: Tensor | None, flips: Tensor | None, memory: Tensor) -> Tensor:
    """Return W without its scale."""
    index = slots(operands, starts, memory.device)
    return memory[index] * signs(operands, flips, memory.dtype, memory.device)


def scatter(operands: Sequence[int], starts: Tensor | None, flips: Tensor | None, source: Tensor) -> Tensor:
    """Return the gradient of the array from that of W, in at least float32."""
    wide = torch.promote_types(source.dtype, torch.float32)
    signed = source.to(wide) * signs(operands, flips, wide, source.device)
    total = signed.new_zeros(operands[0])
    return total.index_add_(0, slots(operands, starts, source.device).flatten(), signed.flatten())


def _places(operands: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return tile row, tile column and place within the tile of every number; they broadcast to (out, in)."""
    _, rows, columns, high, wide, _, _, by_columns = operands
    n, k = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    a, b = n // high, k // wide
    i, j = n - a * high, k - b * wide
    return a, b, (j * high + i if by_columns else i * wide + j)


def fused(operands: Sequence[int], starts: Tensor | None, flips: Tensor | None, *tensors: Tensor) -> Any:
    """Return the Triton kernels if they are there and made for this map and these tensors, else None."""
    known = starts is None and flips is None and operands[3] in SIDES and operands[4] in SIDES
    if not known or not all(t.is_cuda for t in tensors) or importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("quernel.nn._tile_triton")
    return kernels if kernels.takes(operands, *tensors) else None
