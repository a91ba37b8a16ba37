"""Fashion-MNIST as every script takes it, a small convolutional net for it, and the share of right answers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from quernel import data

# Of the training pixels over 255.
MEAN, STD = 0.286, 0.353
SIDE = 28


@functools.cache
def fashion(split: str) -> tuple[Tensor, Tensor]:
    """Return pixels in 0..1, (n, 1, 28, 28) float32, and labels of "train" (60,000) or "test" (10,000)."""
    held = data.load("fashion-mnist", split=split)
    return torch.from_numpy(held.x).float().div_(255)[:, None], torch.from_numpy(held.y).long()


def convnet(width: int = 1) -> nn.Sequential:
    """Return a VGG-like net of five 3x3 convolutions with batch norms; 16 channels at first, times ``width``."""
    layers: list[nn.Module] = []
    before = 1
    for channels, pool in ((16, False), (16, True), (32, False), (32, True), (64, True)):
        layers += [nn.Conv2d(before, channels * width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(channels * width), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
        before = channels * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 9, 64 * width), nn.ReLU(), nn.Linear(64 * width, 10))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the percentage of right answers."""
    with torch.inference_mode():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(x)
