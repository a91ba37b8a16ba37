"""Slots and signs of a ``TileMap`` in torch's own operations, for devices without compiled passes.

Bit for bit the map of ``quernel.hashing.TileMap``. An index of the whole matrix is built and dropped on every call:
right everywhere, and slow. 64-bit arithmetic wraps around in int64 as it does in uint64; only shifts need care.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quernel.hashing.block_map import SIGNS

_LOW = 2**32 - 1


def slots(operands: Sequence[int], starts: Tensor | None, device: torch.device) -> Tensor:
    """Return the slot of every number of W, int64 (out, in); arrays of at most 2^32 starts."""
    size, _, _, high, wide, state, _, _ = operands
    a, b, place = _places(operands, device)
    if starts is None:
        h = _step(_step(state, a), b)
        n = size - high * wide + 1
        begins = _shifted(_shifted(h, 32) * n + _shifted((h & _LOW) * n, 32), 32)
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
    bits = _step(_step(state, position >> 6), SIGNS) >> (position & 63)
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


def _step(state: Tensor | int, key: Tensor | int) -> Tensor:
    """Return ``mix64_step``."""
    z = torch.as_tensor(state) + key + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift right, zeros coming in."""
    return (z >> by) & (2 ** (64 - by) - 1)
