"""``FactorizedConv1d/2d/3d``: convolutions that are small before training, by one-way filters (arXiv 2304.04964).

K[o, i, y, x] = sum_r channel[o, r, i] rows[o, r, y] columns[o, r, x]: every output filter is a sum of R products of a
filter along the channels, one along the height and one along the width.  C_out R (C_in + kh + kw) numbers instead of
C_out C_in kh kw: 8.2 times fewer for 3x3 at 64 channels and R = 1; R = kh kw represents every kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._registry import register
from quernel.nn.conv._one_way import Init, OneWayLayer, Size
from quernel.nn.functional.one_way import one_way_conv


class _FactorizedConv(OneWayLayer):
    geometry = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    flags = ("shared", "normalize", "memory_efficient")
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        rank: int = 1,
        bias: bool = True,
        *,
        shared: bool = False,
        padding_mode: str = "zeros",
        init: Init = "dirac",
        normalize: bool = False,
        memory_efficient: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        values = (kernel_size, stride, padding, dilation, padding_mode)
        geometry = dict(zip(self.geometry, values, strict=True))
        flags = {"shared": shared, "normalize": normalize, "memory_efficient": memory_efficient}
        self._build((in_channels, out_channels), geometry, rank, bias, init, flags, device, dtype)
        self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:  # (N, in, *size) or (in, *size) -> (N, out, *size') or (out, *size')
        """Convolve."""
        if x.ndim == len(self.kernel_size) + 1:
            single: Tensor = self.forward(x.unsqueeze(0)).squeeze(0)
            return single
        sides = self._sides()
        if self.padding_mode != "zeros":
            x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=self.padding_mode)
            sides = [(0, 0)] * len(sides)
        channel, spatial = self.filters(x.dtype)
        return one_way_conv(
            x,
            channel,
            spatial,
            None if self.bias is None else self.bias.to(x.dtype),
            stride=self.stride,
            padding=sides,
            dilation=self.dilation,
            shared=self.shared,
            memory_efficient=self.memory_efficient,
        )

    def _sides(self) -> list[tuple[int, int]]:
        """Return the padding before and after, in each direction."""
        if isinstance(self.padding, tuple):
            return [(n, n) for n in self.padding]
        same = self.padding == "same"
        whole = [step * (k - 1) * same for k, step in zip(self.kernel_size, self.dilation, strict=True)]
        return [(n // 2, n - n // 2) for n in whole]

    def multiply_adds(self, *size: int) -> int:
        """Return the multiply-adds of the separate one-way steps for one image of this size.

        In 2-D: out rank (H W in + H' W kh + H' W' kw).  The fused form does kh kw for kh + kw and fewer passes.
        """
        pixels = list(size)
        mixing = self.out_channels * self.rank * self.in_channels
        filters = (self.in_channels if self.shared else self.out_channels) * self.rank
        total = 0 if self.shared else mixing * math.prod(pixels)
        for axis, side in enumerate(self._sides()):
            k = self.kernel_size[axis]
            reach = self.dilation[axis] * (k - 1) + 1
            pixels[axis] = (pixels[axis] + sum(side) - reach) // self.stride[axis] + 1
            total += filters * k * math.prod(pixels)
        return total + mixing * math.prod(pixels) if self.shared else total


def _example_1d() -> dict[str, Any]:
    return {
        "make": lambda: FactorizedConv1d(3, 5, 4, padding="same", generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(2, 3, 9, generator=generator),),
        "feature_axis": 1,
    }


@register(
    "factorized-conv",
    pillar="nn",
    contract="module",
    paper="2304.04964",
    status="stable",
    headline=False,
    example=_example_1d,
)
class FactorizedConv1d(_FactorizedConv):
    """A 1-D convolution by one filter along the channels and one along the length, summed over ``rank``.

    Arguments as for ``FactorizedConv2d``, sizes of one number.

    Examples
    --------
    >>> import torch
    >>> layer = FactorizedConv1d(16, 32, 9, padding="same")
    >>> layer(torch.ones(2, 16, 100)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 32, 100]), 832)
    """

    plain = nn.Conv1d


def _example_2d() -> dict[str, Any]:
    return {
        "make": lambda: FactorizedConv2d(3, 5, 3, padding=1, rank=2, generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(2, 3, 8, 7, generator=generator),),
    }


@register(
    "factorized-conv",
    pillar="nn",
    contract="module",
    paper="2304.04964",
    status="stable",
    headline=False,
    example=_example_2d,
)
class FactorizedConv2d(_FactorizedConv):
    """A 2-D convolution by one-way filters: channels, height, width; ``rank`` products of the three are summed.

    Takes the place of ``torch.nn.Conv2d`` where that is large: train it from scratch, or fit it to a trained layer with
    ``from_conv``.  Fastest in ``torch.channels_last``, which it keeps.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode
        As in ``torch.nn.Conv2d``; there are no groups.
    rank : int, default=1
        Products a filter, R.  Smaller than the dense layer while R (in + kh + kw) < in kh kw.
    bias : bool, default=True
        Whether to add a learned number to each output channel.
    shared : bool, default=False
        Filter each input channel in space first, then mix: as depthwise-separable layers do, a smaller class.
    init : {"dirac", "kaiming"}, default="dirac"
        Spatial filters near a unit impulse, so that training starts as a pointwise layer; or normal ones whose products
        have the variance of Kaiming's for ReLU, 2 / (in kh kw), but heavy tails.
    normalize : bool, default=False
        Divide each spatial filter by its norm, which leaves all scale to the channel filters.
    memory_efficient : bool, default=True
        Keep only the input for the backward pass.  On the CPU in float32 that is faster, too; False allows second
        derivatives.
    device, dtype : optional
        As in ``torch.nn.Conv2d``; float32, float64, bfloat16 or float16.
    generator : torch.Generator, optional
        For the initial values; default is torch's own.

    Raises
    ------
    QuernelError
        If an argument is out of range, or in forward if the kernel is larger than the padded input.

    Notes
    -----
    Differs from the paper, which has one product a filter: the rank, the fused kernel, both initial schemes.

    References
    ----------
    "A priori compression of convolutional neural networks for wave simulators", arXiv 2304.04964, 2023.

    Examples
    --------
    >>> import torch
    >>> layer = FactorizedConv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    >>> layer(torch.ones(1, 64, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([1, 64, 8, 8]), 4544)
    """

    plain = nn.Conv2d


def _example_3d() -> dict[str, Any]:
    return {
        "make": lambda: FactorizedConv3d(3, 4, (3, 2, 3), stride=2, generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(2, 3, 5, 6, 5, generator=generator),),
        "feature_axis": 1,
    }


@register(
    "factorized-conv",
    pillar="nn",
    contract="module",
    paper="2304.04964",
    status="stable",
    headline=False,
    example=_example_3d,
)
class FactorizedConv3d(_FactorizedConv):
    """A 3-D convolution by one-way filters: channels, depth, height, width, summed over ``rank``.

    Arguments as for ``FactorizedConv2d``, sizes of three numbers.

    Examples
    --------
    >>> import torch
    >>> layer = FactorizedConv3d(8, 8, 3, padding=1)
    >>> layer(torch.ones(1, 8, 4, 4, 4)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([1, 8, 4, 4, 4]), 144)
    """

    plain = nn.Conv3d
