"""Tensors in, tensors out around the kernels of ``_one_way_kernels`` and ``_one_way_backward``: packing and threads."""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._threads import parallel_ranges, workspace
from quernel.nn._one_way_backward import backward_rows, backward_sizes
from quernel.nn._one_way_kernels import Shape, convolve_rows, forward_scratch

# Multiply-adds below which a second thread costs more than it saves.
GRAIN = 2_000_000
LAST = torch.channels_last


def run_forward(x: Tensor, a: Tensor, d: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """Return the output, channels last, of float32 operands that fit ``shape``."""
    size = (len(x), shape.outputs, shape.out_height, shape.out_width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=LAST)
    # The names keep the memory behind the addresses alive.
    source, (columns, taps) = x.contiguous(memory_format=LAST), _packed(a, d, shape)
    offset = x.new_zeros(shape.padded_outputs) if bias is None else _whole_vectors(bias, shape.padded_outputs)
    addresses = [t.data_ptr() for t in (source, columns, taps, offset, out)]

    def rows(first: int, last: int) -> None:
        scratch = workspace("pointwise_depthwise", forward_scratch(shape), torch.float32)
        convolve_rows(*addresses, scratch.data_ptr(), shape, first, last)

    parallel_ranges(rows, size[0] * size[2], grain=_grain(shape, 1))
    return out


def run_backward(
    grad: Tensor, x: Tensor, a: Tensor, d: Tensor, shape: Shape, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty unless needed), a and d."""
    outputs, rank, inputs = a.shape
    ring, width, floats = backward_sizes(shape)
    x_grad = torch.empty_like(x, memory_format=LAST) if needs_x else x.new_empty(0)
    source, output = x.contiguous(memory_format=LAST), grad.contiguous(memory_format=LAST)
    columns, taps = _packed(a, d, shape)
    a_rows = x.new_zeros(rank, shape.padded_outputs, shape.padded_inputs)
    a_rows[:, :outputs, :inputs] = a.transpose(0, 1)
    addresses = [t.data_ptr() for t in (output, source, columns, a_rows, taps)] + [x_grad.data_ptr() if needs_x else 0]
    parts: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(first: int, last: int) -> None:
        part = parts[first] = torch.zeros_like(a_rows), torch.zeros_like(taps)
        scratch = workspace("pointwise_depthwise", floats, torch.float32)
        written = (part[0].data_ptr(), part[1].data_ptr(), scratch.data_ptr())
        backward_rows(*addresses, *written, shape, ring, width, first, last)

    parallel_ranges(rows, x.shape[0] * x.shape[2], grain=_grain(shape, 4))
    # In the order of the rows, whichever thread was first.
    ordered = [parts[first] for first in sorted(parts)]
    a_grad, d_grad = (torch.stack(of).sum(0) for of in zip(*ordered, strict=True))
    return (
        x_grad,
        a_grad[:, :outputs, :inputs].transpose(0, 1).contiguous(),
        d_grad[..., :outputs].permute(3, 0, 1, 2).contiguous(),
    )


def _packed(a: Tensor, d: Tensor, s: Shape) -> tuple[Tensor, Tensor]:
    """Return (inputs, rank, padded outputs) and (rank, kernel height, kernel width, padded outputs)."""
    return _whole_vectors(a.permute(2, 1, 0), s.padded_outputs), _whole_vectors(d.permute(1, 2, 3, 0), s.padded_outputs)


def _whole_vectors(tensor: Tensor, padded: int) -> Tensor:
    if tensor.shape[-1] == padded:
        return tensor.contiguous()
    wide = tensor.new_zeros((*tensor.shape[:-1], padded))
    wide[..., : tensor.shape[-1]] = tensor
    return wide


def _grain(s: Shape, passes: int) -> int:
    row = s.rank * s.padded_outputs * (s.inputs * s.width + s.kernel_height * s.kernel_width * s.out_width)
    return max(1, GRAIN // (passes * row))
