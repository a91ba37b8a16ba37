"""``FactorizedConvTranspose1d/2d/3d``: transposed convolutions by one-way filters, for decoders (arXiv 2304.04964).

The filters belong to output channels as in ``factorized``, so the order of the steps stays: pointwise first, then one
transposed step a direction with its own stride and padding; only the adjoint of a layer reverses the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel.nn.conv._one_way import Init, OneWayLayer, Size
from quernel.nn.functional.one_way import one_way_conv_transpose


class _FactorizedConvTranspose(OneWayLayer):
    geometry = ("kernel_size", "stride", "padding", "output_padding", "dilation")
    flags = ("normalize", "memory_efficient")
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        dilation: Size = 1,
        rank: int = 1,
        bias: bool = True,
        *,
        # An impulse would leave all but one pixel of each stride empty.
        init: Init = "kaiming",
        normalize: bool = False,
        memory_efficient: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        values = (kernel_size, stride, padding, output_padding, dilation)
        geometry = dict(zip(self.geometry, values, strict=True))
        flags = {"normalize": normalize, "memory_efficient": memory_efficient}
        self._build((in_channels, out_channels), geometry, rank, bias, init, flags, device, dtype)
        self.reset_parameters(generator)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve; (N, in, *size) or (in, *size) -> (N, out, *size') or (out, *size').

        ``output_size`` chooses among the sizes that a stride above one leaves open, instead of ``output_padding``.
        """
        if x.ndim == len(self.kernel_size) + 1:
            single: Tensor = self.forward(x.unsqueeze(0), output_size).squeeze(0)
            return single
        channel, spatial = self.filters(x.dtype)
        return one_way_conv_transpose(
            x,
            channel,
            spatial,
            None if self.bias is None else self.bias.to(x.dtype),
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding if output_size is None else self._beyond(x.shape[2:], output_size),
            dilation=self.dilation,
            memory_efficient=self.memory_efficient,
        )

    def _beyond(self, size: Sequence[int], wanted: Sequence[int]) -> list[int]:
        least = self._least(size)
        extra = [n - low for n, low in zip(list(wanted)[-len(least) :], least, strict=False)]
        if len(extra) < len(least) or any(not 0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            most = [low + s - 1 for low, s in zip(least, self.stride, strict=True)]
            raise QuernelError(f"output_size must be between {least} and {most} for this input; got {list(wanted)}")
        return extra

    def _least(self, size: Sequence[int]) -> list[int]:
        geometry = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in geometry]

    def _layout(self, kernel: Tensor) -> Tensor:
        return kernel.transpose(0, 1)

    def multiply_adds(self, *size: int) -> int:
        """Return the multiply-adds of the one-way steps for one image of this size."""
        pixels = list(size)
        total = self.out_channels * self.rank * self.in_channels * math.prod(pixels)
        least = self._least(size)
        for axis, k in enumerate(self.kernel_size):
            total += self.out_channels * self.rank * k * math.prod(pixels)
            pixels[axis] = least[axis] + self.output_padding[axis]
        return total


def _example_1d() -> dict[str, Any]:
    return {
        "make": lambda: FactorizedConvTranspose1d(3, 5, 4, stride=2, generator=torch.Generator().manual_seed(0)),
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
class FactorizedConvTranspose1d(_FactorizedConvTranspose):
    """A transposed 1-D convolution by one filter along the channels and one along the length.

    Arguments as for ``FactorizedConvTranspose2d``, sizes of one number.

    Examples
    --------
    >>> import torch
    >>> FactorizedConvTranspose1d(4, 2, 2, stride=2)(torch.ones(1, 4, 5)).shape
    torch.Size([1, 2, 10])
    """

    plain = nn.ConvTranspose1d


def _example_2d() -> dict[str, Any]:
    def make() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        return FactorizedConvTranspose2d(3, 5, (3, 4), stride=(2, 1), padding=1, rank=2, generator=generator)

    return {"make": make, "input": lambda generator: (torch.randn(2, 3, 5, 4, generator=generator),)}


@register(
    "factorized-conv",
    pillar="nn",
    contract="module",
    paper="2304.04964",
    status="stable",
    headline=False,
    example=_example_2d,
)
class FactorizedConvTranspose2d(_FactorizedConvTranspose):
    """A transposed 2-D convolution by one-way filters: channels, height, width, summed over ``rank``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation
        As in ``torch.nn.ConvTranspose2d``; there are no groups.
    rank, bias, normalize, memory_efficient, device, dtype, generator
        As in ``FactorizedConv2d``.
    init : {"kaiming", "dirac"}, default="kaiming"
        As there; an impulse, with a stride, would leave pixels empty.

    Raises
    ------
    QuernelError
        If an argument is out of range, or ``output_size`` in forward cannot be had.

    Examples
    --------
    >>> import torch
    >>> FactorizedConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1)(torch.ones(1, 8, 5, 5)).shape
    torch.Size([1, 4, 10, 10])
    """

    plain = nn.ConvTranspose2d


def _example_3d() -> dict[str, Any]:
    return {
        "make": lambda: FactorizedConvTranspose3d(3, 4, 2, stride=2, generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(2, 3, 3, 4, 3, generator=generator),),
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
class FactorizedConvTranspose3d(_FactorizedConvTranspose):
    """A transposed 3-D convolution by one-way filters: channels, depth, height, width.

    Arguments as for ``FactorizedConvTranspose2d``, sizes of three numbers.

    Examples
    --------
    >>> import torch
    >>> FactorizedConvTranspose3d(4, 2, 2, stride=2)(torch.ones(1, 4, 2, 3, 4)).shape
    torch.Size([1, 2, 4, 6, 8])
    """

    plain = nn.ConvTranspose3d
