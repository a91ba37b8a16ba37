"""The block of Terminator: slow nets that make kernels, fast nets that they act on, no residuals (arXiv 2401.17948).

``SFNEBlock`` mixes an image with itself by generated global and local weights in ten branches, joins them by a 1x1
convolution and standardises the result in groups, half of them over the batch and half over the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_int
from quernel.nn.conv.hyperzzw import EPS, STATS, HyperZZWGlobal, HyperZZWLocal, two_elementwise
from quernel.nn.magnet import MAGNet

# Kernel sizes of the four local branches, and the groups of the standardisation.
LOCAL_SIZES, GROUPS = (3, 9, 5, 7), 12
BRANCHES = 10


def pointwise(before: int, after: int, nonlinearity: Literal["relu", "linear"] | None = None) -> nn.Conv2d:
    """Return a 1x1 convolution, normal weights by default, uniform ones for a named nonlinearity, zero bias."""
    conv = nn.Conv2d(before, after, 1)
    if nonlinearity is None:
        nn.init.kaiming_normal_(conv.weight)
    else:
        nn.init.kaiming_uniform_(conv.weight, nonlinearity=nonlinearity)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class RGU(nn.Module):
    """L_y(GELU(IS(L_k x * L_q(L_v x))) + P): a gate of 1x1 convolutions with a learned map P; (B, C, H, W)."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value, self.out = (pointwise(dim, dim, "linear") for _ in range(4))
        self.map = nn.Parameter(torch.zeros(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.instance_norm(self.key(x) * self.query(self.value(x)), eps=EPS)
        y: Tensor = self.out(F.gelu(gate) + self.map)
        return y


class HyperChannelInteraction(nn.Module):
    """x * sigmoid(z * W * z), z the means of the channels, W from a slow net over the channels; (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int = 32, layers: int = 2, omega0: float = 1.0) -> None:
        super().__init__()
        self.slow = MAGNet(1, 1, dim, hidden, layers, omega0)

    def score(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C)
        """Return z * W * z."""
        return two_elementwise(self.slow()[:, 0], x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.score(x).sigmoid()[..., None, None]


class HyperInteraction(nn.Module):
    """x * sigmoid(places * channels), both scored from another tensor by slow nets; two (B, C, H, W)."""

    def __init__(self, dim: int, size: int, hidden: tuple[int, int] = (64, 16), omega0: float = 1.0) -> None:
        super().__init__()
        self.places = MAGNet(1, 2, size, hidden[0], 2, omega0)
        self.channels = HyperChannelInteraction(dim, hidden[1], 2, omega0)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        places = two_elementwise(self.places(), y.mean(1, keepdim=True))  # (B, 1, H, W)
        return x * (places * self.channels.score(y)[..., None, None]).sigmoid()


class GIBS(nn.Module):
    """Standardise twelve groups of channels, the even ones over the batch and the odd ones over each image.

    Parameters
    ----------
    dim : int
        A multiple of 12.
    eval_stats : {"running", "batch"}, default="running"
        What the even groups use in eval mode: running estimates, or the batch itself.
    """

    def __init__(self, dim: int, eval_stats: Literal["running", "batch"] = "running") -> None:
        super().__init__()
        if check_int("dim", dim, low=1) % GROUPS:
            raise QuernelError(f"dim must be a multiple of {GROUPS}; got {dim}")
        check_choice("eval_stats", eval_stats, STATS)
        self.norm = nn.BatchNorm2d(dim // 2, eps=EPS, affine=False, track_running_stats=eval_stats == "running")

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        groups = x.unflatten(1, (GROUPS // 2, 2, -1))
        even, odd = (groups[:, :, i].flatten(1, 2) for i in range(2))
        both = torch.stack(
            [t.unflatten(1, (GROUPS // 2, -1)) for t in (self.norm(even), F.instance_norm(odd, eps=EPS))], dim=2
        )
        return both.flatten(1, 3)


class SFNEBlock(nn.Module):
    """A block of slow and fast nets, (B, C, size, size) to (B, C * factor, size, size).

    Parameters
    ----------
    dim : int
        Channels; ``dim * factor`` is a multiple of 12.
    size : int
        Side of the maps.
    factor : int
        By how much the channels grow.
    layers : int, default=2
        Of the global slow net.
    earlier : sequence of int, default=()
        Channels of outputs of up to two earlier blocks that are joined with the branches, the later block first.
    dropout : float, default=0.0
        Of whole channels.
    omega0 : float, default=1.0
    context, eval_stats
        As in ``HyperZZWLocal``.
    modulated : bool, default=True
        Whether the input modulates the global kernel; without it, W_g acts as it is (an ablation).
    """

    def __init__(
        self,
        dim: int,
        size: int,
        factor: int,
        *,
        layers: int = 2,
        earlier: Sequence[int] = (),
        dropout: float = 0.0,
        omega0: float = 1.0,
        context: Literal["sample", "batch", "none"] = "sample",
        eval_stats: Literal["running", "batch"] = "running",
        modulated: bool = True,
    ) -> None:
        super().__init__()
        if len(earlier) > 2:
            raise QuernelError(f"earlier must name at most two blocks; got {list(earlier)}")
        self.dim, self.factor, self.modulated = dim, check_int("factor", factor, low=1), modulated
        self.world = HyperZZWGlobal(dim, size, hidden=64, layers=layers, omega0=omega0)
        self.local = nn.ModuleList(
            HyperZZWLocal(dim, k, context, hidden=32, omega0=omega0, eval_stats=eval_stats) for k in LOCAL_SIZES
        )
        self.weights_gate, self.input_gate = RGU(dim, size), RGU(dim, size)
        self.mix = pointwise(dim, dim)
        self.channels = HyperChannelInteraction(dim, omega0=omega0)
        self.interaction = HyperInteraction(dim, size, omega0=omega0)
        self.join = pointwise(dim * (BRANCHES + len(earlier)), dim * factor)
        self.norm, self.drop = GIBS(dim * factor, eval_stats), nn.Dropout2d(dropout)
        self.bias = nn.Parameter(torch.zeros(()))

    def kernel(self) -> Tensor:
        """Return the global kernel W_g, (1, C, H, W)."""
        return self.world.kernel()

    def forward(self, x: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        kernel = self.kernel().to(x.dtype)
        weights = x * kernel if self.modulated else kernel.expand_as(x)
        fast = F.instance_norm(self.weights_gate(weights) + self.input_gate(x), eps=EPS)
        mix = F.instance_norm(self.mix(x), eps=EPS)
        channels = F.instance_norm(self.channels(x), eps=EPS)
        # Cast convolutions answer in their own dtype, whatever they are given; a product of maps takes one.
        fast, mix, channels = (branch.to(weights.dtype) for branch in (fast, mix, channels))
        o, o_mix, o_channels = (weights @ branch for branch in (fast, mix, channels))
        pairs = ((channels, x), (x, channels), (x, mix), (mix, x))
        nets: Any = self.local
        l1, l2, l3, l4 = (net.from_source(*pair) for net, pair in zip(nets, pairs, strict=True))
        before = [tiled(y, self.dim) for y in earlier]
        first, second = before[:1], before[1:]
        gated = o.sigmoid() * o
        branches = [o, l2, *first, fast, o_mix, l1, gated, l3, o_channels, l4, *second, self.interaction(o, x)]
        y: Tensor = self.drop(F.gelu(self.norm(self.join(torch.cat(branches, 1)))) + self.bias)
        return y


def tiled(x: Tensor, channels: int) -> Tensor:  # (B, c, H, W) -> (B, channels, H, W)
    """Repeat the channels: channel i of the result is channel i mod c."""
    return x.repeat(1, -(-channels // x.shape[1]), 1, 1)[:, :channels]
