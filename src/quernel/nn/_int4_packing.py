"""The order of 4-bit codes in memory: planes of 128 inputs, rows in blocks of four.

A chunk is 128 consecutive inputs of a row in 64 bytes: byte b holds input b in its low nibble and input 64 + b in its
high one, so that one 64-byte load gives two operands with an AND and a shift.  The bytes lie as
(blocks of rows, chunks, ROWS, 64): a kernel of ROWS rows reads one sequential stream; from row-major storage it would
read four far-apart ones, 1.2 to 1.8 times slower once a matrix outgrows the cache.  Padding is code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError

ROWS = 4
CHUNK = 128
PLANE = CHUNK // 2
# Inputs that may share a scale.
GROUP_SIZES = (32, 64, 128)


def padded(n: int, multiple: int) -> int:
    """Return the least multiple of ``multiple`` that is no less than ``n``."""
    return -(-n // multiple) * multiple


def packed_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return the shape of the packed codes of a (rows, columns) matrix."""
    return -(-rows // ROWS), -(-columns // CHUNK), ROWS, PLANE


def pack(codes: Tensor) -> Tensor:  # (rows, columns) uint8 -> packed_shape uint8
    """Pack codes in 0..15.

    Raises
    ------
    QuernelError
        If the codes are no uint8 matrix, or leave 0..15.
    """
    if codes.ndim != 2 or codes.dtype is not torch.uint8:
        raise QuernelError(f"codes must be uint8 of shape (rows, columns); got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) > 15:
        raise QuernelError(f"codes must lie in 0..15 to fit 4 bits; got {int(codes.max())}")
    rows, columns = codes.shape
    blocks, chunks, _, _ = packed_shape(rows, columns)
    whole = codes.new_zeros(blocks * ROWS, chunks * CHUNK)
    whole[:rows, :columns] = codes
    low, high = whole.view(blocks, ROWS, chunks, 2, PLANE).unbind(3)  # (blocks, ROWS, chunks, PLANE)
    return (low | high << 4).transpose(1, 2).contiguous()


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:  # packed_shape uint8 -> (rows, columns) uint8
    """Return the codes that ``pack`` took."""
    return unpack_rows(packed.transpose(1, 2).flatten(0, 1)[:rows], columns)


def unpack_rows(planes: Tensor, columns: int) -> Tensor:  # (n, chunks, PLANE) uint8 -> (n, columns) uint8
    """Return the codes of single rows, ``packed[row // ROWS, :, row % ROWS]``."""
    # A shift of bytes becomes an invalid graph on its way to ONNX; a division is slower.
    high = planes // 16 if torch.compiler.is_compiling() else planes >> 4
    return torch.stack([planes & 15, high], dim=2).flatten(1)[:, :columns].contiguous()
