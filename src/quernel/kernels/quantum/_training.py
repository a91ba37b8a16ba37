"""Training of variational circuits: the paper's empirical risk, SPSA on measured expectations, Adam on exact ones.

Restarts and the classes of one-vs-rest are one batch: every step moves all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernel._progress import Progress
from quernel.kernels.quantum._circuit import Circuit

# R of the paper's risk where expectations are exact: as many shots as blur a probability by about 0.05.
EXACT_SHOTS = 200
# Slope of the logistic loss: expectations reach from -1 to 1 only.
_SHARPNESS = 5.0
# Keeps the paper's standard deviation above zero where a probability is certain.
_CERTAIN = 1e-6
# SPSA: exponents of Spall, first perturbation and first step in radians, tries that calibrate the step.
_STEP_DECAY, _SHIFT_DECAY = 0.602, 0.101
_SHIFT, _FIRST_STEP, _TRIES = 0.2, 0.3, 25


@dataclass(frozen=True)
class Trained:
    """Angles (B, l + 1, n, 2), biases (B,) and risks (B,) of circuits."""

    angles: Tensor
    biases: Tensor
    risks: Tensor

    def best_of(self, restarts: int) -> Trained:
        """Return the restart of least risk of every class; restarts of a class follow each other."""
        risks = self.risks.view(-1, restarts)
        chosen = risks.argmin(1) + restarts * torch.arange(len(risks))
        return Trained(self.angles[chosen], self.biases[chosen], self.risks[chosen])


@dataclass(frozen=True)
class Problem:
    """Which states the circuits are to tell apart, and how that is judged."""

    circuit: Circuit
    states: Tensor  # (N, 2^n) complex128
    targets: Tensor  # (B, N) +-1
    loss: str
    shots: int | None
    draw: np.random.Generator

    def risk(self, angles: Tensor, biases: Tensor) -> Tensor:
        """Return the empirical risk of every circuit, shape (B,)."""
        found = measured(self.circuit.expectations(self.states, angles), self.shots, self.draw)
        if self.loss == "logistic":
            return torch.nn.functional.softplus(-_SHARPNESS * self.targets * (found + biases[:, None])).mean(1)
        return paper_risk(found, self.targets, biases[:, None], self.shots or EXACT_SHOTS).mean(1)


def measured(expectations: Tensor, shots: int | None, draw: np.random.Generator) -> Tensor:
    """Return expectations as ``shots`` measurements of +-1 estimate them; exact without."""
    if shots is None:
        return expectations
    share = ((1 + expectations) / 2).clamp(0.0, 1.0).numpy()
    return torch.from_numpy(2.0 * draw.binomial(shots, share) / shots - 1.0)


def paper_risk(expectations: Tensor, targets: Tensor, biases: Tensor, shots: int) -> Tensor:
    """Return the probability that ``shots`` measurements give the wrong label, in the paper's approximation.

    The label is right if p_y > p_(-y) - y b, so the threshold of p_y is (1 - y b) / 2 and the bias enters with a plus,
    1/2 - (p_y + y b / 2); with a minus, as printed, the risk would fall where the decision gets worse.
    """
    p = (1 + targets * expectations) / 2
    certain = p.clamp(_CERTAIN, 1 - _CERTAIN)
    return (math.sqrt(shots) * (0.5 - (p + targets * biases / 2)) / (2 * certain * (1 - certain)).sqrt()).sigmoid()


def train_adam(problem: Problem, angles: Tensor, steps: int, rate: float, progress: Progress | None = None) -> Trained:
    """Follow the exact gradient, with a rate that falls to zero along a cosine."""
    angles = angles.clone().requires_grad_()
    biases = torch.zeros(len(angles), dtype=angles.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([angles, biases], lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            problem.risk(angles, biases).sum().backward()
            optimizer.step()
            if progress is not None:
                progress(f"step {step + 1} of {steps}", (step + 1) / steps)
    with torch.no_grad():
        return Trained(angles.detach(), biases.detach(), problem.risk(angles, biases))


@torch.no_grad()
def train_spsa(problem: Problem, angles: Tensor, steps: int, progress: Progress | None = None) -> Trained:
    """Simultaneous perturbation: two evaluations a step, whatever the number of angles."""
    shape = angles.shape
    point = torch.cat((angles.flatten(1), torch.zeros(len(angles), 1, dtype=angles.dtype)), 1)  # (B, P + 1)

    def risk(at: Tensor) -> Tensor:
        return problem.risk(at[:, :-1].view(shape), at[:, -1])

    def slope(shift: float) -> tuple[Tensor, Tensor]:
        direction = torch.from_numpy(problem.draw.choice([-1.0, 1.0], point.shape))
        return (risk(point + shift * direction) - risk(point - shift * direction)) / (2 * shift), direction

    # The risk's slope where the search begins decides the first step, so that it is the same for any data.
    steepness = torch.stack([slope(_SHIFT)[0].abs() for _ in range(_TRIES)]).mean(0)
    wait = 0.1 * steps
    gain = _FIRST_STEP * (1 + wait) ** _STEP_DECAY / steepness.clamp_min(1e-3)
    for k in range(steps):
        along, direction = slope(_SHIFT / (k + 1) ** _SHIFT_DECAY)
        point = point - (gain / (k + 1 + wait) ** _STEP_DECAY * along)[:, None] * direction
        if progress is not None:
            progress(f"step {k + 1} of {steps}", (k + 1) / steps)
    return Trained(point[:, :-1].reshape(shape), point[:, -1], risk(point))
