"""Custom op ``quernel::depthwise_conv2d``: clamp(conv(x) + bias, low, high), 3x3 or 5x5, channel-major.

Padding is half the kernel, stride 1 or 2.  float32 is computed as it is, other floats pass through float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import _depthwise_kernels
from quernel.nn._channel_major import empty_planes, has_planes
from quernel.nn._native_ranges import parts_for, run_ranges
from quernel.nn._sparse_ops import FLOATS, NO_LIMITS, bits_of, vector_of, zeros_of

# Multiply-adds below which a second thread costs more than it saves.
GRAIN = 2**17


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: float, high: float, stride: int, aligned: bool
) -> Tensor:
    """Return the filtered planes; x: (N, C, H, W), weight: (C, 1, k, k)."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Clamped.apply(x, weight, bias, low, high, stride, aligned)  # type: ignore[no-untyped-call]
    return _op(x, weight, bias, low, high, stride, aligned)


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: float, high: float, stride: int, aligned: bool
) -> Tensor:
    _check(x, weight, bias, stride)
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return _compute(x.float(), weight.float(), bias, low, high, stride, aligned).to(x.dtype)
    if not has_planes(x.shape, x.stride()):
        x = x.contiguous()
    weight = weight if weight.is_contiguous() else weight.contiguous()
    n, channels, height, width = x.shape
    out_height, out_width, size = -(-height // stride), -(-width // stride), weight.shape[2]
    y = empty_planes(x, channels, out_height, out_width, aligned)
    if n * channels * height * width == 0:
        return y
    # The names keep the memory behind the addresses alive.
    offset = zeros_of(channels) if bias is None else vector_of(bias)
    masks = _depthwise_kernels.border_masks(size, stride, height, width)
    strides, out_strides, planes = x.stride(), y.stride(), n * channels
    fields = (
        *(x.data_ptr(), 4 * strides[0], 4 * strides[1], weight.data_ptr(), offset.data_ptr()),
        *(bits_of(low), bits_of(high), y.data_ptr(), 4 * out_strides[0], 4 * out_strides[1]),
        *(channels, size * size, height, width, out_height, out_width, masks.data_ptr()),
        _depthwise_kernels.channel(size, stride),
    )
    parts = parts_for(planes, planes * out_height * out_width * size * size, GRAIN)
    run_ranges(_depthwise_kernels.planes(), fields, planes, parts)
    return y


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: float, high: float, stride: int, aligned: bool
) -> Tensor:
    _check(x, weight, bias, stride)
    channels, half = x.shape[1], weight.shape[2] // 2
    offset = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), offset, stride, half, groups=channels).clamp(low, high)
    return empty_planes(x, channels, y.shape[2], y.shape[3], aligned).copy_(y)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    channels, one, size, other = weight.shape if weight.ndim == 4 else (0, 0, 0, 1)
    if one != 1 or size != other or size not in _depthwise_kernels.SIZES or stride not in _depthwise_kernels.STRIDES:
        raise QuernelError(
            f"weight must have shape (C, 1, 3, 3) or (C, 1, 5, 5) and stride be 1 or 2; got {tuple(weight.shape)} "
            f"and stride {stride}. Use torch.nn.Conv2d for other kernels"
        )
    if x.ndim != 4 or x.shape[1] != channels or x.dtype not in FLOATS:
        raise QuernelError(
            f"x must be floating of shape (N, {channels}, H, W) to fit weight {tuple(weight.shape)}; "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise QuernelError(f"bias must have shape ({channels},); got {tuple(bias.shape)}")


class _Clamped(torch.autograd.Function):
    """Gradients of torch's convolution, none where the output is at a limit."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, low, high, stride, _ = arguments
        y: Tensor = _op(*arguments)
        ctx.save_for_backward(x, weight, y if (low, high) != NO_LIMITS else None)
        ctx.limits, ctx.stride, ctx.bias = (low, high), stride, bias
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, weight, y = ctx.saved_tensors
        low, high = ctx.limits
        g = grads[0] if y is None else grads[0] * ((y > low) & (y < high))
        half, stride = weight.shape[2] // 2, ctx.stride
        sizes = None if ctx.bias is None else [len(weight)]
        wanted = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.bias is not None]
        geometry = ([stride, stride], [half, half], [1, 1], False, [0, 0], len(weight))
        found = torch.ops.aten.convolution_backward(
            g.contiguous(), x.contiguous(), weight.to(x.dtype), sizes, *geometry, wanted
        )
        return *found, None, None, None, None


# The low-level interface: an op made by torch.library.custom_op costs 10 us a call here, this one 2.5 us.
_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, "
    "float low, float high, int stride, bool aligned) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("depthwise_conv2d", _compute, "CPU")
_library.impl("depthwise_conv2d", _plain, "CUDA")
_op = torch.ops.quernel.depthwise_conv2d.default


@torch.library.register_fake("quernel::depthwise_conv2d", lib=_library)
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: float, high: float, stride: int, aligned: bool
) -> Tensor:
    _check(x, weight, bias, stride)
    height, width = (-(-size // stride) for size in x.shape[2:])
    return empty_planes(x, x.shape[1], height, width, aligned)


def _warmup() -> None:
    """Compile the kernels of every size and stride; ``quernel warmup`` calls it."""
    for size in _depthwise_kernels.SIZES:
        for stride in _depthwise_kernels.STRIDES:
            _compute(torch.ones(1, 1, 2, 2), torch.ones(1, 1, size, size), None, *NO_LIMITS, stride, False)
