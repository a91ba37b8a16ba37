"""``LSNet``: a light vision network that alternates depthwise 3x3 convolutions with ``LSConv`` (arXiv 2503.23135).

    block   x = SE(Mixer(x));  x = x + FFN(x)

Blocks with even index mix by BN(DW_{3x3}(x)) + BN(DW_{1x1}(x)) + x and squeeze-excite; odd ones by ``LSConv``, in the
fourth stage by attention with learned distances.  ``reparameterize()`` folds all of it into plain convolutions.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_int
from quernel.nn import ChannelsFirst, LSConv, Mixer
from quernel.nn._described import layer_config, layer_from_config
from quernel.nn.conv.large_small import ConvNorm
from quernel.nn.functional import fold_batch_norm

STEM_STRIDES = (1, 2, 4, 8)
KEY_DIM = 16
ATTENTION_STAGE = 3
# Widths, depths and heads of the published variants.
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "t": ((64, 128, 256, 384), (0, 2, 8, 10), (3, 3, 3, 4)),
    "s": ((96, 192, 320, 448), (1, 2, 8, 10), (3, 3, 3, 4)),
    "b": ((128, 256, 384, 512), (4, 6, 8, 10), (3, 3, 3, 4)),
}


def _example() -> dict[str, Any]:
    @seeded
    def make() -> LSNet:
        return LSNet(32, (8, 8, 16, 16), (0, 2, 1, 2), (1, 1, 1, 2), num_classes=3, stem_stride=2)

    return {"make": make, "input": lambda generator: (torch.randn(2, 3, 32, 32, generator=generator),)}


class RepDepthwise(nn.Module):
    """BN(3x3 depthwise) + BN(1x1 depthwise) + x, which is one 3x3 convolution in eval mode."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.conv1 = ConvNorm(dim, dim, 3, groups=dim), ConvNorm(dim, dim, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.conv1(x) + x
        return y

    def folded(self) -> nn.Conv2d:
        """Return the one convolution."""
        conv, point = self.conv.folded(), self.conv1.folded()
        with torch.no_grad():
            conv.weight[:, :, 1:2, 1:2] += point.weight + 1.0
            conv.bias += point.bias  # type: ignore[operator]
        return conv


class SqueezeExcite(nn.Module):
    """x times a number a channel, from the mean over places by two 1x1 convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, int(dim / 4 + 4) // 8 * 8)
        self.conv_reduce, self.conv_expand = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.conv_expand(F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(scale)


class Ffn(nn.Module):
    """1x1 convolution C -> 2C and BN, ReLU, 1x1 convolution 2C -> C and a BN that begins as zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1: nn.Module = ConvNorm(dim, 2 * dim)
        self.pw2: nn.Module = ConvNorm(2 * dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pw2(F.relu(self.pw1(x)))
        return y

    def fold_(self) -> None:
        self.pw1, self.pw2 = _folded(self.pw1), _folded(self.pw2)


class GridAttention(nn.Module):
    """Softmax attention on a square grid: queries filtered by 3x3, a learned bias a head and distance (|dy|, |dx|)."""

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.side, self.keys = num_heads, side, num_heads * KEY_DIM
        self.qkv: nn.Module = ConvNorm(dim, 2 * self.keys + dim)
        self.dw: nn.Module = ConvNorm(self.keys, self.keys, 3, groups=self.keys)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, norm_init=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, side * side))
        places = torch.arange(side * side, device="cpu")
        rows, columns = places // side, places % side
        distances = (rows[:, None] - rows).abs() * side + (columns[:, None] - columns).abs()
        self.register_buffer("attention_bias_idxs", distances)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if (height, width) != (self.side, self.side):
            raise QuernelError(
                f"attention was built for a grid of {self.side} x {self.side}, which img_size gives; got {height} x "
                f"{width}. Build LSNet with the img_size of square images that it will see"
            )
        q, k, v = self.qkv(x).split([self.keys, self.keys, channels], dim=1)
        # (B, heads, D, N) each
        q, k, v = (t.unflatten(1, (self.num_heads, -1)).flatten(3) for t in (self.dw(q), k, v))
        logits = (q.mT @ k) * KEY_DIM**-0.5 + self.attention_biases[:, self.attention_bias_idxs]
        y = v @ logits.softmax(-1).mT
        out: Tensor = self.proj(y.reshape(batch, channels, height, width))
        return out

    def fold_(self) -> None:
        self.qkv, self.dw, self.proj[1] = _folded(self.qkv), _folded(self.dw), _folded(self.proj[1])


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.m(x)
        return y


class LSNetBlock(nn.Module):
    """Mixing, squeeze-excite or nothing, and a residual perceptron; (B, C, H, W)."""

    def __init__(self, mixer: nn.Module, dim: int, *, squeeze: bool) -> None:
        super().__init__()
        self.mixer, self.se = mixer, SqueezeExcite(dim) if squeeze else nn.Identity()
        self.ffn = Residual(Ffn(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Mixers take channels last: views of each other, whatever the memory format.
        last = isinstance(self.mixer, Mixer)
        mixed = self.mixer(x.movedim(1, -1)).movedim(-1, 1) if last else self.mixer(x)
        y: Tensor = self.ffn(self.se(mixed))
        return y

    def fold_(self) -> None:
        if isinstance(self.mixer, Mixer | ChannelsFirst):
            self.mixer = self.mixer.fuse()
        elif isinstance(self.mixer, RepDepthwise):
            self.mixer = self.mixer.folded()
        elif isinstance(self.mixer, Residual):
            self.mixer.m.fold_()  # type: ignore[operator]
        self.ffn.m.fold_()  # type: ignore[operator]


class NormLinear(nn.Sequential):
    """A batch norm (``bn``) and a linear layer (``l``)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.02), nn.init.zeros_(linear.bias)
        super().__init__(OrderedDict(bn=nn.BatchNorm1d(dim), l=linear))

    def folded(self) -> nn.Linear:
        """Return the one linear layer that computes the same in eval mode."""
        norm: Any = self.bn
        linear: Any = self.l
        new = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
        eye = torch.eye(linear.in_features, device=linear.weight.device, dtype=torch.float64)
        with torch.no_grad():
            scale, shift = fold_batch_norm(
                eye, None, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            new.weight.copy_(linear.weight.double() * scale.diagonal())
            new.bias.copy_(linear.bias.double() + linear.weight.double() @ shift)
        return new.train(self.training)


@register(
    "lsnet",
    pillar="models",
    contract="model",
    paper="2503.23135",
    status="experimental",
    headline=False,
    example=_example,
)
class LSNet(nn.Module):
    """The vision network, (B, channels, H, W) to class logits; published weights load by name.

    Parameters
    ----------
    img_size : int, default=224
        Side of the square images; the biases of attention belong to its grid.
    embed_dims, depths, heads : sequence of int
        Channels, blocks and heads of the stages, those of ``lsnet_t`` by default; heads are used in the fourth alone.
    num_classes : int, default=1000
    stem_stride : {8, 4, 2, 1}, default=8
        By how much the stem of three 3x3 convolutions reduces the sides.
    distillation : bool, default=False
        A second head.  Training mode returns the logits of both, eval mode their mean.
    in_channels : int, default=3
    mixer : callable dim -> module, optional
        Another mixer in the place of ``LSConv``: a ``Mixer``, or a layer over (B, C, H, W); with its own residual.

    Notes
    -----
    Runs fastest on CPUs with ``model.to(memory_format=torch.channels_last)`` and images in that format.  The scales of
    the last norms of perceptrons and attention begin as zero, as published.

    References
    ----------
    Wang et al., "LSNet: See Large, Focus Small", arXiv 2503.23135, CVPR 2025.

    Examples
    --------
    >>> import torch
    >>> net = LSNet(32, (16, 32), (1, 2), (1, 1), num_classes=10, stem_stride=2).eval()
    >>> net.reparameterize()(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        img_size: int = 224,
        embed_dims: Sequence[int] = VARIANTS["t"][0],
        depths: Sequence[int] = VARIANTS["t"][1],
        heads: Sequence[int] = VARIANTS["t"][2],
        num_classes: int = 1000,
        stem_stride: int = 8,
        distillation: bool = False,
        *,
        in_channels: int = 3,
        mixer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= len(embed_dims) == len(depths) == len(heads) <= 4:
            raise QuernelError(
                "embed_dims, depths and heads must have one value for each of 1 to 4 stages; got "
                f"{list(embed_dims)}, {list(depths)} and {list(heads)}"
            )
        if stem_stride not in STEM_STRIDES:
            raise QuernelError(f"stem_stride must be one of 8, 4, 2 and 1; got {stem_stride!r}")
        check_int("img_size", img_size, low=1), check_int("num_classes", num_classes, low=1)
        for dim, depth, count in zip(embed_dims, depths, heads, strict=True):
            check_int("embed_dims", dim, low=4), check_int("depths", depth, low=0), check_int("heads", count, low=1)
        if len(embed_dims) > ATTENTION_STAGE and embed_dims[ATTENTION_STAGE] % heads[ATTENTION_STAGE]:
            raise QuernelError(
                f"heads must divide the channels of the fourth stage, {embed_dims[ATTENTION_STAGE]}; got "
                f"{heads[ATTENTION_STAGE]}"
            )
        if mixer is not None and not callable(mixer):
            raise QuernelError(
                f"mixer must be a callable dim -> module; got {mixer!r}. Use a function around make_mixer"
            )
        self._config: dict[str, Any] = {
            "img_size": img_size, "embed_dims": list(embed_dims), "depths": list(depths), "heads": list(heads),
            "num_classes": num_classes, "stem_stride": stem_stride,
            "distillation": check_bool("distillation", distillation),
            "in_channels": check_int("in_channels", in_channels, low=1),
        }  # fmt: skip
        self.fused = False
        first, halvings = embed_dims[0], stem_stride.bit_length() - 1
        widths, strides = (in_channels, first // 4, first // 2, first), [2] * halvings + [1] * (3 - halvings)
        stem = [ConvNorm(widths[i], widths[i + 1], 3, strides[i]) for i in range(3)]
        self.patch_embed = nn.Sequential(stem[0], nn.ReLU(), stem[1], nn.ReLU(), stem[2])
        side = -(-img_size // stem_stride)
        for stage, (dim, depth, count) in enumerate(zip(embed_dims, depths, heads, strict=True)):
            layers: list[nn.Module] = []
            if stage > 0:
                before, side = embed_dims[stage - 1], -(-side // 2)
                layers += [ConvNorm(before, before, 3, 2, groups=before), ConvNorm(before, dim)]
            for index in range(depth):
                odd = index % 2 == 1
                if not odd:
                    mixing: nn.Module = RepDepthwise(dim)
                elif stage == ATTENTION_STAGE:
                    mixing = Residual(GridAttention(dim, count, side))
                else:
                    mixing = LSConv(dim) if mixer is None else mixer(dim)
                layers.append(LSNetBlock(mixing, dim, squeeze=not odd))
            setattr(self, f"blocks{stage + 1}", nn.Sequential(*layers))
        self.head: nn.Module = NormLinear(embed_dims[-1], num_classes)
        self.head_dist: nn.Module | None = NormLinear(embed_dims[-1], num_classes) if distillation else None

    def _stages(self) -> list[Any]:
        return [getattr(self, f"blocks{stage + 1}") for stage in range(len(self._config["depths"]))]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map before the head."""
        x = self.patch_embed(x)
        for stage in self._stages():
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Any:
        """Return class logits; with distillation in training mode, a pair of them."""
        pooled = self.forward_features(x).mean((2, 3))
        logits = self.head(pooled)
        if self.head_dist is None:
            return logits
        other = self.head_dist(pooled)
        return (logits, other) if self.training else (logits + other) / 2

    def reparameterize(self) -> Self:
        """Return a copy for inference, see ``reparameterize``."""
        if self.training:
            raise QuernelError("reparameterize() folds the running statistics of batch norms: call model.eval() first")
        new = copy.deepcopy(self)
        if not self.fused:
            new._fold_()
        return new

    def _fold_(self) -> None:
        self.fused = True
        for layers in (self.patch_embed, *self._stages()):
            for i, layer in enumerate(layers):
                if isinstance(layer, LSNetBlock):
                    layer.fold_()
                else:
                    layers[i] = _folded(layer)
        heads = [head.folded() for head in (self.head, self.head_dist) if isinstance(head, NormLinear)]
        with torch.no_grad():
            for other in heads[1:]:
                heads[0].weight.add_(other.weight).div_(2), heads[0].bias.add_(other.bias).div_(2)
        self.head, self.head_dist = heads[0], None

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, the mixers in the place of ``LSConv``, and whether it is folded."""
        blocks = [block for stage in self._stages()[:ATTENTION_STAGE] for block in stage]
        blocks = [block for block in blocks if isinstance(block, LSNetBlock)]
        mixers = [layer_config(block.mixer) for block in blocks if isinstance(block.se, nn.Identity)]
        return {**self._config, "mixers": mixers, "fused": self.fused}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        options = {name: value for name, value in config.items() if name not in ("mixers", "fused")}
        wanted = sum(depth // 2 for depth in options["depths"][:ATTENTION_STAGE])
        if len(config["mixers"]) != wanted:
            raise QuernelError(f"mixers must be one for every second block, {wanted}; got {len(config['mixers'])}")
        described = iter(config["mixers"])
        model = cls(mixer=lambda dim: layer_from_config(next(described)), **options)
        if config["fused"]:
            model._fold_()
        return model


def _folded(layer: nn.Module) -> nn.Module:
    return layer.folded() if isinstance(layer, ConvNorm) else layer


def reparameterize(model: LSNet) -> LSNet:
    """Return a copy for inference: every batch norm in its convolution, 3x3 + 1x1 + identity in one 3x3, one head.

    Raises
    ------
    QuernelError
        If the model is in training mode.
    """
    return model.reparameterize()


def lsnet_t(**options: Any) -> LSNet:
    """Return an untrained LSNet-T: 11.4 M parameters, 0.3 G multiply-adds at 224 x 224."""
    return _variant("t", options)


def lsnet_s(**options: Any) -> LSNet:
    """Return an untrained LSNet-S: 16.1 M parameters, 0.5 G multiply-adds."""
    return _variant("s", options)


def lsnet_b(**options: Any) -> LSNet:
    """Return an untrained LSNet-B: 23.2 M parameters, 1.3 G multiply-adds."""
    return _variant("b", options)


def _variant(name: str, options: dict[str, Any]) -> LSNet:
    dims, depths, heads = VARIANTS[name]
    return LSNet(**{"embed_dims": dims, "depths": depths, "heads": heads, **options})
