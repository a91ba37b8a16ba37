"""``DepthwiseConv2d``: a dense depthwise 3x3 or 5x5 convolution that reads and writes channel-major planes.

It stands between the 1x1 convolutions of a mobile network and hands on their layout (arXiv 1911.09723 keeps a whole
network in it), bias and ReLU or ReLU6 in the same pass.  Cost: k k multiply-adds a pixel, three to five loads.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_type
from quernel.nn._depthwise_kernels import SIZES, STRIDES
from quernel.nn._depthwise_op import depthwise_conv2d
from quernel.nn.conv.sparse import LIMITS
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES


def _example() -> dict[str, Any]:
    weight = torch.linspace(-1, 1, 36).sin().reshape(4, 1, 3, 3)
    return {
        "make": lambda: DepthwiseConv2d(weight, torch.linspace(-1, 1, 4), stride=2, activation="relu6"),
        "input": lambda generator: (torch.randn(2, 4, 5, 7, generator=generator),),
    }


@register(
    "fast-sparse-convnets",
    pillar="nn",
    contract="module",
    paper="1911.09723",
    status="stable",
    headline=False,
    example=_example,
)
class DepthwiseConv2d(nn.Module):
    """A depthwise convolution in the layout of the sparse layers; made by ``from_conv`` from a trained one.

    Parameters
    ----------
    weight : Tensor, shape (channels, 1, k, k)
        k is 3 or 5; the input is padded by k // 2 zeros.
    bias : Tensor, shape (channels,), optional
    stride : {1, 2}, default=1
        Of both axes.
    activation : {None, "relu", "relu6"}
        Applied in the same pass.
    aligned : bool, default=False
        Layout of the output, see ``SparseConv1x1``.

    Notes
    -----
    float32 is computed as it is, other dtypes pass through float32.  Gradients are those of torch's convolution.

    References
    ----------
    Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723, 2019.

    Examples
    --------
    >>> import torch
    >>> conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    >>> x = torch.randn(1, 8, 7, 7)
    >>> torch.allclose(DepthwiseConv2d.from_conv(conv, activation="relu")(x), conv(x).relu(), atol=1e-5)
    True
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        activation: str | None = None,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        check_type("weight", weight, Tensor)
        if weight.ndim != 4 or weight.shape[1] != 1 or tuple(weight.shape[2:]) not in [(s, s) for s in SIZES]:
            raise QuernelError(f"weight must have shape (C, 1, 3, 3) or (C, 1, 5, 5); got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise QuernelError(f"bias must have shape ({len(weight)},); got {tuple(bias.shape)}")
        self.stride = check_choice("stride", stride, STRIDES)
        self.activation = check_choice("activation", activation, tuple(LIMITS))
        self.aligned = check_type("aligned", aligned, bool)
        self._limits = LIMITS[activation]
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, activation: str | None = None, *, aligned: bool = False) -> Self:
        """Take over a trained depthwise convolution; its parameters are shared, not copied.

        Raises
        ------
        QuernelError
            If it is not depthwise, or of another size, stride, padding or dilation than the kernels have.
        """
        check_type("conv", conv, nn.Conv2d)
        problem = not_depthwise(conv)
        if problem:
            raise QuernelError(f"conv must be a depthwise convolution that channel-major kernels can run; {problem}")
        new = cls(conv.weight, conv.bias, stride=conv.stride[0], activation=activation, aligned=aligned)
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H', W')
        """Return ``activation(conv(x))``."""
        return depthwise_conv2d(x, self.weight, self.bias, *self._limits, self.stride, self.aligned)

    def config(self) -> dict[str, Any]:
        """Return sizes, dtypes, activation and layout."""
        channels, _, size, _ = self.weight.shape
        return {
            "channels": channels,
            "kernel_size": size,
            "dtype": dtype_name(self.weight.dtype),
            "bias": None if self.bias is None else dtype_name(self.bias.dtype),
            "stride": self.stride,
            "activation": self.activation,
            "aligned": self.aligned,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        channels, size, bias = config["channels"], config["kernel_size"], config["bias"]
        weight = torch.zeros(channels, 1, size, size, dtype=DTYPES[config["dtype"]])
        options = {name: config[name] for name in ("stride", "activation", "aligned")}
        return cls(weight, None if bias is None else torch.zeros(channels, dtype=DTYPES[bias]), **options)

    def extra_repr(self) -> str:
        """Show channels, kernel, stride and activation."""
        channels, _, size, _ = self.weight.shape
        parts = [f"{channels}, kernel_size={size}", f"stride={self.stride}", f"activation={self.activation!r}"]
        return ", ".join([*parts, "aligned=True"] if self.aligned else parts)


def not_depthwise(conv: nn.Conv2d) -> str:
    """Return why a convolution is not one that ``DepthwiseConv2d`` computes; empty if it is."""
    if conv.groups != conv.in_channels or conv.in_channels != conv.out_channels:
        return f"it has {conv.groups} groups for {conv.in_channels} inputs and {conv.out_channels} outputs"
    size = conv.kernel_size[0]
    if tuple(conv.kernel_size) not in [(s, s) for s in SIZES] or tuple(conv.dilation) != (1, 1):
        return f"its kernel is {tuple(conv.kernel_size)} with dilation {tuple(conv.dilation)}; 3x3 and 5x5 are there"
    if conv.stride[0] != conv.stride[1] or conv.stride[0] not in STRIDES:
        return f"its stride is {tuple(conv.stride)}; 1 and 2 are there"
    if conv.padding not in ((size // 2, size // 2), "same") or conv.padding_mode != "zeros":
        return f"its padding is {conv.padding} with {conv.padding_mode}; {size // 2} zeros are there"
    if conv.weight.dtype is not torch.float32:
        return f"it is {conv.weight.dtype}; convert it with .float() first"
    return ""
