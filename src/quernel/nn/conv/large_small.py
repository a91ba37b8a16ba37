"""``LSConv``: look at a wide neighbourhood to weigh a small one (LSNet, arXiv 2503.23135).

    h = BN(DW_{7x7}(ReLU(BN(conv1x1(x)))))         C / 2 channels
    w = GN(conv1x1(ReLU(BN(conv1x1(h)))))          k^2 weights for each of C / 8 sets, at every place
    LS(x) = BN(ska(x, w)) + x                      channel c takes set c mod (C / 8)

There is no softmax: weights may be negative, and GN takes its statistics over the taps and places of a set.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_int
from quernel.nn._mixer import Mixer
from quernel.nn.functional.batch_norm import fold_batch_norm
from quernel.nn.functional.small_kernel_aggregation import ska


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return LSConv(16, large=5, group_size=4)

    return {"make": make, "input": lambda generator: (torch.randn(2, 5, 6, 16, generator=generator),)}


class ConvNorm(nn.Sequential):
    """A convolution without bias (``c``) and the batch norm of its output (``bn``)."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_init: float = 1.0,
    ) -> None:
        conv = nn.Conv2d(before, after, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(after)
        nn.init.constant_(norm.weight, norm_init)
        super().__init__(OrderedDict(c=conv, bn=norm))

    def folded(self) -> nn.Conv2d:
        """Return the one convolution with bias that computes the same in eval mode."""
        conv: Any = self.c
        norm: Any = self.bn
        new = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            groups=conv.groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            weight, bias = fold_batch_norm(
                conv.weight, None, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            new.weight.copy_(weight), new.bias.copy_(bias)  # type: ignore[union-attr]
        return new.train(self.training)


class LargeKernelPerception(nn.Module):
    """What ``LSConv`` weighs its neighbourhoods by: (B, C, H, W) -> (B, C / group_size, small^2, H, W).

    Parameters
    ----------
    dim : int
        Channels.
    large : int, default=7
        Odd side of the neighbourhood that is looked at.
    small : int, default=3
        Odd side of the one that is weighed.
    group_size : int, default=8
        Channels that share a set of weights; divides ``dim``.
    """

    def __init__(self, dim: int, large: int = 7, small: int = 3, group_size: int = 8) -> None:
        super().__init__()
        check_int("dim", dim, low=2)
        for name, size in (("large", large), ("small", small)):
            if check_int(name, size, low=1) % 2 == 0:
                raise QuernelError(f"{name} must be odd, so that it is centred on its place; got {size}")
        if dim % check_int("group_size", group_size, low=1):
            raise QuernelError(f"group_size must divide dim={dim}; got {group_size}")
        self.sets, self.taps, hidden = dim // group_size, small * small, dim // 2
        self.cv1: nn.Module = ConvNorm(dim, hidden)
        self.cv2: nn.Module = ConvNorm(hidden, hidden, large, groups=hidden)
        self.cv3: nn.Module = ConvNorm(hidden, hidden)
        self.cv4 = nn.Conv2d(hidden, self.taps * self.sets, 1)
        self.norm = nn.GroupNorm(self.sets, self.taps * self.sets)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the weights of every place; ``mask``, (B, H, W), is True where a place counts."""
        h = F.relu(self.cv1(x))
        if mask is not None:
            h = h * mask[:, None]  # a norm has shifted what was zero
        w = self.cv4(F.relu(self.cv3(self.cv2(h))))
        w = self.norm(w) if mask is None else self._normed(w, mask)
        return w.unflatten(1, (self.sets, self.taps))

    def _normed(self, w: Tensor, mask: Tensor) -> Tensor:
        """Normalise by the statistics of the places that count."""
        kept = mask[:, None, None].to(w.dtype)  # (B, 1, 1, H, W)
        sets = w.unflatten(1, (self.sets, self.taps))
        count = (kept.sum((2, 3, 4), keepdim=True) * self.taps).clamp_min(1)
        centred = sets - (sets * kept).sum((2, 3, 4), keepdim=True) / count
        variance = (centred.square() * kept).sum((2, 3, 4), keepdim=True) / count
        normed = (centred * (variance + self.norm.eps).rsqrt()).flatten(1, 2)
        return normed * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]

    def fold_(self) -> None:
        """Fold the batch norms into the convolutions before them, in place; for inference."""
        self.cv1, self.cv2, self.cv3 = (
            conv.folded() if isinstance(conv, ConvNorm) else conv for conv in (self.cv1, self.cv2, self.cv3)
        )


@register("lsnet", pillar="nn", contract="mixer", paper="2503.23135", status="experimental", example=_example)
class LSConv(Mixer):
    """Mixing of images: a large depthwise convolution decides by place how a small neighbourhood is summed.

    Parameters
    ----------
    dim : int
        Channels C.
    large : int, default=7
        Odd side of the neighbourhood that decides.
    small : int, default=3
        Odd side of the neighbourhood that is summed.
    group_size : int, default=8
        Channels that share weights: c, c + C / group_size, ...
    fused : bool, default=False
        Whether the batch norms of the perception are folded already, as ``fuse()`` returns it.

    Raises
    ------
    QuernelError
        If a side is even, or ``group_size`` does not divide ``dim``.

    Notes
    -----
    The residual is part of it: use ``MetaBlock(..., style="lsnet")``.  The group norm of the weights looks at all
    places of an image, so that outputs depend on its size.  In training mode, batch norms also count masked places.

    References
    ----------
    Wang et al., "LSNet: See Large, Focus Small", arXiv 2503.23135, CVPR 2025.

    Examples
    --------
    >>> import torch
    >>> LSConv(64)(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    spatial_ndim = (2,)
    options = ("large", "small", "group_size", "fused")

    def __init__(self, dim: int, large: int = 7, small: int = 3, group_size: int = 8, *, fused: bool = False) -> None:
        super().__init__(dim)
        self.large, self.small, self.group_size = large, small, group_size
        self.fused = check_bool("fused", fused)
        self.lkp = LargeKernelPerception(dim, large, small, group_size)
        # Not folded: each set of weights serves channels that the norm scales differently.
        self.bn = nn.BatchNorm2d(dim)
        if fused:
            self.lkp.fold_()

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, H, W, C), norms left out."""
        hidden, weights = self.dim // 2, self.small**2 * self.dim // self.group_size
        dense = self.dim * hidden + hidden * hidden + hidden * weights
        return 2 * torch.Size(shape[:-1]).numel() * (dense + hidden * self.large**2 + self.dim * self.small**2)

    def fuse(self) -> Self:
        """Return a copy whose perception has no batch norms.

        Raises
        ------
        QuernelError
            If it is in training mode.
        """
        if self.fused:
            return self
        if self.training:
            raise QuernelError("fuse() folds the running statistics of batch norms: call eval() first")
        new = copy.deepcopy(self)
        new.lkp.fold_()
        new.fused = True
        return new

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        z = x.movedim(-1, 1)
        w = self.lkp(z, mask=mask).to(z.dtype)  # autocast may have made it narrow
        y: Tensor = self.bn(ska(z, w)) + z
        return y.movedim(1, -1)
