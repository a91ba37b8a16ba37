"""Triton kernels of ``ska`` for GPUs: the filter, the gradient by the input, and that by the weights.

One program takes a block of pixels of one weight set of an image, and all channels that share the set: a weight is
loaded once for up to sixteen channels.  Strides of any layout; addresses are 64 bits wide, sums are float32.
Importing this file needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK, _MOST_RUNS, _MOST_SIZE = 128, 16, 7


def takes(*tensors: Tensor, size: int) -> bool:
    """Say whether the kernels are for such numbers; the rest is for torch's own operations."""
    return size <= _MOST_SIZE and all(t.dtype in _FLOATS for t in tensors)


@triton.jit
def _filter_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    sets: tl.tensor,
    runs: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    x_b: tl.tensor,
    x_c: tl.tensor,
    x_h: tl.tensor,
    x_w: tl.tensor,
    w_b: tl.tensor,
    w_g: tl.tensor,
    w_t: tl.tensor,
    w_h: tl.tensor,
    w_w: tl.tensor,
    y_b: tl.tensor,
    y_c: tl.tensor,
    y_h: tl.tensor,
    y_w: tl.tensor,
    SIZE: tl.constexpr,
    FLIPPED: tl.constexpr,
    RUNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum neighbours of x times weights: those of the place, or flipped, those where the neighbour stands."""
    blocks = tl.cdiv(height * width, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, g = program // blocks // sets, program // blocks % sets
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    i, j, there = pixel // width, pixel % width, pixel < height * width
    for chunk in range(CHUNKS):
        run = chunk * RUNS + tl.arange(0, RUNS)
        channel = g + run.to(tl.int64) * sets
        total = tl.zeros((RUNS, BLOCK), tl.float32)
        for t in tl.static_range(SIZE * SIZE):
            r, c = i + t // SIZE - SIZE // 2, j + t % SIZE - SIZE // 2
            inside = there & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            if FLIPPED:
                place = b * w_b + g * w_g + (SIZE * SIZE - 1 - t) * w_t + r * w_h + c * w_w
            else:
                place = b * w_b + g * w_g + t * w_t + i * w_h + j * w_w
            weight = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
            at = b * x_b + channel[:, None] * x_c + (r * x_h + c * x_w)[None, :]
            value = tl.load(x + at, mask=(run < runs)[:, None] & inside[None, :], other=0.0)
            total += value.to(tl.float32) * weight[None, :]
        at = b * y_b + channel[:, None] * y_c + (i * y_h + j * y_w)[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=(run < runs)[:, None] & there[None, :])


@triton.jit
def _weight_kernel(
    x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    sets: tl.tensor,
    runs: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    x_b: tl.tensor,
    x_c: tl.tensor,
    x_h: tl.tensor,
    x_w: tl.tensor,
    w_b: tl.tensor,
    w_g: tl.tensor,
    w_t: tl.tensor,
    w_h: tl.tensor,
    w_w: tl.tensor,
    y_b: tl.tensor,
    y_c: tl.tensor,
    y_h: tl.tensor,
    y_w: tl.tensor,
    SIZE: tl.constexpr,
    RUNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the gradients of the weights of a set, w, from those of the outputs, y."""
    blocks = tl.cdiv(height * width, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, g = program // blocks // sets, program // blocks % sets
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    i, j, there = pixel // width, pixel % width, pixel < height * width
    for t in tl.static_range(SIZE * SIZE):
        r, c = i + t // SIZE - SIZE // 2, j + t % SIZE - SIZE // 2
        inside = there & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        total = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(CHUNKS):
            run = chunk * RUNS + tl.arange(0, RUNS)
            channel = g + run.to(tl.int64) * sets
            known = (run < runs)[:, None] & inside[None, :]
            at = b * x_b + channel[:, None] * x_c + (r * x_h + c * x_w)[None, :]
            value = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
            at = b * y_b + channel[:, None] * y_c + (i * y_h + j * y_w)[None, :]
            total += tl.sum(value * tl.load(y + at, mask=known, other=0.0).to(tl.float32), 0)
        place = b * w_b + g * w_g + t * w_t + i * w_h + j * w_w
        tl.store(w + place, total.to(w.dtype.element_ty), mask=there)


def run(x: Tensor, w: Tensor, y: Tensor, *, flipped: bool = False, weighs: bool = False) -> None:
    """Write y, the filtered x, or where it weighs w, the gradient of the weights; any strides.

    ``flipped`` makes x the gradient of the outputs and y that of the input.
    """
    batch, channels, height, width = x.shape
    sets, size = w.shape[1], round(w.shape[2] ** 0.5)
    runs = channels // sets
    numbers = (sets, runs, height, width, *x.stride(), *w.stride(), *y.stride())
    together = min(_MOST_RUNS, triton.next_power_of_2(runs))
    kinds: dict[str, Any] = {"SIZE": size, "RUNS": together, "CHUNKS": triton.cdiv(runs, together), "BLOCK": _BLOCK}
    programs = batch * sets * triton.cdiv(height * width, _BLOCK)
    if not programs:
        return
    with torch.cuda.device_of(x):
        if weighs:
            _weight_kernel[(programs,)](x, w, y, *numbers, **kinds)
        else:
            _filter_kernel[(programs,)](x, w, y, *numbers, FLIPPED=flipped, **kinds)
