"""Small networks around any token mixer, and how all reproductions of mixers train them: images and characters.

``VisionNet``: stem, stages of ``MetaBlock``s with a 2x2 convolution of stride 2 between them, mean of the tokens.
``SequenceNet``: pixels or characters one by one, blocks of one width, a head a token or for the mean.  Every arm of a
comparison gets the same images, order, schedule and grid of learning rates; rates are chosen on images kept from the
training set with the first seed, and results are kept in the cache by their recipe.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _fashion_mnist import MEAN, STD, fashion
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.models._cached import folder_of
from quernel.nn import MetaBlock, Mixer

BATCH, WEIGHT_DECAY, SMOOTHING, WARM_UP = 64, 0.05, 0.05, 0.1
RATES = (1e-3, 3e-3)
VALIDATION = 2000
Make = Callable[[int, int], Mixer]  # (dim, stage) -> mixer


class VisionNet(nn.Module):
    """(B, channels, H, W) -> (B, 10) logits.

    ``mixer(dim, stage)`` makes the mixer of every block; ``side`` is the side of the first stage's grid for the images
    it is trained on; learned positions (``positions``) are resized to other grids.
    """

    def __init__(
        self,
        mixer: Make,
        dims: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] = (2, 2, 2),
        *,
        channels: int = 1,
        stride: int = 2,
        side: int | None = None,
        style: Any = "metaformer",
        positions: bool = False,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, dims[0], max(stride, 3), stride, padding=0 if stride > 3 else 1)
        self.positions = nn.Parameter(torch.randn(1, dims[0], side, side) * 0.02) if positions and side else None
        stages: list[nn.Module] = []
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            before = [] if stage == 0 else [_Down(dims[stage - 1], dim)]
            blocks = [MetaBlock(mixer(dim, stage), style, mlp_ratio=mlp_ratio) for _ in range(depth)]
            stages.append(nn.Sequential(*before, *blocks))
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.positions is not None:
            x = x + F.interpolate(self.positions, x.shape[-2:], mode="bilinear", align_corners=False)
        x = x.permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        y: Tensor = self.head(self.norm(x.mean((1, 2))))
        return y


class _Down(nn.Module):
    """Halve both sides: norm, then a 2x2 convolution of stride 2; channels last."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(before), nn.Conv2d(before, after, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y


class SequenceNet(nn.Module):
    """Blocks over a sequence: (B, T) characters -> (B, T, vocab) logits, or (B, T, 1) values -> (B, classes)."""

    def __init__(
        self,
        mixer: Make,
        dim: int = 64,
        depth: int = 2,
        *,
        vocab: int | None = None,
        classes: int = 10,
        length: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.vocab = vocab
        self.embed: nn.Module = nn.Linear(1, dim) if vocab is None else nn.Embedding(vocab, dim)
        self.positions = None if length is None else nn.Parameter(torch.randn(length, dim) * 0.02)
        self.blocks = nn.Sequential(*(MetaBlock(mixer(dim, i), mlp_ratio=mlp_ratio) for i in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab or classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        x = self.norm(self.blocks(x))
        y: Tensor = self.head(x if self.vocab else x.mean(1))
        return y


@functools.cache
def images(split: str, count: int | None = None, side: int = 28) -> tuple[Tensor, Tensor]:
    """Return normalised Fashion-MNIST, (n, 1, side, side), and labels; of "train" the first ``count``."""
    x, y = fashion("test" if split == "test" else "train")
    x = (x - MEAN) / STD
    if split == "validation":
        x, y = x[-VALIDATION:], y[-VALIDATION:]
    elif split == "train":
        x, y = x[: count or len(x) - VALIDATION], y[: count or len(y) - VALIDATION]
    if side != 28:
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    return x, y


def pixels(split: str, count: int | None = None, side: int = 28) -> tuple[Tensor, Tensor]:
    """Return ``images`` row by row, one pixel a token, (n, side * side, 1), and labels."""
    x, y = images(split, count, side)
    return x.flatten(1)[..., None], y


@functools.cache
def characters() -> tuple[int, dict[str, Tensor]]:
    """Return the number of characters of tinyshakespeare, and its parts as ids: train, validation, test."""
    texts = {split: data.load("tinyshakespeare", split=split).text for split in ("train", "validation", "test")}
    number = {c: i for i, c in enumerate(sorted(set("".join(texts.values()))))}
    return len(number), {split: torch.tensor([number[c] for c in text]) for split, text in texts.items()}


def groups_of(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return parameter groups: those of the mixers that ask for their own, and the rest."""
    groups = [g for module in model.modules() if isinstance(module, Mixer) for g in module.param_groups(rate)]
    taken = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [{"params": rest, "lr": rate}, *(group for group in groups if group["params"])]


Loss = Callable[[nn.Module, torch.Generator], Tensor]


def fitted(make: Callable[[], nn.Module], loss: Loss, *, steps: int, rate: float, seed: int) -> nn.Module:
    """Train with AdamW, a warm-up and a cosine rate; ``loss(model, generator)`` draws the batch of a step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(groups_of(model, rate), lr=rate, weight_decay=WEIGHT_DECAY)
        whole = [group["lr"] for group in optimizer.param_groups]
        for step in range(steps):
            share = min((step + 1) / (WARM_UP * steps), (1 + math.cos(math.pi * step / steps)) / 2)
            for group, lr in zip(optimizer.param_groups, whole, strict=True):
                group["lr"] = lr * share
            optimizer.zero_grad()
            loss(model, generator).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def image_loss(x: Tensor, y: Tensor) -> Loss:
    """Return the loss of a random batch of images."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return F.cross_entropy(model(x[rows]), y[rows], label_smoothing=SMOOTHING)

    return loss


def text_loss(ids: Tensor, length: int, batch: int) -> Loss:
    """Return the loss of random crops of a text."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(ids) - length - 1, (batch, 1), generator=generator)
        crops = ids[starts + torch.arange(length + 1)]
        return F.cross_entropy(model(crops[:, :-1]).flatten(0, 1), crops[:, 1:].flatten())

    return loss


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the percentage of right answers."""
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True))
    return 100 * right / len(x)


@torch.no_grad()
def text_loss_of(model: nn.Module, ids: Tensor, length: int, batch: int = 16) -> float:
    """Return the mean loss in nats over consecutive crops, the same for every model."""
    whole = (len(ids) - 1) // length * length
    inputs, wanted = ids[:whole].reshape(-1, length), ids[1 : whole + 1].reshape(-1, length)
    total = 0.0
    for x, y in zip(inputs.split(batch), wanted.split(batch), strict=True):
        total += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
    return total / whole


def kept(name: str, recipe: Mapping[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what was measured for this recipe, from the cache or now."""
    file: Path = folder_of(f"reproduction-{name}", recipe).with_suffix(".json")
    if not file.exists():
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"recipe": dict(recipe), "measured": found}), encoding="utf-8")
    held: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["measured"]
    return held


@functools.cache
def chosen_rate(
    trained: Callable[[str, float, int], nn.Module],
    kind: str,
    seed: int,
    held: Callable[[str], tuple[Tensor, Tensor]] = images,
) -> float:
    """Return the rate of ``RATES`` at which ``trained(kind, rate, seed)`` is most often right on validation images."""
    x, y = held("validation")
    return max(RATES, key=lambda rate: accuracy(trained(kind, rate, seed), x, y))
