"""Training of kernel machines f(x) = b + sum_i alpha_i k(A x + s, z_i)^K, all of A, s, z, alpha and b at once.

Rows and targets are standardised for the training, and the scales multiplied into A, s, alpha and b afterwards. A
trained width would be a common factor of A and z, which are free. Cost of a step: batch (p d + M p + M C)
multiply-adds and as many backwards, and one erf and one exp a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._validate import check_choice, check_float, check_int
from quernel.kernels._collision import VECTOR_KERNELS, collision

Loss = Literal["squared", "logistic"]
# How much faster the weights of the anchors learn than the anchors themselves.
_FASTER = 4.0
_ROWS = 4096


@dataclass(frozen=True)
class Settings:
    """How a kernel machine looks and how it is trained; checked on construction."""

    n_anchors: int = 500
    proj_dim: int = 16
    kernel: str = "l2"
    width: float = 4.0
    n_concat: int = 2
    l1: float = 1e-4
    n_steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        for name in ("n_anchors", "proj_dim", "n_concat", "n_steps", "batch_size"):
            check_int(name, getattr(self, name), low=1)
        check_choice("kernel", self.kernel, VECTOR_KERNELS)
        for name in ("width", "learning_rate"):
            check_float(name, getattr(self, name), low=0.0, open_low=True)
        check_float("l1", self.l1, low=0.0)


@dataclass(frozen=True)
class Machine:
    """A kernel machine in the units of its data.

    Attributes
    ----------
    projection, shift : Tensor, shapes (p, d) and (p,)
    anchors, weights : Tensor, shapes (M, p) and (M, C)
    intercept : Tensor, shape (C,)
    """

    projection: Tensor
    shift: Tensor
    anchors: Tensor
    weights: Tensor
    intercept: Tensor

    @torch.no_grad()
    def __call__(self, x: Tensor, kernel: str, width: float, n_concat: int) -> Tensor:  # (n, d) -> (n, C)
        """Return the machine's answers, by the exact kernel."""
        parts = [self.similarity(rows, kernel, width, n_concat) @ self.weights for rows in x.split(_ROWS)]
        return torch.cat(parts) + self.intercept if parts else x.new_zeros(0, len(self.intercept))

    @torch.no_grad()
    def similarity(self, x: Tensor, kernel: str, width: float, n_concat: int) -> Tensor:  # (n, d) -> (n, M)
        """Return the kernel of rows and anchors."""
        hidden = F.linear(x, self.projection, self.shift)
        return collision(kernel, hidden, self.anchors, width, n_concat, exact=True)


def train_machine(
    x: Tensor, y: Tensor, settings: Settings, draw: np.random.Generator, loss: Loss = "squared"
) -> Machine:
    """Train a kernel machine.

    Parameters
    ----------
    x : Tensor, shape (n, d)
    y : Tensor, shape (n, C), numbers; or (n,), int64 labels for ``loss="logistic"``
    settings : Settings
    draw : numpy Generator
        For the initial values and the batches.
    loss : {"squared", "logistic"}
        Mean squared error to standardised targets, or cross-entropy.
    """
    mean, scale = _moments(x)
    rows = (x - mean) / scale
    if loss == "squared":
        center, spread = _moments(y)
        targets = (y - center) / spread
        outputs = y.shape[1]
    else:
        targets, outputs = y, int(y.max()) + 1
        center, spread = x.new_zeros(outputs), x.new_ones(outputs)
    a, z, alpha, b = _start(rows, outputs, settings, draw)
    optimizer = torch.optim.Adam(
        [
            {"params": [a, z], "lr": settings.learning_rate},
            {"params": [alpha, b], "lr": _FASTER * settings.learning_rate},
        ],
        fused=True,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    with torch.enable_grad():
        for step in range(settings.n_steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / settings.n_steps))
            chosen = torch.from_numpy(draw.integers(0, len(rows), min(len(rows), settings.batch_size)))
            k = collision(settings.kernel, F.linear(rows[chosen], a), z, settings.width, settings.n_concat)
            error = loss_of(torch.addmm(b, k, alpha), targets[chosen], loss)
            optimizer.zero_grad()
            (error + settings.l1 * alpha.abs().sum() / outputs).backward()
            optimizer.step()
    with torch.no_grad():
        projection = a / scale
        return Machine(projection, -projection @ mean, z.detach(), alpha * spread, b * spread + center)


def loss_of(scores: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """Return the mean loss; scores: (n, C), targets: (n, C) or labels (n,)."""
    return F.mse_loss(scores, targets) if loss == "squared" else F.cross_entropy(scores, targets)


def _start(rows: Tensor, outputs: int, settings: Settings, draw: np.random.Generator) -> list[Tensor]:
    """Return initial A, z, alpha and b: anchors at projections of rows, weights near zero."""
    n, d = rows.shape
    m, p = settings.n_anchors, settings.proj_dim
    a = rows.new_tensor(draw.standard_normal((p, d)) / d**0.5)
    chosen = draw.choice(n, m, replace=n < m)
    z = rows[torch.from_numpy(chosen)] @ a.T
    alpha = rows.new_tensor(0.01 * draw.standard_normal((m, outputs)))
    return [t.requires_grad_() for t in (a, z, alpha, rows.new_zeros(outputs))]


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column, 1 where a column is constant."""
    mean = values.double().mean(0)
    spread = (values.double() - mean).square().mean(0).sqrt()
    # Rounding of the mean leaves a constant column of large numbers a little spread.
    constant = spread <= 1e-12 * mean.abs() + 1e-30
    return mean.to(values.dtype), spread.masked_fill(constant, 1.0).to(values.dtype)
