"""Small depthwise-separable networks on Fashion-MNIST: dense, narrower, and pruned gradually while they are trained.

All arms get the same number of steps, the same schedule, and the best of the same learning rates, chosen on images
that the short tuning runs did not see, with a seed of its own.  Training runs on one thread.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from _fashion_mnist import MEAN, STD, accuracy, fashion
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._timing import threads
from quernel.nn.functional import magnitude_mask
from quernel.train import GradualMagnitudePruner

STEPS, BATCH, WEIGHT_DECAY, WARM_UP = 1600, 64, 5e-4, 0.15
TUNING_STEPS, TUNING_SEED, HELD_OUT, RATES = 300, 99, 10_000, (0.1, 0.2, 0.4)
SPARSITY, EVERY = 0.9, 20
WIDTHS = ((32, 64, 2), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 1))


def network(width: float = 1.0) -> nn.Sequential:
    """Return five depthwise-separable blocks of 64 to 256 channels, times ``width``."""

    def wide(channels: int) -> int:
        return round(channels * width)

    def followed(conv: nn.Conv2d) -> list[nn.Module]:
        return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)]

    layers = followed(nn.Conv2d(1, wide(32), 3, 2, 1, bias=False))
    for inputs, outputs, stride in WIDTHS:
        first = wide(inputs)
        layers += followed(nn.Conv2d(first, first, 3, stride, 1, groups=first, bias=False))
        layers += followed(nn.Conv2d(first, wide(outputs), 1, bias=False))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide(256), 10))


def nonzeros(model: nn.Module) -> int:
    """Return how many parameters are not zero."""
    return sum(int((p != 0).sum()) for p in model.parameters())


@functools.cache
def narrow_width(weights: int) -> float:
    """Return the smallest width, in hundredths, with at least so many parameters."""
    return next(w / 100 for w in range(10, 101) if sum(p.numel() for p in network(w / 100).parameters()) >= weights)


@functools.cache
def normalised(split: str) -> tuple[Tensor, Tensor]:
    """Return images less the mean pixel, over the pixels' spread, and labels."""
    x, y = fashion(split)
    return (x - MEAN) / STD, y


def fit(arm: str, rate: float, seed: int, steps: int, images: int, width: float) -> nn.Module:
    """Train with momentum and one cycle of the learning rate on the first ``images`` images, mirrored half the time."""
    torch.manual_seed(seed)
    x, y = (t[:images] for t in normalised("train"))
    model = network(width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=WARM_UP)
    options = {"final": SPARSITY, "every": EVERY}
    pruner = GradualMagnitudePruner.for_pointwise(model, steps, **options) if arm == "sparse" else None
    draw = np.random.default_rng(seed)
    order = np.concatenate([draw.permutation(images) for _ in range(-(-steps * BATCH // images))])
    with threads(1):
        for rows in np.split(order[: steps * BATCH], steps):
            batch = x[torch.from_numpy(rows)].contiguous(memory_format=torch.channels_last)
            batch = batch.flip(3) if draw.random() < 0.5 else batch
            optimizer.zero_grad()
            F.cross_entropy(model(batch), y[torch.from_numpy(rows)]).backward()
            if pruner is None:
                optimizer.step()
            else:
                pruner.step(optimizer)
            schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()


@functools.cache
def best_rate(arm: str, width: float) -> float:
    """Return the rate with the best held-out accuracy after a short run; the same choice for every arm."""
    x, y = (t[-HELD_OUT:] for t in normalised("train"))

    def judged(rate: float) -> float:
        return accuracy(fit(arm, rate, TUNING_SEED, TUNING_STEPS, len(fashion("train")[0]) - HELD_OUT, width), x, y)

    return max(RATES, key=judged)


@functools.cache
def trained(arm: str, seed: int) -> nn.Module:
    """Return a "dense", "sparse" or "narrow" network; narrow is dense with as many weights as sparse has nonzeros."""
    width = narrow_width(nonzeros(trained("sparse", seed))) if arm == "narrow" else 1.0
    return fit(arm, best_rate(arm, width), seed, STEPS, len(fashion("train")[0]), width)


def pruned_at_once(model: nn.Module) -> nn.Module:
    """Return a copy without the smallest 90 % of the weights of each 1x1 convolution."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1):
            layer.weight.data *= magnitude_mask(layer.weight, SPARSITY)
    return model
