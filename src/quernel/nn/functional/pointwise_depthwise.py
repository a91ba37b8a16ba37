"""``pointwise_depthwise_conv2d``: a 1x1 convolution and a depthwise one as one operation, in rank R.

    y[n, o] = bias[o] + sum_r  d[o, r] * (sum_i a[o, r, i] x[n, i])          ``*`` is a 2-D cross-correlation

This is the convolution with the kernel K[o, i] = sum_r a[o, r, i] d[o, r], which is never formed.  On processors with
AVX-512 the rows between the two steps stay in the cache; the backward pass keeps x alone and computes them again.
Custom ops ``quernel::pointwise_depthwise`` and its backward; channels last throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from quernel._errors import QuernelError
from quernel._intrinsics import LANES, portable
from quernel.nn._one_way_kernels import Shape
from quernel.nn._one_way_run import run_backward, run_forward

# Floats of the middle that the backward pass holds at a time: more would be faulted in anew on every call.
CHUNK = 2**18
LAST = torch.channels_last


def pointwise_depthwise_conv2d(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Mix channels, then filter each one, summed over R pairs of the two.

    Parameters
    ----------
    x : Tensor, shape (N, C_in, H, W)
        Best in ``torch.channels_last``; anything else is copied to it.
    a : Tensor, shape (C_out, R, C_in)
        The 1x1 convolutions.
    d : Tensor, shape (C_out, R, kernel_height, kernel_width)
        The filters.
    bias : Tensor, shape (C_out,), optional
    stride, dilation : (int, int)
        As in ``torch.nn.functional.conv2d``.
    padding : (int, int, int, int)
        Zeros at the top, the bottom, the left and the right.

    Returns
    -------
    y : Tensor, shape (N, C_out, H', W')
        In ``torch.channels_last``, dtype of ``x``.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit, or the kernel is larger than the padded input.

    Notes
    -----
    float32 on the CPU takes the fused kernel (no rounding differs from the order of sums); everything else runs as two
    convolutions.  Gradients reach ``x``, ``a``, ``d`` and ``bias``, once: a second derivative raises.

    Examples
    --------
    >>> import torch
    >>> x, a, d = torch.ones(1, 2, 4, 4), torch.ones(3, 1, 2), torch.ones(3, 1, 2, 2)
    >>> y = pointwise_depthwise_conv2d(x, a, d)
    >>> tuple(y.shape), float(y[0, 0, 0, 0])
    ((1, 3, 3, 3), 8.0)
    """
    return _op(x, a, d, bias, list(stride), list(padding), list(dilation))


def joined_convs(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Do the same by two plain convolutions of torch, with autograd's own gradients."""
    outputs, rank, inputs = a.shape
    z, symmetric = _padded(F.conv2d(x, a.reshape(outputs * rank, inputs, 1, 1)), padding)
    return F.conv2d(z, d, bias, stride, symmetric, dilation, groups=outputs)


def _padded(z: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """Return ``z`` and the padding that is left to a convolution, which knows symmetric ones only."""
    top, bottom, left, right = padding
    if (top, left) == (bottom, right):
        return z, (top, left)
    return F.pad(z, (left, right, top, bottom)), (0, 0)


def _compute(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = _check(x, a, d, bias, stride, padding, dilation)
    if not _fused(x, a, d):
        return _plain(x, a, d, bias, stride, padding, dilation)
    return run_forward(x, a, d, bias, _shape(x, a, d, size, stride, padding, dilation))


def _compute_gradients(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    d: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = _check(x, a, d, None, stride, padding, dilation)
    if list(grad.shape) != size or grad.dtype != x.dtype:
        raise QuernelError(f"grad must be {x.dtype} of shape {tuple(size)}; got {grad.dtype}, {tuple(grad.shape)}")
    if not _fused(x, a, d):
        return _plain_gradients(grad, x, a, d, stride, padding, dilation, needs_x)
    return run_backward(grad, x, a, d, _shape(x, a, d, size, stride, padding, dilation), needs_x)


def _fused(x: Tensor, a: Tensor, d: Tensor) -> bool:
    whole = x.numel() > 0 and a.numel() > 0 and d.numel() > 0
    return whole and x.dtype is torch.float32 and not portable()


def _shape(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Shape:
    outputs, rank, inputs = a.shape
    padded_inputs, padded_outputs = (-(-channels // LANES) * LANES for channels in (inputs, outputs))
    return Shape(
        height=x.shape[2],
        width=x.shape[3],
        out_height=size[2],
        out_width=size[3],
        inputs=inputs,
        outputs=outputs,
        padded_inputs=padded_inputs,
        padded_outputs=padded_outputs,
        rank=rank,
        kernel_height=d.shape[2],
        kernel_width=d.shape[3],
        stride_y=stride[0],
        stride_x=stride[1],
        dilation_y=dilation[0],
        dilation_x=dilation[1],
        top=padding[0],
        left=padding[2],
        row=padding[2] + x.shape[3] + padding[3],
    )


def _plain(x: Tensor, a: Tensor, d: Tensor, bias: Tensor | None, *geometry: Sequence[int]) -> Tensor:
    _check(x, a, d, bias, *geometry)
    return joined_convs(x.contiguous(memory_format=LAST), a, d, bias, *geometry).contiguous(memory_format=LAST)


def _plain_gradients(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    d: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty unless needed), a and d, some images at a time."""
    outputs, rank, inputs = a.shape
    channels = outputs * rank
    weight, filters = a.reshape(channels, inputs, 1, 1), d.reshape(channels, 1, *d.shape[2:])
    a_grad, d_grad = torch.zeros_like(weight), torch.zeros_like(filters)
    x_grad = torch.empty_like(x, memory_format=LAST) if needs_x else x.new_empty(0)
    images = max(1, CHUNK // max(1, channels * x.shape[2] * x.shape[3]))
    top, _, left, _ = padding
    for first in range(0, len(x), images):
        part = x[first : first + images].contiguous(memory_format=LAST)
        g = _repeated(grad[first : first + images], rank)
        z, symmetric = _padded(F.conv2d(part, weight), padding)
        z_grad, filter_grad, _ = torch.ops.aten.convolution_backward(
            g, z, filters, None, stride, symmetric, dilation, False, (0, 0), channels, (True, True, False)
        )
        if z.shape[2:] != x.shape[2:]:  # padded by hand
            z_grad = z_grad[:, :, top : top + x.shape[2], left : left + x.shape[3]].contiguous(memory_format=LAST)
        part_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            z_grad, part, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (needs_x, True, False)
        )
        a_grad += weight_grad
        d_grad += filter_grad
        if needs_x:
            x_grad[first : first + images] = part_grad
    return x_grad, a_grad.reshape(a.shape), d_grad.reshape(d.shape)


def _repeated(g: Tensor, rank: int) -> Tensor:
    """Return every channel ``rank`` times in a row, channels last."""
    pixels = g.permute(0, 2, 3, 1).unsqueeze(-1)
    return pixels.expand(*pixels.shape[:-1], rank).flatten(3).permute(0, 3, 1, 2).contiguous(memory_format=LAST)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Return the spatial size of a convolution's output; ``padding`` holds (low, high) of each dimension in a row."""
    whole = [n + low + high for n, low, high in zip(size, padding[::2], padding[1::2], strict=True)]
    reach = [step * (k - 1) + 1 for k, step in zip(kernel, dilation, strict=True)]
    if any(n < span for n, span in zip(whole, reach, strict=True)):
        raise QuernelError(
            f"Calculated padded input size per channel: ({' x '.join(map(str, whole))}). Kernel size: "
            f"({' x '.join(map(str, reach))}). Kernel size can't be greater than actual input size"
        )
    return [(n - span) // step + 1 for n, span, step in zip(whole, reach, stride, strict=True)]


def _check(
    x: Tensor,
    a: Tensor,
    d: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Raise unless the operands fit together (the kernel reads without bounds checks); return the output's shape."""
    if a.ndim != 3 or d.ndim != 4 or d.shape[:2] != a.shape[:2]:
        raise QuernelError(
            "a must be of shape (out, rank, in) and d of shape (out, rank, kernel height, kernel width); "
            f"got {tuple(a.shape)} and {tuple(d.shape)}"
        )
    outputs, _, inputs = a.shape
    if x.ndim != 4 or x.shape[1] != inputs:
        raise QuernelError(f"x must be of shape (N, {inputs}, H, W); got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise QuernelError(f"bias must be of shape ({outputs},); got {tuple(bias.shape)}")
    others = [t.dtype for t in (a, d, bias) if t is not None]
    if not x.is_floating_point() or any(dtype != x.dtype for dtype in others):
        raise QuernelError(f"x, a, d and bias must share one floating dtype; got {x.dtype}, {others}")
    if len(stride) != 2 or len(dilation) != 2 or len(padding) != 4 or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise QuernelError(
            "stride and dilation must be two positive numbers, padding four that are not negative; "
            f"got {tuple(stride)}, {tuple(dilation)}, {tuple(padding)}"
        )
    return [x.shape[0], outputs, *output_size(x.shape[2:], d.shape[2:], stride, padding, dilation)]


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "pointwise_depthwise(Tensor x, Tensor a, Tensor d, Tensor? bias, int[] stride, int[] padding, int[] dilation) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "pointwise_depthwise_backward(Tensor grad, Tensor x, Tensor a, Tensor d, int[] stride, int[] padding, "
    "int[] dilation, bool needs_x) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("pointwise_depthwise", _compute, "CPU")
_library.impl("pointwise_depthwise", _plain, "CUDA")
_library.impl("pointwise_depthwise_backward", _compute_gradients, "CPU")
_library.impl("pointwise_depthwise_backward", _plain_gradients, "CUDA")
_op = torch.ops.quernel.pointwise_depthwise.default
_backward_op = torch.ops.quernel.pointwise_depthwise_backward.default


@torch.library.register_fake("quernel::pointwise_depthwise", lib=_library)
def _fake(x: Tensor, a: Tensor, d: Tensor, bias: Tensor | None, *geometry: Sequence[int]) -> Tensor:
    size = _check(x, a, d, bias, *geometry)
    return x.new_empty(size).contiguous(memory_format=LAST)


@torch.library.register_fake("quernel::pointwise_depthwise_backward", lib=_library)
def _fake_gradients(grad: Tensor, x: Tensor, a: Tensor, d: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_grad = x.new_empty(x.shape).contiguous(memory_format=LAST) if options[-1] else x.new_empty(0)
    return x_grad, a.new_empty(a.shape), d.new_empty(d.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a, d, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, a, d)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, a, d = ctx.saved_tensors
    needs_x, needs_a, needs_d, needs_bias, *_ = ctx.needs_input_grad
    x_grad = a_grad = d_grad = None
    if needs_x or needs_a or needs_d:
        x_grad, a_grad, d_grad = _backward_op(grad, x, a, d, *ctx.geometry, needs_x)
    bias_grad = grad.sum((0, 2, 3)) if ctx.has_bias and needs_bias else None
    return x_grad if needs_x else None, a_grad, d_grad, bias_grad, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise QuernelError(
        "pointwise_depthwise_conv2d has no second derivative; use joined_convs, or memory_efficient=False in a layer"
    )


torch.library.register_autograd("quernel::pointwise_depthwise", _backward, setup_context=_remember, lib=_library)
torch.library.register_autograd("quernel::pointwise_depthwise_backward", _no_second_derivative, lib=_library)


@register_flop_formula([torch.ops.quernel.pointwise_depthwise])
def _flops(x: Any, a: Any, d: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    images, inputs, height, width = x
    outputs, rank, kernel_height, kernel_width = d
    pixels = out_shape[2] * out_shape[3]
    return 2 * images * outputs * rank * (height * width * inputs + pixels * kernel_height * kernel_width)


def _warmup() -> None:
    """Compile both kernels; ``quernel warmup`` calls it."""
    x, a, geometry = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), ((1, 1), (0, 0, 0, 0), (1, 1))
    _compute(x, a, x, None, *geometry)
    _compute_gradients(x, x, a, x, *geometry, True)
