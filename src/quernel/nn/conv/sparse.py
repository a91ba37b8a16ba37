"""``SparseConv1x1``: a 1x1 convolution that multiplies its nonzero weights only (arXiv 1911.09723).

y[n, o] = clamp(bias[o] + sum over nonzeros of w[o, k] x[n, k]): every nonzero weight runs along a channel's contiguous
pixels, sixteen at a time.  Cost: 2 nnz H W operations an image, at the rate of a dense product.  Bias, batch norm
(folded) and ReLU or ReLU6 cost nothing more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int, check_type
from quernel.nn._sparse_ops import NO_LIMITS, sparse_conv1x1
from quernel.nn._stored import StoredConv2d
from quernel.nn.weights.int8 import keep_float32
from quernel.nn.weights.sparse import SparseWeight

LIMITS = {None: NO_LIMITS, "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
# Share of zeros below which a layer warns; the times in the warning are those of 256 channels and 784 pixels on one
# thread in benchmarks/results/fast-sparse-convnets.json.
WORTH_IT = 0.6


def warn_if_dense(weight: SparseWeight, what: str) -> None:
    """Warn that a weight has too few zeros to be worth it."""
    if weight.sparsity < WORTH_IT:
        warnings.warn(
            f"{what} has {weight.sparsity:.0%} zeros: sparse products break even with bfloat16 at 70%, and are "
            "about twice as fast as float32 there. Prune it further "
            "(quernel.train.GradualMagnitudePruner), or leave it dense",
            UserWarning,
            stacklevel=3,
        )


def _example() -> dict[str, Any]:
    conv = nn.Conv2d(24, 10, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.linspace(-1, 1, 240).sin().reshape(10, 24, 1, 1))
        conv.weight[:, torch.arange(24) % 4 != 1] = 0
        conv.bias.copy_(torch.linspace(-1, 1, 10))  # type: ignore[union-attr]
    return {
        "make": lambda: SparseConv1x1.from_conv(conv, activation="relu6", block=4),
        "input": lambda generator: (torch.randn(2, 24, 5, 7, generator=generator),),
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
class SparseConv1x1(StoredConv2d):
    """A 1x1 convolution over a sparse weight, for inference on a CPU; made by ``from_conv`` from a pruned one.

    Parameters
    ----------
    weight : SparseWeight, shape (out_channels, in_channels, 1, 1)
    bias : Tensor, shape (out_channels,), optional
    stride : int, default=1
        Of both axes; the input is subsampled first.
    activation : {None, "relu", "relu6"}
        Applied in the same pass.
    aligned : bool, default=False
        Whether the output's channels begin at cache lines an odd number of lines apart, which is what the sparse and
        depthwise layers read fastest.  Such a tensor is not contiguous: ``view`` cannot merge its channels with its
        pixels (``flatten`` can).  ``SparsePointwise`` sets it where another of these layers reads the output.

    Notes
    -----
    Inputs are read fastest in that layout, next best contiguous (N, C, H, W); anything else is copied first, so keep
    the model in torch's default layout, not in channels_last.  Values and bias stay float32 when a module around them
    is cast; inputs of another dtype pass through float32.  Gradients reach the input and the bias, not the weight.

    References
    ----------
    Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723, 2019.  Strips are 64 pixels instead of 16, columns are
    16-bit numbers instead of byte offsets, and sums start from four partial ones where strips are narrow.

    Examples
    --------
    >>> import torch
    >>> conv = torch.nn.Conv2d(64, 64, 1)
    >>> _ = conv.weight.data.mul_(torch.rand(64, 64, 1, 1) < 0.1)
    >>> sparse, x = SparseConv1x1.from_conv(conv, activation="relu"), torch.randn(1, 64, 14, 14)
    >>> torch.allclose(sparse(x), conv(x).relu(), atol=1e-5)
    True
    """

    weight: SparseWeight

    def __init__(
        self,
        weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        activation: str | None = None,
        aligned: bool = False,
    ) -> None:
        check_type("weight", weight, SparseWeight)
        super().__init__(weight, bias, stride=check_int("stride", stride, low=1))
        self.activation = check_choice("activation", activation, tuple(LIMITS))
        self.aligned = check_type("aligned", aligned, bool)
        self._step, self._limits = stride, LIMITS[activation]

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, activation: str | None = None, *, block: int = 1, aligned: bool = False
    ) -> Self:
        """Store the nonzero weights of a pruned convolution; warns where they are too many to be worth it.

        Parameters
        ----------
        conv : nn.Conv2d
            With a 1x1 kernel, one group, equal strides, no padding, float32.  Left as it is; the bias is shared.
        activation : {None, "relu", "relu6"}
            To compute in the same pass.
        block : {1, 2, 4}, default=1
            Consecutive output channels that share a pattern, as block pruning leaves it.
        aligned : bool, default=False
            See the class.

        Raises
        ------
        QuernelError
            If the convolution is of another kind, or its weight is not finite.
        """
        check_type("conv", conv, nn.Conv2d)
        problem = not_pointwise(conv)
        if problem:
            raise QuernelError(f"conv must be a 1x1 convolution that sparse kernels can run; {problem}")
        weight = SparseWeight.from_dense(conv.weight, block)
        warn_if_dense(weight, "the convolution")
        new = cls(weight, conv.bias, stride=conv.stride[0], activation=activation, aligned=aligned)
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H', W')
        """Return ``activation(conv(x))``."""
        if self._step > 1:
            x = x[:, :, :: self._step, :: self._step]
        return sparse_conv1x1(x, self.weight.operands(), self.bias, *self._limits, self.aligned)

    def config(self) -> dict[str, Any]:
        """Return weight, bias, stride, activation and layout."""
        own = {"stride": self._step, "activation": self.activation, "aligned": self.aligned}
        return self._base_config() | own

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        return cls(*cls._parts(config), **{name: config[name] for name in ("stride", "activation", "aligned")})  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show channels, stride, sparsity and activation."""
        parts = [f"{self.in_channels}, {self.out_channels}", f"stride={self._step}"]
        parts += [f"sparsity={self.weight.sparsity:.3f}", f"activation={self.activation!r}"]
        return ", ".join([*parts, "aligned=True"] if self.aligned else parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]


def not_pointwise(conv: nn.Conv2d) -> str:
    """Return why a convolution is not one that ``SparseConv1x1`` computes; empty if it is."""
    if tuple(conv.kernel_size) != (1, 1):
        return f"its kernel is {tuple(conv.kernel_size)}"
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if conv.stride[0] != conv.stride[1]:
        return f"its strides differ: {tuple(conv.stride)}"
    if conv.padding not in ((0, 0), "valid", "same"):
        return f"it pads by {conv.padding}, which surrounds the image with biases"
    if conv.weight.dtype is not torch.float32:
        return f"it is {conv.weight.dtype}; convert it with .float() first"
    return ""
