"""Networks on tables for ``representer-sketch.py``: the teacher, what it is pruned to, and small students of it.

Every peer is tuned on a validation part of the training rows as the sketch is, and stored in a form that really has the
bytes: pruned weights in ``SparseLinear``, small networks in float32 or with int8 weights, whichever does better.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.compress import WeightInt8, compress
from quernel.nn import SparseLinear
from quernel.nn.weights import unique_bytes
from quernel.train import GradualMagnitudePruner

BATCH = 256
VALIDATION = 0.2
EPOCHS = {"adult": 6, "phishing": 25, "mnist-halves": 8}
TUNING_SEED = 99
RATES = (1e-3, 3e-3)
# What the sketch gets: steps of its student and passes that tune its table. Small students and pruning get as much.
DISTILLING_STEPS, TABLE_EPOCHS = 3000, 10


@dataclass(frozen=True)
class Task:
    """Rows and labels 0 or 1 to train on and to judge on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@functools.cache
def task(name: str, seed: int) -> Task:
    """Return a task: the published split where there is one, else a fifth of the rows at random."""
    if name == "adult":
        parts = [data.load("adult", split=split) for split in ("train", "test")]
        return Task(*(t for p in parts for t in (torch.from_numpy(p.x).float(), torch.from_numpy(p.y > 0).float())))
    if name == "phishing":
        held = data.load("phishing")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(held)))
        x, y = torch.from_numpy(held.x).float()[order], torch.from_numpy(held.y > 0).float()[order]
        cut = len(x) // 5
        return Task(x[cut:], y[cut:], x[:cut], y[:cut])
    parts = [data.load("mnist", split=split) for split in ("train", "test")]
    pixels = [torch.from_numpy(p.x.reshape(len(p), -1)).float() / 255 for p in parts]
    labels = [torch.from_numpy(p.y >= 5).float() for p in parts]
    return Task(pixels[0], labels[0], pixels[1], labels[1])


@functools.cache
def tuning_task(name: str) -> Task:
    """Return the training rows split once more, for choices."""
    whole = task(name, TUNING_SEED)
    order = torch.from_numpy(np.random.default_rng(TUNING_SEED).permutation(len(whole.x)))
    x, y, cut = whole.x[order], whole.y[order], int(VALIDATION * len(whole.x))
    return Task(x[cut:], y[cut:], x[:cut], y[:cut])


def part(name: str, seed: int) -> Task:
    """Return what is trained on and judged on with a seed; the tuning seed never sees the test rows."""
    return tuning_task(name) if seed == TUNING_SEED else task(name, seed)


@torch.no_grad()
def accuracy(net: Callable[[Tensor], Tensor], held: Task) -> float:
    """Return the share of test rows on the right side of 0, in percent."""
    scores = torch.cat([net(rows)[:, 0] for rows in held.test_x.split(4096)])
    return 100 * float(((scores > 0) == (held.test_y > 0)).float().mean())


def mlp(*widths: int, seed: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    net: nn.Module,
    x: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    rate: float,
    seed: int,
    step: Callable[[torch.optim.Optimizer], None] = lambda optimizer: optimizer.step(),
) -> nn.Module:
    """Train with Adam and a cosine, in place."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate, fused=True)
    draw, total, done = np.random.default_rng(seed), epochs * -(-len(x) // BATCH), 0
    net.train()
    for _ in range(epochs):
        for chosen in torch.from_numpy(draw.permutation(len(x))).split(BATCH):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / total))
            optimizer.zero_grad()
            loss(net(x[chosen])[:, 0], targets[chosen]).backward()
            step(optimizer)
            done += 1
    return net.eval()


def peer_epochs(name: str, rows: int) -> int:
    """Return the passes of a peer: never fewer steps than the sketch is given."""
    return max(EPOCHS[name], -(-DISTILLING_STEPS * BATCH // rows) + TABLE_EPOCHS)


@functools.cache
def teacher_rate(name: str) -> float:
    """Return the learning rate of the teacher that is best on validation rows."""
    held = tuning_task(name)
    return max(RATES, key=lambda rate: accuracy(_teacher(name, TUNING_SEED, rate), held))


def teacher(name: str, seed: int) -> nn.Sequential:
    """Return the trained network d-512-256-1."""
    return _teacher(name, seed, teacher_rate(name))


@functools.cache
def _teacher(name: str, seed: int, rate: float) -> nn.Sequential:
    held = part(name, seed)
    net = mlp(held.x.shape[1], 512, 256, 1, seed=seed)
    return train(  # type: ignore[return-value]
        net, held.x, held.y, F.binary_cross_entropy_with_logits, epochs=EPOCHS[name], rate=rate, seed=seed
    )


@functools.cache
@torch.no_grad()
def logits(name: str, seed: int) -> Tensor:
    """Return the teacher's answers for the training rows."""
    return torch.cat([teacher(name, seed)(rows)[:, 0] for rows in part(name, seed).x.split(4096)])


def pruned(name: str, seed: int, rate: float, budget: int) -> nn.Module:
    """Return the teacher pruned while it is trained on, in sparse storage of at most ``budget`` bytes."""
    held, net = part(name, seed), copy.deepcopy(teacher(name, seed))
    weights = [m.weight for m in net if isinstance(m, nn.Linear)]
    total = sum(w.numel() for w in weights)
    epochs = peer_epochs(name, len(held.x))
    steps = epochs * -(-len(held.x) // BATCH)
    # A stored weight takes six bytes, its value and its place; the rest is biases and row pointers.
    empty = unique_bytes(_sparse(mlp_of_zeros(net)))
    final = 1 - max(1, (budget - empty) // 6) / total
    pruner = GradualMagnitudePruner(weights, steps, final=final, every=max(1, steps // 40))
    loss = F.binary_cross_entropy_with_logits
    train(net, held.x, held.y, loss, epochs=epochs, rate=rate, seed=seed, step=pruner.step)
    return _sparse(net)


def mlp_of_zeros(net: nn.Sequential) -> nn.Sequential:
    """Return a copy without a weight."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for m in twin:
            if isinstance(m, nn.Linear):
                m.weight.zero_()
    return twin


def _sparse(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(SparseLinear.from_linear(m) if isinstance(m, nn.Linear) else m for m in net)).eval()


@dataclass(frozen=True)
class Student:
    """How a small network looks, what it learns from, and how it is stored."""

    depth: int
    bits: int
    targets: str
    rate: float

    def trained(self, name: str, seed: int, budget: int) -> nn.Module:
        """Return the widest such network of at most ``budget`` bytes, trained."""
        held = part(name, seed)
        width = self.width(held.x.shape[1], budget)
        net = mlp(held.x.shape[1], *[width] * self.depth, 1, seed=seed)
        loss = F.binary_cross_entropy_with_logits if self.targets == "labels" else F.mse_loss
        targets = held.y if self.targets == "labels" else logits(name, seed)
        train(net, held.x, targets, loss, epochs=peer_epochs(name, len(held.x)), rate=self.rate, seed=seed)
        return compress(net, WeightInt8()).model if self.bits == 8 else net

    def width(self, inputs: int, budget: int) -> int:
        """Return the largest width within the budget; int8 rows have a scale each."""

        def size(h: int) -> int:
            numbers, outputs = inputs * h + (self.depth - 1) * h * h + h, self.depth * h + 1
            return 4 * (numbers + outputs) if self.bits == 32 else numbers + 8 * outputs

        width = 1
        while size(width + 1) <= budget:
            width += 1
        return width


STUDENTS = tuple(
    Student(depth, bits, targets, rate)
    for depth in (1, 2)
    for bits in (32, 8)
    for targets in ("labels", "logits")
    for rate in RATES
)


@functools.cache
def best_student(name: str, budget: int) -> Student:
    """Return the student that is best on validation rows."""
    held = tuning_task(name)
    return max(STUDENTS, key=lambda s: accuracy(s.trained(name, TUNING_SEED, budget), held))


@functools.cache
def best_pruning_rate(name: str, budget: int) -> float:
    """Return the learning rate of pruning that is best on validation rows."""
    held = tuning_task(name)
    return max(RATES, key=lambda rate: accuracy(pruned(name, TUNING_SEED, rate, budget), held))
