"""A continuous bandit: eight redundant motors must push to a point that depends on the state, and effort costs.

Allowed actions lie in the box [-1, 1]^8 and in a ball. The reward is at most 1, and known, so that two ways to improve
a policy are compared and not two critics.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quernel.search import MaxIPIndex
from quernel.train import FrankWolfePolicy

MOTORS, RADIUS = 8, 1.5
ROUNDS, BATCH, JUDGED = 600, 256, 4096


def actions(n: int, seed: int) -> Tensor:
    """Return n actions evenly in the box and the ball, (n, MOTORS)."""
    draw = np.random.default_rng(seed)
    held = np.zeros((0, MOTORS))
    while len(held) < n:
        directions = draw.standard_normal((n, MOTORS))
        directions *= RADIUS * draw.random((n, 1)) ** (1 / MOTORS) / np.linalg.norm(directions, axis=1, keepdims=True)
        held = np.concatenate([held, directions[(np.abs(directions) <= 1).all(1)]])
    return torch.from_numpy(held[:n].astype(np.float32))


def index(held: Tensor, seed: int) -> MaxIPIndex:
    """Return the index of a catalogue: few tables are enough in so few dimensions."""
    made = MaxIPIndex(MOTORS, n_tables=6, probes=2, seed=seed).add(held.numpy())
    made.best(held[0].numpy())
    return made


def reward(states: Tensor, action: Tensor) -> Tensor:
    """Return 1 for reaching the point without effort, less for everything else; (B, 3) and (B, MOTORS) to (B,)."""
    push = torch.from_numpy(np.random.default_rng(7).uniform(-1, 1, (MOTORS, 2)).astype(np.float32))
    point = torch.stack([torch.sin(2 * states[:, 0]) + states[:, 1], torch.cos(states[:, 1] + states[:, 2])], 1)
    return 1 / (1 + ((action @ push - point) ** 2).sum(1)) - 0.02 * (action**2).sum(1)


def network(generator: torch.Generator) -> nn.Sequential:
    """Return two hidden layers of 64."""
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, MOTORS))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    return net


def trained(held: Tensor, lmo: Any, seed: int) -> float:
    """Train a policy and return its mean reward in fresh states."""
    generator = torch.Generator().manual_seed(seed)
    policy = network(generator)
    frank_wolfe = FrankWolfePolicy(held, lmo=lmo, step=0.2)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        states = torch.rand(BATCH, 3, generator=generator) * 2 - 1
        frank_wolfe.loss(policy, reward, states).backward()
        optimizer.step()
    fresh = torch.rand(JUDGED, 3, generator=torch.Generator().manual_seed(12345)) * 2 - 1
    with torch.no_grad():
        return float(reward(fresh, policy(fresh)).mean())


def argmax_us(held: Tensor, lmo: Any, seed: int) -> float:
    """Return the microseconds of one argmax in a batch, as training asks for it."""
    gradients = torch.randn(20, BATCH, MOTORS, generator=torch.Generator().manual_seed(seed))
    frank_wolfe = FrankWolfePolicy(held, lmo=lmo)
    frank_wolfe.best(gradients[0])
    start = time.perf_counter()
    for batch in gradients:
        frank_wolfe.best(batch)
    return (time.perf_counter() - start) / (len(gradients) * BATCH) * 1e6
