"""Networks to narrow, trained on Fashion-MNIST, and the two data-free rivals of feature merging.

Magnitude pruning keeps the channels with the largest rows (L1 norm); k-means folding (arXiv 2502.10216) averages the
rows of each cluster and adds the columns that read them.  Both go through the same channel groups, folded batch norms
and surgery as feature merging, so that only the choice of channels differs.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from _fashion_mnist import convnet, fashion
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.compress import Context, FeatureMerging
from quernel.compress.graph import channel_map
from quernel.compress.prune._merging import Merger, Rule
from quernel.compress.prune._surgery import cut, operate, read_tensors, with_folds

EPOCHS, BATCH, RATE = 2, 128, 1e-3
CONV_IMAGES = 20_000


def mlp(width: float = 1.0) -> nn.Sequential:
    """Return 784-1024-512-10 with ReLU, hidden layers scaled by ``width``."""
    first, second = int(1024 * width), int(512 * width)
    layers = (nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10))
    return nn.Sequential(nn.Flatten(), *layers)


@functools.cache
def trained(kind: str, width: int, seed: int) -> nn.Module:
    """Train a net with Adam and a cosine schedule."""
    torch.manual_seed(seed)
    model = {"mlp": mlp, "convnet": convnet}[kind](width)
    x, y = fashion("train")
    if kind == "convnet":
        x, y = x[:CONV_IMAGES], y[:CONV_IMAGES]
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = torch.from_numpy(generator.permutation(len(x)))
        for rows in torch.split(order[: len(x) // BATCH * BATCH], BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def narrowed(model: nn.Module, how: str, kept: float, example: Tensor, seed: int = 0) -> nn.Module:
    """Return a copy with this share of every group's channels, chosen by "merge", "mean", "fold" or "magnitude"."""
    work = copy.deepcopy(model)
    if how in ("merge", "mean"):
        options: dict[str, Any] = {"beta": 1.0, "max_ratio": 1 - kept, "scale": "sum" if how == "merge" else "mean"}
        method = FeatureMerging(**options)
        method.apply(work, method.plan(work, Context(example_inputs=example)))
        return work
    channels = channel_map(work, example)
    folds = dict(channels.folds)
    groups = [with_folds(group, folds) for group in channels.groups]
    names = tuple(dict.fromkeys(name for group in groups for name in group.names))
    merger = Merger(read_tensors(work, names, folds), groups, Rule(scale="mean"))
    for space in merger.spaces:
        # As many as merging leaves, which never takes more than its share.
        left = space.group.size - int((1 - kept) * space.group.size + 1e-9)
        rows = np.concatenate(
            [merger.tensors[s.tensor][s.index[:, 0]].reshape(space.group.size, -1) for s in space.group.producers],
            axis=1,
        )
        if how == "magnitude":
            space.alive[np.argsort(-np.abs(rows).sum(axis=1), kind="stable")[left:]] = False
        else:
            labels = KMeans(left, n_init=1, max_iter=30, random_state=seed).fit(rows).labels_
            for label in range(left):
                first, *others = np.flatnonzero(labels == label).tolist()
                for other in others:
                    merger.merge(space, first, other)
    operate(work, cut(work, merger.tensors, merger.spaces, folds))
    return work
