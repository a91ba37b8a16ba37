"""``InceptionDWConv2d``: a large depthwise convolution split into four cheap branches (arXiv 2303.16900).

With g = int(C * branch_ratio), the channels are [identity: C - 3g | square: g | band along W: g | band along H: g]:

    y = concat(x_id, DW_{3x3}(x_hw), DW_{1x11}(x_w), DW_{11x1}(x_h))

Cost g (9 + 22) multiply-adds a pixel instead of 49 C of a 7x7 depthwise convolution, and C - 3g channels are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import all_finite, check_float, check_int, check_type
from quernel.nn._mixer import Mixer
from quernel.nn.functional.channel_split import split_depthwise

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _example(cls_name: str, *shape: int) -> Any:
    def example() -> dict[str, Any]:
        @seeded
        def make() -> nn.Module:
            cls = {"1d": InceptionDWConv1d, "2d": InceptionDWConv2d, "3d": InceptionDWConv3d}[cls_name]
            mixer: nn.Module = cls(8, 3, 5, branch_ratio=0.2)
            return mixer

        return {"make": make, "input": lambda generator: (torch.randn(2, *shape, 8, generator=generator),)}

    return example


@dataclass(frozen=True)
class InceptionFit:
    """What ``from_depthwise`` finds: conv(x)[:, permutation] is about scale * mixer(x[:, permutation]) + shift.

    Attributes
    ----------
    mixer : Mixer
        The branches that explain the convolution best.
    permutation : Tensor, shape (C,)
        Which channel of the convolution each channel of the mixer stands for; the layers around it must follow.
    scale, shift : Tensor, shape (C,)
        What an identity channel cannot hold itself, ones and zeros elsewhere; for the next norm or layer to take.
    error : float
        Squared error of the kernels over their squared norm: the share of the output's variance that is lost where
        pixels are independent.
    """

    mixer: Mixer
    permutation: Tensor
    scale: Tensor
    shift: Tensor
    error: float


class _InceptionDWConv(Mixer):
    """The branches over one, two or three axes; ``axes`` names them all, and each branch by the axes it filters."""

    options = ("square_kernel_size", "band_kernel_size", "branch_ratio", "branches")
    axes: ClassVar[str]
    all_branches: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        dim: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        branches: Sequence[str] | None = None,
    ) -> None:
        super().__init__(dim)
        for name, size in (("square_kernel_size", square_kernel_size), ("band_kernel_size", band_kernel_size)):
            if check_int(name, size, low=1) % 2 == 0:
                raise QuernelError(f"{name} must be odd, so that it is centred on its place; got {size}")
        self.square_kernel_size, self.band_kernel_size = square_kernel_size, band_kernel_size
        self.branch_ratio = check_float("branch_ratio", branch_ratio, low=0.0, high=1.0, open_low=True)
        self.branches = self._chosen(branches)
        self.group = int(dim * self.branch_ratio)
        if not 1 <= self.group <= dim // len(self.all_branches):
            raise QuernelError(
                f"branch_ratio must give each of {len(self.all_branches)} branches at least one of dim={dim} channels "
                f"and all together no more than there are; got {branch_ratio}, {self.group} channels each"
            )
        # Height and width of the windows, of sequences too.
        self._sizes = [(1, *self._kernel_sizes(name))[-2:] for name in self.branches]
        for name in self.branches:
            sizes = self._kernel_sizes(name)
            conv = CONVS[len(self.axes)](
                self.group, self.group, sizes, padding=[s // 2 for s in sizes], groups=self.group
            )
            setattr(self, f"dwconv_{name}", conv)

    @classmethod
    def from_depthwise(cls, conv: Any, band_kernel_size: int | None = None, **options: Any) -> InceptionFit:
        """Start from a trained depthwise convolution.

        Each channel goes to the branch that explains its kernel best, all channels together: the sum of squared
        errors is least.  An identity channel keeps the centre tap as a scale.

        Parameters
        ----------
        conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
            Depthwise, of stride 1, odd kernel and zero padding of half of it.
        band_kernel_size : int, optional
            The larger of 11 and the kernel itself by default.
        **options
            As in the class.

        Returns
        -------
        fit : InceptionFit

        Raises
        ------
        QuernelError
            If the convolution is another, or its kernels are not finite.
        """
        check_type("conv", conv, CONVS[len(cls.axes)])
        _check_depthwise(conv)
        band = max(11, *conv.kernel_size) if band_kernel_size is None else band_kernel_size
        kernel = conv.weight.detach()[:, 0]
        mixer = cls(conv.in_channels, band_kernel_size=band, **options).to(kernel.device, kernel.dtype)
        centre = kernel[(slice(None), *(size // 2 for size in conv.kernel_size))]
        bias = torch.zeros_like(centre) if conv.bias is None else conv.bias.detach()
        parts = [mixer._part(name, kernel) for name in mixer.branches]
        # What each branch explains of each channel's kernel, identity first, and how many channels it has.
        explained = torch.stack([_squares(part) for part in (centre[:, None], *parts)], dim=1)
        kept = mixer.dim - mixer.group * len(parts)
        permutation = _assigned(explained, [kept, *[mixer.group] * len(parts)])
        scale, shift = torch.ones_like(centre), torch.zeros_like(centre)
        scale[:kept], shift[:kept] = centre[permutation[:kept]], bias[permutation[:kept]]
        total, found = _squares(kernel).sum(), explained[permutation[:kept], 0].sum()
        for i, (name, part) in enumerate(zip(mixer.branches, parts, strict=True)):
            channels = permutation[kept + i * mixer.group : kept + (i + 1) * mixer.group]
            found += explained[channels, i + 1].sum()
            branch = getattr(mixer, f"dwconv_{name}")
            with torch.no_grad():
                branch.weight.copy_(_fitted(part[channels], tuple(branch.kernel_size))[:, None])
                branch.bias.copy_(bias[channels])
        error = max(float(1 - found / total), 0.0) if total > 0 else 0.0
        return InceptionFit(mixer, permutation, scale, shift, error)

    def to_depthwise(self) -> nn.Module:
        """Return the one depthwise convolution that computes the same, for export and for checks; far slower."""
        size = max(self.square_kernel_size, self.band_kernel_size)
        new = CONVS[len(self.axes)](self.dim, self.dim, size, padding=size // 2, groups=self.dim)
        first = getattr(self, f"dwconv_{self.branches[0]}").weight if self.branches else new.weight
        new = new.to(first.device, first.dtype)
        kept = self.dim - self.group * len(self.branches)
        with torch.no_grad():
            new.weight.zero_(), new.bias.zero_()
            new.weight[(slice(None, kept), 0, *[size // 2] * len(self.axes))] = 1.0
            for i, name in enumerate(self.branches):
                branch, start = getattr(self, f"dwconv_{name}"), kept + i * self.group
                rows = slice(start, start + self.group)
                new.weight[rows, 0] = _fitted(branch.weight[:, 0], (size,) * len(self.axes))
                new.bias[rows] = branch.bias
        converted: nn.Module = new.train(self.training)
        return converted

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), biases included."""
        pixels = torch.Size(shape[:-1]).numel()
        taps = sum(torch.Size(self._kernel_sizes(name)).numel() for name in self.branches)
        return 2 * pixels * self.group * taps + pixels * self.group * len(self.branches)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        convs: list[Any] = [getattr(self, f"dwconv_{name}") for name in self.branches]
        if self._in_one_pass(x, convs):
            taps = torch.cat([conv.weight.flatten(1) for conv in convs], dim=1).mT
            bias = torch.cat([conv.bias for conv in convs])
            return split_depthwise(x if x.ndim == 4 else x[:, None], taps, bias, self._sizes).view_as(x)
        # Channels in the order of the published weights; an ablated branch is identity.
        kept = self.dim - self.group * len(convs)
        first, *parts = x.movedim(-1, 1).split([kept, *[self.group] * len(convs)], dim=1)
        mixed = [conv(part) for conv, part in zip(convs, parts, strict=True)]
        return torch.cat([first, *mixed], dim=1).movedim(1, -1)

    def _in_one_pass(self, x: Tensor, convs: list[Any]) -> bool:
        """Whether the fused operation takes this input; layers that are watched or replaced run one by one."""
        plain = x.dtype is torch.float32 and x.device.type == "cpu" and len(self.axes) < 3 and x.is_contiguous()
        sizes = map(self._kernel_sizes, self.branches)
        return plain and bool(convs) and all(map(_is_plain, convs, sizes))

    def _kernel_sizes(self, name: str) -> tuple[int, ...]:
        if name == self.all_branches[0]:
            return (self.square_kernel_size,) * len(self.axes)
        return tuple(self.band_kernel_size if axis in name else 1 for axis in self.axes)

    def _part(self, name: str, kernel: Tensor) -> Tensor:
        """Return the taps of whole kernels that a branch can hold; its least-squares fit."""
        sizes = tuple(min(a, b) for a, b in zip(self._kernel_sizes(name), kernel.shape[1:], strict=True))
        return _fitted(kernel, sizes)

    def _chosen(self, branches: Sequence[str] | None) -> tuple[str, ...]:
        if branches is None:
            return self.all_branches
        if isinstance(branches, str) or not set(branches) <= set(self.all_branches):
            names = ", ".join(map(repr, self.all_branches))
            raise QuernelError(f"branches must be a sequence of some of {names}; got {branches!r}")
        return tuple(name for name in self.all_branches if name in branches)


@register(
    "inceptionnext",
    pillar="nn",
    contract="mixer",
    paper="2303.16900",
    status="experimental",
    headline=False,
    example=_example("1d", 9),
)
class InceptionDWConv1d(_InceptionDWConv):
    """The same over sequences: identity, a short and a long filter; our extension.

    Parameters
    ----------
    dim, square_kernel_size, band_kernel_size, branch_ratio, branches
        As in ``InceptionDWConv2d``; the branches are "near" and "l".

    Examples
    --------
    >>> import torch
    >>> InceptionDWConv1d(32)(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    spatial_ndim = (1,)
    axes = "l"
    all_branches = ("near", "l")


@register(
    "inceptionnext",
    pillar="nn",
    contract="mixer",
    paper="2303.16900",
    status="experimental",
    example=_example("2d", 5, 7),
)
class InceptionDWConv2d(_InceptionDWConv):
    """Depthwise mixing of images in four groups of channels: as they are, a square, a wide band, a high band.

    Parameters
    ----------
    dim : int
        Channels C.
    square_kernel_size : int, default=3
        Odd side of the square.
    band_kernel_size : int, default=11
        Odd length of the bands.
    branch_ratio : float, default=0.125
        Share of the channels of each branch, rounded down.
    branches : sequence of {"hw", "w", "h"}, optional
        Which branches there are; channels of the others stay as they are.

    Raises
    ------
    QuernelError
        If kernels are even, or branches have no channel or more than there are.

    Notes
    -----
    Branches filter with zero padding and a bias.  Parameters have the names and shapes of published weights.

    References
    ----------
    Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt", arXiv 2303.16900, CVPR 2024.

    Examples
    --------
    >>> import torch
    >>> InceptionDWConv2d(64)(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    spatial_ndim = (2,)
    axes = "hw"
    all_branches = ("hw", "w", "h")


@register(
    "inceptionnext",
    pillar="nn",
    contract="mixer",
    paper="2303.16900",
    status="experimental",
    headline=False,
    example=_example("3d", 3, 4, 5),
)
class InceptionDWConv3d(_InceptionDWConv):
    """The same over volumes and videos: identity, a cube and a band along each of three axes; our extension.

    Parameters
    ----------
    dim, square_kernel_size, band_kernel_size, branch_ratio, branches
        As in ``InceptionDWConv2d``; the branches are "dhw", "w", "h" and "d".

    Examples
    --------
    >>> import torch
    >>> InceptionDWConv3d(32)(torch.randn(2, 4, 6, 6, 32)).shape
    torch.Size([2, 4, 6, 6, 32])
    """

    spatial_ndim = (3,)
    axes = "dhw"
    all_branches = ("dhw", "w", "h", "d")


def _is_plain(conv: Any, sizes: tuple[int, ...]) -> bool:
    """Whether a layer is the convolution that the constructor made, and nobody watches its output or gradients."""
    if type(conv) not in (nn.Conv1d, nn.Conv2d) or conv.bias is None or conv.weight.dtype is not torch.float32:
        return False
    made = conv.kernel_size == sizes and conv.padding == tuple(s // 2 for s in sizes) and conv.padding_mode == "zeros"
    alike = made and conv.groups == conv.out_channels and all(s == 1 for s in (*conv.stride, *conv.dilation))
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    return alike and not any(hooks)


def _check_depthwise(conv: Any) -> None:
    sizes, ones = tuple(conv.kernel_size), (1,) * len(conv.kernel_size)
    square = conv.groups == conv.in_channels == conv.out_channels and all(size % 2 for size in sizes)
    padded = conv.padding in (tuple(size // 2 for size in sizes), "same") and conv.padding_mode == "zeros"
    if not square or not padded or tuple(conv.stride) != ones or tuple(conv.dilation) != ones:
        raise QuernelError(f"conv must be depthwise, of stride 1, odd and padded by half with zeros; got {conv}")
    if not all_finite(conv.weight):
        raise QuernelError("conv must have finite weights; got NaN or infinity. Look for where training diverged")


def _assigned(explained: Tensor, counts: list[int]) -> Tensor:
    """Return which channel takes each place, ``counts`` places a branch, so that most is explained; (C, branches)."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    channels, places = linear_sum_assignment(explained.cpu().numpy()[:, owner], maximize=True)
    permutation = torch.empty(len(channels), dtype=torch.long)
    permutation[torch.from_numpy(places)] = torch.from_numpy(channels)
    # Places of one branch are alike: channels keep their order there, so that none moves without need.
    return torch.cat([part.sort().values for part in permutation.split(counts)])


def _squares(kernel: Tensor) -> Tensor:  # (C, ...) -> (C,)
    return kernel.double().square().flatten(1).sum(1)


def _fitted(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:  # (n, *odd) -> (n, *sizes)
    """Return kernels cut or padded with zeros to odd sizes, centred."""
    pads = [(s - k) // 2 for s, k in zip(sizes, kernel.shape[1:], strict=True)]
    return nn.functional.pad(kernel, [p for pad in reversed(pads) for p in (pad, pad)])
