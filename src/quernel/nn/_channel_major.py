"""The layout that channel-major kernels hand to each other: contiguous pixels, channels well placed in the cache.

The channels of an image lie an odd number of cache lines apart, the first at the beginning of one, so that no load
straddles two lines and the channels spread over all sets of the cache. It is an ordinary strided tensor of shape
(N, C, H, W): any operation of torch reads it; it is not contiguous where the pixels of a channel do not happen to fill
an odd number of lines, so ``view`` must not merge channels with pixels (``reshape`` and ``flatten`` may).
"""

from __future__ import annotations

import torch
from torch import Tensor

LINE = 16  # floats of a cache line


def empty_planes(x: Tensor, channels: int, height: int, width: int, aligned: bool) -> Tensor:
    """Return an empty output for a batch like ``x``, contiguous or aligned."""
    shape = (x.shape[0], channels, height, width)
    if not aligned:
        return x.new_empty(shape)
    step = aligned_step(height * width)
    return x.new_empty_strided(shape, (channels * step, step, width, 1))


def aligned_step(pixels: int) -> int:
    """Return how many floats apart the channels of an aligned tensor are."""
    lines = (pixels + LINE - 1) // LINE
    return (lines + 1 - lines % 2) * LINE  # no "lines | 1": sizes of an exported graph know no bits


def aligned_copy(x: Tensor) -> Tensor:
    """Return the same values in the aligned layout; x: (N, C, H, W)."""
    return empty_planes(x, x.shape[1], x.shape[2], x.shape[3], aligned=True).copy_(x)


def has_planes(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Say whether the pixels of each channel are contiguous, in a tensor (N, C, H, W)."""
    _, _, height, width = shape
    _, _, rows, columns = strides
    return (columns == 1 or width == 1) and (rows == width or height == 1)


def is_aligned(shape: torch.Size, strides: tuple[int, ...], address: int) -> bool:
    """Say whether channels begin at cache lines, an odd number of lines apart; ``has_planes`` is asked before."""
    if address % (4 * LINE):
        return False
    odd = strides[1] % (2 * LINE) == LINE or shape[1] == 1
    return odd and (strides[0] % LINE == 0 or shape[0] == 1)
