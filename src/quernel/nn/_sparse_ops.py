"""Custom ops of the sparse layers: ``quernel::sparse_conv1x1`` and ``quernel::sparse_linear``.

Both compute ``clamp(W x + bias, low, high)`` with W in the storage of ``SparseWeight``. float32 is computed as it is,
other floats pass through float32. Where there is no kernel (other devices) the dense weight does the work.
"""

from __future__ import annotations

import functools
import struct
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._threads import workspace
from quernel.nn import _spmm, _token_strips
from quernel.nn._channel_major import empty_planes, has_planes, is_aligned
from quernel.nn._native_ranges import parts_for, run_ranges

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Multiply-adds below which a second thread costs more than it saves.
GRAIN = 2**18
# A layer whose inputs and outputs leave the second cache fetches the next strip ahead.
NEAR_BYTES = 2**20
NO_LIMITS = (float("-inf"), float("inf"))


class Sparse(NamedTuple):
    """The operands of a sparse weight: tensors of ``SparseWeight``, its shape and block."""

    values: Tensor
    indices: Tensor
    pointers: Tensor
    outputs: int
    inputs: int
    block: int


def sparse_conv1x1(x: Tensor, weight: Sparse, bias: Tensor | None, low: float, high: float, aligned: bool) -> Tensor:
    """Return ``clamp(W x + bias, low, high)`` at every pixel; x: (N, C_in, H, W)."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Clamped.apply(_conv, x, bias, low, high, (*weight, aligned))  # type: ignore[no-untyped-call]
    return _conv(x, bias, low, high, *weight, aligned)


def sparse_linear(x: Tensor, weight: Sparse, bias: Tensor | None, low: float, high: float) -> Tensor:
    """Return ``clamp(x @ W.T + bias, low, high)``; x: (..., in)."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Clamped.apply(_linear, x, bias, low, high, (*weight,))  # type: ignore[no-untyped-call]
    return _linear(x, bias, low, high, *weight)


def dense_weight(values: Tensor, indices: Tensor, pointers: Tensor, outputs: int, inputs: int, block: int) -> Tensor:
    """Return the weight as a matrix, shape (outputs, inputs)."""
    groups = outputs // block
    counts = pointers.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
    columns = indices.long() & 0xFFFF
    shared = int(pointers[groups])
    dense = values.new_zeros(outputs, inputs)
    grouped = values[: shared * block].view(shared, block)
    for b in range(block):
        dense[rows[:shared] * block + b, columns[:shared]] = grouped[:, b]
    dense[rows[shared:] + groups * (block - 1), columns[shared:]] = values[shared * block :]
    return dense


def _compute_conv(
    x: Tensor, bias: Tensor | None, low: float, high: float, values: Tensor, indices: Tensor, pointers: Tensor,
    outputs: int, inputs: int, block: int, aligned: bool,
) -> Tensor:  # fmt: skip
    _check(x, bias, values, outputs, inputs, axis=1)
    if x.dtype is not torch.float32:
        weight = (values, indices, pointers, outputs, inputs, block)
        return _compute_conv(x.float(), bias, low, high, *weight, aligned).to(x.dtype)
    shape = x.shape
    strides = x.stride()
    if not has_planes(shape, strides):
        x = x.contiguous()
        strides = x.stride()
    n, _, height, width = shape
    y = empty_planes(x, outputs, height, width, aligned)
    pixels, stored = height * width, outputs // block + outputs % block
    if n * pixels * stored == 0:
        return y
    # The names keep the memory behind the addresses alive.
    offset = zeros_of(outputs) if bias is None else vector_of(bias)
    out_strides, start = y.stride(), x.data_ptr()
    strips = -(-pixels // _spmm.STRIP)
    items = n * strips
    parts = parts_for(items * stored, n * pixels * values.numel(), GRAIN)
    # Few strips are split by rows as well, so that all threads have alike to do.
    split = 1 if parts == 1 or items % parts == 0 or items >= 4 * parts else min(parts, stored)
    room, scratch = 0, start
    copied = not is_aligned(shape, strides, start)
    if copied:
        room = 4 * inputs * _spmm.STRIP + 64
        scratch = workspace("sparse strips", parts * room, torch.int8).data_ptr()
    far = 4 * pixels * (inputs + outputs) > NEAR_BYTES
    fields = (
        *(start, 4 * strides[0], 4 * strides[1], int(copied)),
        *(values.data_ptr(), indices.data_ptr(), pointers.data_ptr(), offset.data_ptr(), bits_of(low), bits_of(high)),
        *(y.data_ptr(), 4 * out_strides[0], 4 * out_strides[1]),
        *(inputs, outputs, block, pixels, strips, split, -(-inputs // stored) if far else 0),
        *(scratch, room, _spmm.rows(block), _spmm.rows(1)),
    )
    run_ranges(_spmm.strips(), fields, items * split, parts)
    return y


def _compute_linear(
    x: Tensor, bias: Tensor | None, low: float, high: float, values: Tensor, indices: Tensor, pointers: Tensor,
    outputs: int, inputs: int, block: int,
) -> Tensor:  # fmt: skip
    _check(x, bias, values, outputs, inputs, axis=-1)
    if x.dtype is not torch.float32:
        weight = (values, indices, pointers, outputs, inputs, block)
        return _compute_linear(x.float(), bias, low, high, *weight).to(x.dtype)
    x = x if x.is_contiguous() else x.contiguous()
    y = x.new_empty((*x.shape[:-1], outputs))
    if not y.numel():
        return y
    offset = zeros_of(outputs) if bias is None else vector_of(bias)
    tokens = y.numel() // outputs
    strips = -(-tokens // _spmm.STRIP)
    stored = outputs // block + outputs % block
    parts = parts_for(strips * stored, tokens * values.numel(), GRAIN)
    split = 1 if parts == 1 or strips % parts == 0 or strips >= 4 * parts else min(parts, stored)
    room = _token_strips.room(inputs, outputs)
    scratch = workspace("sparse tokens", parts * room, torch.int8)
    fields = (
        *(x.data_ptr(), 0, 4 * inputs, 1),
        *(values.data_ptr(), indices.data_ptr(), pointers.data_ptr(), offset.data_ptr(), bits_of(low), bits_of(high)),
        *(y.data_ptr(), 4 * outputs, 4 * _spmm.STRIP),
        *(inputs, outputs, block, tokens, strips, split, 0),
        *(scratch.data_ptr(), room, _spmm.rows(block), _spmm.rows(1)),
    )
    run_ranges(_token_strips.strips(), fields, strips * split, parts)
    return y


def _plain_conv(
    x: Tensor, bias: Tensor | None, low: float, high: float, values: Tensor, indices: Tensor, pointers: Tensor,
    outputs: int, inputs: int, block: int, aligned: bool,
) -> Tensor:  # fmt: skip
    _check(x, bias, values, outputs, inputs, axis=1)
    dense = dense_weight(values, indices, pointers, outputs, inputs, block).to(x.dtype)
    y = F.conv2d(x, dense[:, :, None, None], None if bias is None else bias.to(x.dtype)).clamp(low, high)
    return empty_planes(x, outputs, x.shape[2], x.shape[3], aligned).copy_(y)


def _plain_linear(
    x: Tensor, bias: Tensor | None, low: float, high: float, values: Tensor, indices: Tensor, pointers: Tensor,
    outputs: int, inputs: int, block: int,
) -> Tensor:  # fmt: skip
    _check(x, bias, values, outputs, inputs, axis=-1)
    dense = dense_weight(values, indices, pointers, outputs, inputs, block).to(x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype)).clamp(low, high)


def _check(x: Tensor, bias: Tensor | None, values: Tensor, outputs: int, inputs: int, axis: int) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    shape = x.shape
    if (axis == 1 and len(shape) != 4) or not shape or shape[axis] != inputs or x.dtype not in FLOATS:
        wanted = f"(N, {inputs}, H, W)" if axis == 1 else f"(..., {inputs})"
        raise QuernelError(
            f"x must be floating of shape {wanted} to fit a weight of shape ({outputs}, {inputs}); "
            f"got {x.dtype} of shape {tuple(shape)}"
        )
    if x.device != values.device:
        raise QuernelError(f"x must be on the device of the weight, {values.device}; got {x.device}")


def vector_of(bias: Tensor) -> Tensor:
    fits = bias.dtype is torch.float32 and bias.is_contiguous()
    return bias if fits else bias.to(torch.float32).contiguous()


@functools.lru_cache(maxsize=64)
def zeros_of(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float32, device="cpu")


@functools.lru_cache(maxsize=64)
def bits_of(number: float) -> int:
    return int.from_bytes(struct.pack("=f", number), sys.byteorder, signed=True)


class _Clamped(torch.autograd.Function):
    """Gradients to ``x`` and the bias through the dense weight; the sparse weight itself is a constant."""

    @staticmethod
    def forward(ctx: Any, op: Any, x: Tensor, bias: Tensor | None, low: float, high: float, rest: Any) -> Tensor:
        y: Tensor = op(x, bias, low, high, *rest)
        clamped = (low, high) != NO_LIMITS
        ctx.save_for_backward(y if clamped else None, *rest[:3])
        ctx.limits, ctx.sizes, ctx.is_conv, ctx.bias = (low, high), rest[3:6], op is _conv, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        y, *tensors = ctx.saved_tensors
        low, high = ctx.limits
        g = grads[0]
        g = g if y is None else g * ((y > low) & (y < high))
        dense = dense_weight(*tensors, *ctx.sizes).to(g.dtype)
        if ctx.is_conv:
            x_grad = F.conv2d(g, dense.t()[:, :, None, None]) if ctx.needs_input_grad[1] else None
            bias_grad = g.sum((0, 2, 3)) if ctx.bias else None
        else:
            x_grad = g @ dense if ctx.needs_input_grad[1] else None
            bias_grad = g.reshape(-1, g.shape[-1]).sum(0) if ctx.bias else None
        return None, x_grad, bias_grad, None, None, None


# The low-level interface: an op made by torch.library.custom_op costs 10 us a call here, this one 2.5 us.
_library = torch.library.Library("quernel", "FRAGMENT")
_weight = "Tensor values, Tensor indices, Tensor pointers, int outputs, int inputs, int block"
_clamped = "Tensor x, Tensor? bias, float low, float high"
for _name, _more in (("sparse_conv1x1", ", bool aligned"), ("sparse_linear", "")):
    _library.define(f"{_name}({_clamped}, {_weight}{_more}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("sparse_conv1x1", _compute_conv, "CPU")
_library.impl("sparse_conv1x1", _plain_conv, "CUDA")
_library.impl("sparse_linear", _compute_linear, "CPU")
_library.impl("sparse_linear", _plain_linear, "CUDA")
_conv = torch.ops.quernel.sparse_conv1x1.default
_linear = torch.ops.quernel.sparse_linear.default


@torch.library.register_fake("quernel::sparse_conv1x1", lib=_library)
def _fake_conv(
    x: Tensor, bias: Tensor | None, low: float, high: float, values: Tensor, indices: Tensor, pointers: Tensor,
    outputs: int, inputs: int, block: int, aligned: bool,
) -> Tensor:  # fmt: skip
    _check(x, bias, values, outputs, inputs, axis=1)
    return empty_planes(x, outputs, x.shape[2], x.shape[3], aligned)


@torch.library.register_fake("quernel::sparse_linear", lib=_library)
def _fake_linear(
    x: Tensor, bias: Tensor | None, low: float, high: float, values: Tensor, indices: Tensor, pointers: Tensor,
    outputs: int, inputs: int, block: int,
) -> Tensor:  # fmt: skip
    _check(x, bias, values, outputs, inputs, axis=-1)
    return x.new_empty((*x.shape[:-1], outputs))


def _warmup() -> None:
    """Compile the kernels of every block size; ``quernel warmup`` calls it."""
    for block in _spmm.BLOCKS:
        pointers = torch.tensor([0, 1], dtype=torch.int32)
        weight = Sparse(torch.ones(block), torch.zeros(1, dtype=torch.int16), pointers, block, 1, block)
        sparse_conv1x1(torch.ones(1, 1, 2, 2), weight, None, *NO_LIMITS, aligned=False)
        sparse_linear(torch.ones(1, 1), weight, None, *NO_LIMITS)
