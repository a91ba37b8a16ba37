"""The sparse micro-kernels on raw memory: they write their pixels and nothing else, and read only what is theirs."""

import functools

import numpy as np
import pytest
import torch

from quernel.nn import _native_ranges, _spmm
from quernel.nn.weights import SparseWeight

CANARY = 12345.0
# Sums of nine products.
ATOL = 1e-5


def run(weight, x, y, pixels, *, images=1, x_steps, y_steps, copied, row_parts=1, ahead=0):
    """Call the C function over all strips; ``*_steps``: floats from image to image and from channel to channel."""
    values, indices, pointers, outputs, inputs, block = weight.operands()
    bias = torch.zeros(outputs)
    strips = -(-pixels // _spmm.STRIP)
    scratch = torch.empty(inputs * 4 * _spmm.STRIP + 64, dtype=torch.int8)
    low, high = (int(np.float32(limit).view(np.int32)) for limit in (-np.inf, np.inf))
    places = {name: tensor.data_ptr() for name, tensor in locals().items() if isinstance(tensor, torch.Tensor)}
    numbers = {
        **places, "out": y.data_ptr(), "low": low, "high": high, "copied": int(copied), "inputs": inputs,
        "outputs": outputs, "block": block, "pixels": pixels, "strips": strips, "row_parts": row_parts,
        "ahead_each": ahead, "room": scratch.numel(), "rows": _spmm.rows(block), "single_rows": _spmm.rows(1),
        "x_image": 4 * x_steps[0], "x_channel": 4 * x_steps[1], "out_image": 4 * y_steps[0],
        "out_channel": 4 * y_steps[1],
    }  # fmt: skip
    fields = tuple(numbers[name] for name in _spmm.FIELDS)
    _native_ranges.run_ranges(_spmm.strips(), fields, images * strips * row_parts, 1)


@functools.cache
def weight(block):
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(11, 9, generator=g) * (torch.rand(11, 9, generator=g) < 0.4)
    return SparseWeight.from_dense(dense, block)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 33, 64, 100, 200])
@pytest.mark.parametrize("copied", [False, True])
def test_writes_its_pixels_and_nothing_else(block, pixels, copied):
    step = 16 * (-(-pixels // 16) + 2)
    x = torch.full((2, 9, step), float("nan"))
    x[:, :, :pixels] = torch.randn(2, 9, pixels)
    y = torch.full((2, 11, step), CANARY)
    run(weight(block), x, y, pixels, images=2, x_steps=(9 * step, step), y_steps=(11 * step, step), copied=copied)
    assert bool((y[:, :, pixels:] == CANARY).all())
    torch.testing.assert_close(y[:, :, :pixels], weight(block).dense() @ x[:, :, :pixels], rtol=0, atol=ATOL)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_row_parts_and_prefetching_change_nothing(block):
    pixels, step = 200, 208
    x, results = torch.randn(9, step), []
    for row_parts, ahead in ((1, 0), (3, 0), (1, 1), (2, 4)):
        y = torch.full((11, step), CANARY)
        steps = {"x_steps": (0, step), "y_steps": (0, step)}
        run(weight(block), x, y, pixels, **steps, copied=False, row_parts=row_parts, ahead=ahead)
        results.append(y)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_reads_unaligned_memory_only_by_copying():
    memory = torch.randn(9 * 50 + 3)
    x = memory[3:].view(9, 50)
    y = torch.full((11 * 50 + 16,), CANARY)
    run(weight(1), x, y, 50, x_steps=(0, 50), y_steps=(0, 50), copied=True)
    assert bool((y[550:] == CANARY).all())
    torch.testing.assert_close(y[:550].view(11, 50), weight(1).dense() @ x, rtol=0, atol=ATOL)
