"""``SOFT``: a vision backbone of softmax-free attention in three stages and a softmax transformer in the last.

Each stage embeds patches by 3x3 convolutions of stride 2 (4 in all at first) and adds learned positions, which are
resized to other grids.  Stages 1 to 3 are blocks with norms behind their sublayers, x = LN(x + Attn(x)),
x = LN(x + FFN(x)), and 49 landmarks for images of 224 x 224; stage 4 has a class token (arXiv 2207.03341).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_float, check_int
from quernel.nn import DropPath, MetaBlock, SoftmaxAttention, SoftmaxFreeAttention
from quernel.nn.functional.nystrom import Inverse, Norm

RATIOS, SKIPS = (8, 4, 2), (9, 5, 3)
# Depths, heads and widths of the published variants.
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((1, 2, 3, 2), (2, 4, 10, 16), (64, 128, 320, 512)),
    "small": ((1, 3, 20, 4), (2, 4, 10, 16), (64, 128, 320, 512)),
    "medium": ((1, 3, 29, 5), (2, 4, 9, 16), (64, 128, 288, 512)),
    "large": ((1, 3, 40, 5), (2, 4, 10, 16), (64, 128, 320, 512)),
}
SIDE = 224
# Of the norms from the last stage on; the others have torch's 1e-5.
CLASS_EPS = 1e-6


def _example() -> dict[str, Any]:
    def make() -> SOFT:
        return SOFT((1, 1, 1, 1), (8, 8, 8, 16), (1, 2, 2, 2), num_classes=3, side=32)

    return {"make": make, "input": lambda generator: (torch.randn(2, 3, 32, 32, generator=generator),)}


class SoftTransformerBlock(nn.Module):
    """x = LN(x + Attn(x)), x = LN(x + FFN(x)), FFN of width 4 C with the tanh form of GELU; (B, H, W, C)."""

    def __init__(self, mixer: SoftmaxFreeAttention, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = mixer.dim
        self.attn, self.drop = mixer, DropPath(drop_path)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        y: Tensor = self.norm2(x + self.drop(self.ffn(x)))
        return y


def _embed(before: int, *channels: tuple[int, int]) -> nn.Sequential:
    """Return 3x3 convolutions, each with norm and ReLU, of the given (channels, stride)."""
    layers: list[nn.Module] = []
    for after, stride in channels:
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers)


@register(
    "soft-attention",
    pillar="models",
    contract="model",
    paper="2207.03341",
    status="experimental",
    headline=False,
    example=_example,
)
class SOFT(nn.Module):
    """The vision backbone, (B, 3, H, W) to class logits; sides are multiples of 32.

    Parameters
    ----------
    depths, dims, heads : sequence of four int
        Of the stages; ``SOFT.variant("tiny")`` and so on give the published ones.
    num_classes : int, default=1000
    side : int, default=224
        Side of the images that positions are learned for.
    inverse, norm
        As in ``SoftmaxFreeAttention``.
    drop_path : float, default=0.0
        Of the last block; grows linearly from 0 at the first.

    References
    ----------
    Lu et al., "Softmax-free Linear Transformers", arXiv 2207.03341, 2024.

    Examples
    --------
    >>> import torch
    >>> SOFT.variant("tiny", num_classes=10).eval()(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        heads: Sequence[int],
        *,
        num_classes: int = 1000,
        side: int = SIDE,
        inverse: Inverse = "cholesky",
        norm: Norm = "bottleneck",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        for name, values in (("depths", depths), ("dims", dims), ("heads", heads)):
            if not isinstance(values, Sequence) or len(values) != 4:
                raise QuernelError(f"{name} must be four integers, one a stage; got {values!r}")
            for value in values:
                check_int(name, value, low=1)
        if check_int("side", side, low=32) % 32:
            raise QuernelError(f"side must be a multiple of 32; got {side}")
        check_int("num_classes", num_classes, low=1)
        check_float("drop_path", drop_path, low=0.0, high=1.0, open_high=True)
        self._config = {
            "depths": list(depths), "dims": list(dims), "heads": list(heads), "num_classes": num_classes, "side": side,
            "inverse": inverse, "norm": norm, "drop_path": drop_path,
        }  # fmt: skip
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        embeds, positions, stages = [], [], []
        for i in range(4):
            steps = ((32, 2), (32, 1), (dims[0], 2)) if i == 0 else ((dims[i], 2),)
            embeds.append(_embed(3 if i == 0 else dims[i - 1], *steps))
            grid = side // 4 // 2**i
            positions.append(nn.Parameter(torch.empty(1, dims[i], grid, grid)))
            blocks: list[nn.Module] = []
            for _ in range(depths[i]):
                rate = rates.pop(0)
                if i == 3:
                    blocks.append(MetaBlock(SoftmaxAttention(dims[i], heads[i]), drop_path=rate, eps=CLASS_EPS))
                    continue
                mixer = SoftmaxFreeAttention(
                    dims[i], heads[i], RATIOS[i], conv_size=SKIPS[i], inverse=inverse, norm=norm
                )
                blocks.append(SoftTransformerBlock(mixer, rate))
            stages.append(nn.Sequential(*blocks))
        self.embeds, self.positions, self.stages = (
            nn.ModuleList(embeds),
            nn.ParameterList(positions),
            nn.ModuleList(stages),
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, dims[3]))
        self.class_position = nn.Parameter(torch.empty(1, 1, dims[3]))
        self.norm, self.head = nn.LayerNorm(dims[3], eps=CLASS_EPS), nn.Linear(dims[3], num_classes)
        for parameter in (*self.positions, self.class_token, self.class_position):
            nn.init.trunc_normal_(parameter, std=0.02)

    @classmethod
    def variant(cls, name: str, **options: Any) -> Self:
        """Return an untrained network of a published size: "tiny", "small", "medium" or "large"."""
        if name not in VARIANTS:
            raise QuernelError(f"name must be one of {', '.join(VARIANTS)}; got {name!r}")
        depths, heads, dims = VARIANTS[name]
        return cls(depths, dims, heads, **options)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, classes)
        """Return class logits."""
        if x.ndim != 4 or x.shape[-2] % 32 or x.shape[-1] % 32:
            raise QuernelError(f"x must be images (B, 3, H, W) of sides that 32 divides; got {tuple(x.shape)}")
        for i, (embed, position, stage) in enumerate(zip(self.embeds, self.positions, self.stages, strict=True)):
            x = embed(x)
            x = x + F.interpolate(position, x.shape[-2:], mode="bilinear", align_corners=False)
            x = x.permute(0, 2, 3, 1)
            if i == 3:
                break
            x = stage(x).permute(0, 3, 1, 2)
        first = (self.class_token + self.class_position).expand(len(x), -1, -1)
        tokens = self.stages[3](torch.cat([first, x.flatten(1, 2)], dim=1))
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)
