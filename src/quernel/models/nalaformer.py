"""``NaLaFormer``: a vision backbone of norm-aware linear attention on large grids and softmax attention on small ones.

A stem of convolutions of stride 4, four stages with 3x3 convolutions of stride 2 between them, a block being

    x += dw(x);  x += g1 Attn(LN(x));  x += dw'(x);  x += g2 FFN(LN(x)),    FFN = Linear, GELU, y += dw(y), Linear

with depthwise 3x3 convolutions dw and learned scales g.  Stages 1 and 2 attend linearly, 3 and 4 by softmax, all with
rotary positions of the grid (arXiv 2506.21137).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_float, check_int, check_type
from quernel.nn import DropPath, GatedSoftmaxAttention, Mixer, NormAwareLinearAttention

EPS, HEAD = 1e-6, 1024


class Variant(NamedTuple):
    """A published size; ``scales`` are the initial values of g in each stage."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float
    scales: tuple[float, ...]
    drop_path: float


VARIANTS = {
    "XT": Variant((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 3.5, (1.0, 1.0, 1.0, 1.0), 0.1),
    "T": Variant((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 4.0, (1.0, 1.0, 1.0, 1.0), 0.1),
    "S": Variant((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 3.5, (1.0, 1.0, 1.0, 1.0), 0.15),
    "B": Variant((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 4.0, (1.0, 1.0, 1e-6, 1e-6), 0.4),
    "L": Variant((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 3.5, (1e-6, 1e-6, 1e-6, 1e-6), 0.55),
}


def _example() -> dict[str, Any]:
    def make() -> NaLaFormer:
        return NaLaFormer((8, 8, 8, 16), (1, 1, 1, 1), (1, 2, 1, 2), num_classes=3)

    return {"make": make, "input": lambda generator: (torch.randn(2, 3, 32, 32, generator=generator),)}


class _Depthwise(nn.Conv2d):
    """x + conv(x), depthwise 3x3 with bias; (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class NaLaBlock(nn.Module):
    """A block of NaLaFormer around a mixer of grids, (B, H, W, C) in and out.

    Parameters
    ----------
    mixer : Mixer
    mlp_ratio : float, default=4.0
        Hidden width of the perceptron over C.
    scale : float, default=1.0
        Initial value of g.
    drop_path : float, default=0.0
        Probability of leaving out a branch of a sample while training.
    """

    def __init__(self, mixer: Mixer, mlp_ratio: float = 4.0, scale: float = 1.0, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = check_type("mixer", mixer, Mixer).dim
        hidden = int(mlp_ratio * dim)
        self.attn, self.drop = mixer, DropPath(drop_path)
        self.local1, self.local2 = _Depthwise(dim), _Depthwise(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), _Depthwise(hidden), nn.Linear(hidden, dim))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), float(scale))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels, each after a small convolution."""
        x = self.local1(x)
        x = x + self.drop(self.scale1 * self.attn(self.norm1(x)))
        x = self.local2(x)
        y: Tensor = x + self.drop(self.scale2 * self.ffn(self.norm2(x)))
        return y


@register(
    "nalaformer",
    pillar="models",
    contract="model",
    paper="2506.21137",
    status="experimental",
    headline=False,
    example=_example,
)
class NaLaFormer(nn.Module):
    """The vision backbone, (B, 3, H, W) to class logits.

    Parameters
    ----------
    dims, depths, heads : sequence of four int
        Of the stages; ``NaLaFormer.variant("XT")`` and so on give the published ones.
    mlp_ratio : float, default=4.0
    num_classes : int, default=1000
    scales : sequence of four float, default=(1, 1, 1, 1)
        Initial value of the learned scales in each stage.
    drop_path : float, default=0.0
        Of the last block; grows linearly from 0 at the first.  Published: 0.1 (XT, T), 0.15 (S), 0.4 (B), 0.55 (L).

    References
    ----------
    Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, 2025.

    Examples
    --------
    >>> import torch
    >>> NaLaFormer.variant("XT", num_classes=10).eval()(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        for name, values in (("dims", dims), ("depths", depths), ("heads", heads), ("scales", scales)):
            if not isinstance(values, Sequence) or len(values) != 4:
                raise QuernelError(f"{name} must be four numbers, one a stage; got {values!r}")
            for value in values:
                check_float(name, value) if name == "scales" else check_int(name, value, low=1)
        if dims[0] % 2:
            raise QuernelError(f"dims must begin with an even number, as the stem begins with half of it; got {dims!r}")
        check_float("mlp_ratio", mlp_ratio, low=0.0, open_low=True)
        check_float("drop_path", drop_path, low=0.0, high=1.0, open_high=True)
        self._config = {
            "dims": list(dims), "depths": list(depths), "heads": list(heads), "mlp_ratio": mlp_ratio,
            "num_classes": check_int("num_classes", num_classes, low=1), "scales": list(scales), "drop_path": drop_path,
        }  # fmt: skip
        rates = iter(drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.stem = _stem(dims[0])
        self.merges = nn.ModuleList(_merge(before, after) for before, after in pairwise(dims))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    NaLaBlock(_mixer(stage, dims[stage], heads[stage]), mlp_ratio, scales[stage], next(rates))
                    for _ in range(depths[stage])
                )
            )
            for stage in range(4)
        )
        self.embed, self.norm = nn.Linear(dims[-1], HEAD), nn.BatchNorm2d(HEAD)
        self.head = nn.Linear(HEAD, num_classes)

    @classmethod
    def variant(cls, name: str, **options: Any) -> Self:
        """Return an untrained network of a published size: "XT", "T", "S", "B" or "L"."""
        if name not in VARIANTS:
            raise QuernelError(f"name must be one of {', '.join(VARIANTS)}; got {name!r}")
        v = VARIANTS[name]
        made: dict[str, Any] = {"mlp_ratio": v.mlp_ratio, "scales": v.scales, "drop_path": v.drop_path}
        return cls(v.dims, v.depths, v.heads, **(made | options))

    def forward_features(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, H / 32, W / 32, C)
        """Return the tokens of the last stage."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise QuernelError(f"x must be images (B, 3, H, W); got {tuple(x.shape)}")
        x = self.stem(x).permute(0, 2, 3, 1)
        for i, stage in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, classes)
        """Return class logits."""
        x = self.embed(self.forward_features(x)).permute(0, 3, 1, 2)
        logits: Tensor = self.head(F.silu(self.norm(x)).mean((2, 3)))
        return logits

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)


def _mixer(stage: int, dim: int, heads: int) -> Mixer:
    kind = NormAwareLinearAttention if stage < 2 else GatedSoftmaxAttention
    made: Mixer = kind(dim, heads, rope="2d")
    return made


def _stem(dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for after, stride in ((dim // 2, 2), (dim // 2, 1), (dim // 2, 1), (dim, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.GELU()]
        before = after
    return nn.Sequential(*layers[:-1])


def _merge(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after))
