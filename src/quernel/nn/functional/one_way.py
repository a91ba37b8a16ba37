"""Convolutions by one-way filters: along the channels, then along each direction of space, summed over R such chains.

    K[o, i, y, x] = sum_r channel[o, r, i] * rows[o, r, y] * columns[o, r, x]           (rank R, CP format per filter)

C_out R (C_in + kh + kw) numbers stand for C_out C_in kh kw, and as many multiply-adds a pixel; K is never formed.  No
bias and nothing else stands between the steps, so zero padding commutes with them and the result is that of the dense
convolution.  Strides, paddings and dilations belong to the step of their direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quernel._errors import QuernelError
from quernel.nn.functional.pointwise_depthwise import joined_convs, output_size, pointwise_depthwise_conv2d

# From this many taps on, two one-way steps cost less than one filter of all of them.
MOST_TAPS = 49
_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def one_way_conv(
    x: Tensor,
    channel: Tensor,
    spatial: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    shared: bool = False,
    joined: bool | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Convolve with the kernel that the one-way filters stand for.

    Parameters
    ----------
    x : Tensor, shape (N, C_in, *size)
        1, 2 or 3 directions of space; ``torch.channels_last`` is fastest.
    channel : Tensor, shape (C_out, R, C_in)
        Filters along the channels.
    spatial : sequence of Tensor, each of shape (C_out, R, k)
        Filters along each direction; (C_in, R, k) if ``shared``.
    bias : Tensor, shape (C_out,), optional
    stride, dilation : sequence of int
        One a direction.
    padding : sequence of (int, int)
        Zeros before and after, one pair a direction.
    shared : bool, default=False
        Filter each input channel in space first and mix channels last: a smaller class of kernels,
        K[o, i, y, x] = sum_r channel[o, r, i] rows[i, r, y] columns[i, r, x].
    joined : bool, optional
        In 2-D, multiply rows and columns out into one filter of kh x kw and save a pass.  Default: where kh kw <= 49.
    memory_efficient : bool, default=False
        Keep only ``x`` for the backward pass and compute what lies between the steps again.

    Returns
    -------
    y : Tensor, shape (N, C_out, *size')

    Raises
    ------
    QuernelError
        If shapes do not fit, or the kernel is larger than the padded input.

    Notes
    -----
    Multiply-adds of the separate steps in 2-D, per image: C_out R (H W C_in + H' W kh + H' W' kw).

    Examples
    --------
    >>> import torch
    >>> x, ones = torch.ones(1, 2, 5, 5), torch.ones(3, 1, 3)
    >>> y = one_way_conv(x, torch.ones(3, 1, 2), [ones, ones], stride=(1, 1), padding=[(0, 0)] * 2, dilation=(1, 1))
    >>> tuple(y.shape), float(y[0, 0, 0, 0])
    ((1, 3, 3, 3), 18.0)
    """
    kernel = _check(x, channel, spatial, channel.shape[2 if shared else 0])
    flat = [side for pair in padding for side in pair]
    output_size(x.shape[2:], kernel, stride, flat, dilation)  # raises where the kernel does not fit
    if joined is None:
        joined = math.prod(kernel) <= MOST_TAPS
    tensors = (x, channel, *spatial, *(() if bias is None else (bias,)))
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    if not joined or len(kernel) != 2 or shared:
        steps = _shared_steps if shared else _steps
        if memory_efficient and recorded:
            return _recomputed(steps, x, channel, tuple(spatial), bias, geometry)
        return steps(x, channel, tuple(spatial), bias, geometry)
    filters = torch.einsum("ory,orx->oryx", *spatial)
    own = x.device.type == "cpu" and x.dtype is torch.float32 and (memory_efficient or not recorded)
    # An exported program should run without this library.
    if own and not torch.compiler.is_exporting():
        top, bottom, left, right = flat
        return pointwise_depthwise_conv2d(
            x, channel, filters, bias,
            stride=(stride[0], stride[1]), padding=(top, bottom, left, right), dilation=(dilation[0], dilation[1]),
        )  # fmt: skip
    if memory_efficient and recorded:
        return _recomputed(joined_convs, x, channel, filters, bias, stride, flat, dilation)
    return joined_convs(x, channel, filters, bias, stride, flat, dilation)


def one_way_conv_transpose(
    x: Tensor,
    channel: Tensor,
    spatial: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    memory_efficient: bool = False,
) -> Tensor:
    """Convolve transposed: channels first, then each direction as a transposed step of its own.

    Parameters
    ----------
    x : Tensor, shape (N, C_in, *size)
    channel : Tensor, shape (C_out, R, C_in)
    spatial : sequence of Tensor, each of shape (C_out, R, k)
    bias : Tensor, shape (C_out,), optional
    stride, padding, output_padding, dilation : sequence of int
        One a direction, as in ``torch.nn.functional.conv_transpose2d``.
    memory_efficient : bool, default=False
        As in ``one_way_conv``.

    Returns
    -------
    y : Tensor, shape (N, C_out, *size')
        As ``conv_transpose`` with the kernel of shape (C_in, C_out, *k) that ``one_way_kernel`` gives, transposed.
    """
    _check(x, channel, spatial, channel.shape[0])
    tensors = (x, channel, *spatial, *(() if bias is None else (bias,)))
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    geometry = (tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation))
    if memory_efficient and recorded:
        return _recomputed(_transposed_steps, x, channel, tuple(spatial), bias, geometry)
    return _transposed_steps(x, channel, tuple(spatial), bias, geometry)


def one_way_kernel(channel: Tensor, spatial: Sequence[Tensor], *, shared: bool = False) -> Tensor:
    """Return the dense kernel, shape (C_out, C_in, *k), that the filters stand for; differentiable."""
    space = "yxz"[: len(spatial)]
    first = "i" if shared else "o"
    terms = ",".join(("ori", *(f"{first}r{letter}" for letter in space)))
    return torch.einsum(f"{terms}->oi{space}", channel, *spatial)


def one_way_parameters(outputs: int, inputs: int, kernel: Sequence[int], rank: int, *, shared: bool = False) -> int:
    """Return how many numbers the filters hold, without the bias.

    Examples
    --------
    >>> one_way_parameters(64, 64, (3, 3), rank=1), 64 * 64 * 9
    (4480, 36864)
    """
    if shared:
        return rank * inputs * (sum(kernel) + outputs)
    return rank * outputs * (sum(kernel) + inputs)


def _check(x: Tensor, channel: Tensor, spatial: Sequence[Tensor], filters: int) -> list[int]:
    """Raise unless the operands fit together; return the kernel's size."""
    if channel.ndim != 3 or not 1 <= len(spatial) <= 3:
        raise QuernelError(
            "channel must be of shape (out, rank, in) and spatial hold one to three tensors; "
            f"got {tuple(channel.shape)} and {len(spatial)}"
        )
    wrong = [tuple(s.shape) for s in spatial if s.ndim != 3 or tuple(s.shape[:2]) != (filters, channel.shape[1])]
    if wrong:
        raise QuernelError(f"spatial filters must be of shape ({filters}, {channel.shape[1]}, k); got {wrong[0]}")
    if x.ndim != len(spatial) + 2 or x.shape[1] != channel.shape[2]:
        size = ", ".join("DHW"[3 - len(spatial) :])
        raise QuernelError(f"x must be of shape (N, {channel.shape[2]}, {size}); got {tuple(x.shape)}")
    return [s.shape[2] for s in spatial]


def _recomputed(function: Any, *arguments: Any) -> Tensor:
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a matrix (out, in) to the channels."""
    dims = x.ndim - 2
    return _CONVS[dims - 1](x, weight.reshape(*weight.shape, *[1] * dims), bias)


def _along(axis: int, dims: int, value: int, other: int) -> list[int]:
    return [value if i == axis else other for i in range(dims)]


def _filtered(
    x: Tensor,
    weight: Tensor,  # (channels out, channels in / groups, k)
    bias: Tensor | None,
    groups: int,
    axis: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
) -> Tensor:
    """Convolve in one direction."""
    dims = x.ndim - 2
    low, high = padding
    if low != high:
        sides = [(low, high) if i == axis else (0, 0) for i in range(dims)]
        x = F.pad(x, [side for pair in reversed(sides) for side in pair])
        low = 0
    return _CONVS[dims - 1](
        x,
        weight.reshape(*weight.shape[:2], *_along(axis, dims, weight.shape[2], 1)),
        bias,
        _along(axis, dims, stride, 1),
        _along(axis, dims, low, 0),
        _along(axis, dims, dilation, 1),
        groups,
    )


def _steps(x: Tensor, channel: Tensor, spatial: tuple[Tensor, ...], bias: Tensor | None, geometry: Any) -> Tensor:
    outputs, rank, _ = channel.shape
    z = _pointwise(x, channel.flatten(0, 1))
    *early, last = enumerate(zip(spatial, *geometry, strict=True))
    for axis, (filters, stride, padding, dilation) in early:
        weight = filters.reshape(outputs * rank, 1, -1)
        z = _filtered(z, weight, None, outputs * rank, axis, stride, padding, dilation)
    # In the last step each group takes the R channels of one filter, which adds them up.
    axis, (filters, stride, padding, dilation) = last
    return _filtered(z, filters, bias, outputs, axis, stride, padding, dilation)


def _shared_steps(
    x: Tensor, channel: Tensor, spatial: tuple[Tensor, ...], bias: Tensor | None, geometry: Any
) -> Tensor:
    z, inputs, rank = x, channel.shape[2], channel.shape[1]
    for axis, (filters, stride, padding, dilation) in enumerate(zip(spatial, *geometry, strict=True)):
        groups = inputs if axis == 0 else inputs * rank  # the first step makes R channels of each
        z = _filtered(z, filters.reshape(inputs * rank, 1, -1), None, groups, axis, stride, padding, dilation)
    return _pointwise(z, channel.transpose(1, 2).flatten(1), bias)


def _transposed_steps(
    x: Tensor, channel: Tensor, spatial: tuple[Tensor, ...], bias: Tensor | None, geometry: Any
) -> Tensor:
    outputs, rank, _ = channel.shape
    dims = len(spatial)
    z = _pointwise(x, channel.flatten(0, 1))
    for axis, (filters, stride, padding, output_padding, dilation) in enumerate(zip(spatial, *geometry, strict=True)):
        last = axis == dims - 1
        z = _TRANSPOSED[dims - 1](
            z,
            filters.reshape(outputs * rank, 1, *_along(axis, dims, filters.shape[2], 1)),
            bias if last else None,
            _along(axis, dims, stride, 1),
            _along(axis, dims, padding, 0),
            _along(axis, dims, output_padding, 0),
            outputs if last else outputs * rank,
            _along(axis, dims, dilation, 1),
        )
    return z
