"""``MetaNeXt``: blocks x + gamma MLP(BN(Mixer(x))); with ``InceptionDWConv2d`` it is InceptionNeXt (arXiv 2303.16900).

Stem: 4x4 convolution of stride 4 and BN; BN and a 2x2 convolution of stride 2 before the other stages; head: mean,
Linear C -> 3C, GELU, LayerNorm, Linear.  ``fuse()`` folds every BN and gamma into the convolution after or before it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_float, check_int
from quernel.nn import ChannelsFirst, DropPath, InceptionDWConv2d, Mixer, make_mixer
from quernel.nn._described import layer_config, layer_from_config
from quernel.nn.functional import fold_batch_norm

STEM_STRIDES = (1, 2, 4)
HEAD_RATIO = 3
MixerMaker = Callable[[int], nn.Module]


def _example() -> dict[str, Any]:
    @seeded
    def make() -> MetaNeXt:
        return MetaNeXt((1, 2), (8, 16), num_classes=3, stem_stride=2, drop_path=0.1, ls_init=0.5)

    return {"make": make, "input": lambda generator: (torch.randn(2, 3, 16, 16, generator=generator),)}


class ConvMlp(nn.Module):
    """1x1 convolution C -> hidden, GELU, 1x1 convolution hidden -> C."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class MetaNeXtBlock(nn.Module):
    """x + gamma MLP(BN(Mixer(x))) over (B, C, H, W): one residual, no activation before the perceptron.

    Parameters
    ----------
    token_mixer : nn.Module
        A ``Mixer``, or a layer over (B, C, H, W) such as a depthwise convolution.
    dim : int
        Channels.
    mlp_ratio : float, default=4.0
    drop_path : float, default=0.0
    ls_init : float, optional
        Initial gamma; None leaves it out.
    """

    gamma: nn.Parameter | None

    def __init__(
        self,
        token_mixer: nn.Module,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init: float | None = 1e-6,
    ) -> None:
        super().__init__()
        hidden = int(check_float("mlp_ratio", mlp_ratio, low=0.0, open_low=True) * dim)
        self.token_mixer = token_mixer
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.mlp, self.drop_path = ConvMlp(dim, hidden), DropPath(drop_path)
        self.gamma = None if ls_init is None else nn.Parameter(torch.full((dim,), float(ls_init)))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        # Mixers take channels last: views of each other, whatever the memory format.
        last = isinstance(self.token_mixer, Mixer)
        mixed = self.token_mixer(x.movedim(1, -1)).movedim(-1, 1) if last else self.token_mixer(x)
        y = self.mlp(self.norm(mixed))
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y)

    def fuse_(self) -> None:
        """Fold norm and gamma into the perceptron, in place."""
        # Not into the filters of the mixer: identity channels have none.
        self.norm = _folded_before(self.norm, self.mlp.fc1)
        if self.gamma is not None:
            with torch.no_grad():
                self.mlp.fc2.weight.mul_(self.gamma[:, None, None, None])
                self.mlp.fc2.bias.mul_(self.gamma)  # type: ignore[union-attr]
            self.gamma = None
        if isinstance(self.token_mixer, Mixer | ChannelsFirst):
            self.token_mixer = self.token_mixer.fuse()


class MetaNeXtStage(nn.Module):
    """Where it halves the sides: BN and a 2x2 convolution of stride 2; then blocks."""

    def __init__(self, before: int, dim: int, blocks: Sequence[nn.Module], halve: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if halve:
            self.downsample = nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, dim, 2, 2))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.downsample(x))
        return y


class MlpHead(nn.Module):
    """Mean over places, Linear C -> 3C, GELU, LayerNorm, Linear 3C -> classes."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        hidden = HEAD_RATIO * dim
        self.fc1, self.act = nn.Linear(dim, hidden), nn.GELU()
        self.norm, self.fc2 = nn.LayerNorm(hidden, eps=1e-6), nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.norm(self.act(self.fc1(x.mean((2, 3))))))
        return y


@register(
    "inceptionnext",
    pillar="models",
    contract="model",
    paper="2303.16900",
    status="experimental",
    headline=False,
    example=_example,
)
class MetaNeXt(nn.Module):
    """The vision network, (B, 3, H, W) to class logits; published InceptionNeXt weights load by name.

    Parameters
    ----------
    depths, dims : sequence of int
        Blocks and channels of the stages.
    mixers : str, callable, or a sequence of one a stage, default="inception"
        "inception", another name known to ``make_mixer``, or ``dim -> module``: a ``Mixer``, or a layer over
        (B, C, H, W).
    mlp_ratios : sequence of float, optional
        One a stage; 4 but 3 in the fourth by default.
    stem_stride : {4, 2, 1}, default=4
        4 cuts patches; 2 and 1, for small images, are 3x3 convolutions.
    in_channels : int, default=3
    num_classes : int, default=1000
    drop_path : float, default=0.0
        Of the last block; grows linearly from 0 at the first.
    ls_init : float, optional
        Initial gamma of the blocks, 1e-6 by default.

    Notes
    -----
    Runs fastest on CPUs with ``model.to(memory_format=torch.channels_last)`` and images in that format.  Weights of all
    convolutions and linear layers, those of mixers too, start from a normal distribution of 0.02, biases from zero.

    References
    ----------
    Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt", arXiv 2303.16900, CVPR 2024.

    Examples
    --------
    >>> import torch
    >>> net = MetaNeXt((1, 1), (16, 32), num_classes=10, stem_stride=2).eval()
    >>> net.fuse()(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mixers: str | MixerMaker | Sequence[str | MixerMaker] = "inception",
        mlp_ratios: Sequence[float] | None = None,
        *,
        stem_stride: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        ls_init: float | None = 1e-6,
    ) -> None:
        super().__init__()
        ratios = [4.0, 4.0, 4.0, 3.0][: len(depths)] if mlp_ratios is None else mlp_ratios
        makers = [mixers] * len(depths) if isinstance(mixers, str) or callable(mixers) else list(mixers)
        if not 1 <= len(depths) == len(dims) == len(ratios) == len(makers):
            raise QuernelError(
                "depths, dims, mlp_ratios and mixers must have one value a stage; got "
                f"{list(depths)}, {list(dims)}, {list(ratios)} and {len(makers)} mixers"
            )
        for depth, dim in zip(depths, dims, strict=True):
            check_int("depths", depth, low=1), check_int("dims", dim, low=1)
        if stem_stride not in STEM_STRIDES:
            raise QuernelError(f"stem_stride must be one of 4, 2 and 1; got {stem_stride!r}")
        check_int("num_classes", num_classes, low=1), check_int("in_channels", in_channels, low=1)
        check_float("drop_path", drop_path, low=0.0, high=1.0, open_high=True)
        if ls_init is not None:
            check_float("ls_init", ls_init)
        self._config: dict[str, Any] = {
            "depths": list(depths), "dims": list(dims), "mlp_ratios": [float(r) for r in ratios],
            "stem_stride": stem_stride, "in_channels": in_channels, "num_classes": num_classes,
            "drop_path": float(drop_path), "ls_init": None if ls_init is None else float(ls_init),
        }  # fmt: skip
        self.fused = False
        patch, pad = (4, 0) if stem_stride == 4 else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, dims[0], patch, stem_stride, padding=pad), nn.BatchNorm2d(dims[0])
        )
        total, stages, index = sum(depths), [], 0
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = []
            for _ in range(depth):
                rate = drop_path * index / max(total - 1, 1)
                blocks.append(MetaNeXtBlock(_mixer(makers[stage], dim), dim, ratios[stage], rate, ls_init))
                index += 1
            stages.append(MetaNeXtStage(dims[max(stage - 1, 0)], dim, blocks, halve=stage > 0))
        self.stages = nn.Sequential(*stages)
        self.head = MlpHead(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, H / 32, W / 32)
        """Return the map before the head."""
        y: Tensor = self.stages(self.stem(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits."""
        logits: Tensor = self.head(self.forward_features(x))
        return logits

    def fuse(self) -> Self:
        """Return a copy for inference without BN and gamma; its parameters are those of the convolutions alone.

        Raises
        ------
        QuernelError
            If the model is in training mode.
        """
        if self.training:
            raise QuernelError("fuse() folds the running statistics of batch norms: call model.eval() first")
        new = copy.deepcopy(self)
        if not self.fused:
            new._fuse_()
        return new

    def _fuse_(self) -> None:
        self.fused = True
        conv: Any = self.stem[0]
        norm: Any = self.stem[1]
        with torch.no_grad():
            weight, bias = fold_batch_norm(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            conv.weight.copy_(weight), conv.bias.copy_(bias)
        self.stem[1] = nn.Identity()
        stages: Any = self.stages
        for stage in stages:
            if isinstance(stage.downsample, nn.Sequential):
                stage.downsample[0] = _folded_before(*stage.downsample)
            for block in stage.blocks:
                block.fuse_()

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, the token mixer of every block, and whether it is fused."""
        stages: Any = self.stages
        mixers = [layer_config(block.token_mixer) for stage in stages for block in stage.blocks]
        return {**self._config, "mixers": mixers, "fused": self.fused}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        options = {name: value for name, value in config.items() if name not in ("mixers", "fused")}
        if len(config["mixers"]) != sum(options["depths"]):
            raise QuernelError(
                f"mixers must be one a block, {sum(options['depths'])}; got {len(config['mixers'])} of them"
            )
        described = iter(config["mixers"])
        model = cls(mixers=lambda dim: layer_from_config(next(described)), **options)
        if config["fused"]:
            model._fuse_()
        return model


def _mixer(maker: str | MixerMaker, dim: int) -> nn.Module:
    if callable(maker):
        return maker(dim)
    return InceptionDWConv2d(dim) if maker == "inception" else make_mixer(maker, dim)


def _folded_before(norm: Any, conv: Any) -> nn.Module:
    """Fold a batch norm into the unpadded convolution after it, in place, and return what takes its place."""
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        weight = conv.weight.double()
        conv.bias.copy_(conv.bias.double() + (weight * shift[:, None, None]).sum((1, 2, 3)))
        conv.weight.copy_(weight * scale[:, None, None])
    return nn.Identity()


def inceptionnext_atto(**options: Any) -> MetaNeXt:
    """Return an untrained InceptionNeXt-A: 4.2 M parameters, bands of 9 on a quarter of the channels each."""
    mixer = functools.partial(InceptionDWConv2d, band_kernel_size=9, branch_ratio=0.25)
    return MetaNeXt((2, 2, 6, 2), (40, 80, 160, 320), mixer, **options)


def inceptionnext_tiny(**options: Any) -> MetaNeXt:
    """Return an untrained InceptionNeXt-T: 28.1 M parameters."""
    return MetaNeXt((3, 3, 9, 3), (96, 192, 384, 768), **options)


def inceptionnext_small(**options: Any) -> MetaNeXt:
    """Return an untrained InceptionNeXt-S: 49.4 M parameters."""
    return MetaNeXt((3, 3, 27, 3), (96, 192, 384, 768), **options)


def inceptionnext_base(**options: Any) -> MetaNeXt:
    """Return an untrained InceptionNeXt-B: 86.7 M parameters."""
    return MetaNeXt((3, 3, 27, 3), (128, 256, 512, 1024), **options)
