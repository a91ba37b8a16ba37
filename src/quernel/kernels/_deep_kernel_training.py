"""Training of sparse deep kernel machines: mini-batches of equal size, Adam, one pass for what is known in closed form.

Maximised is, per row, mean E_q[log p(y|f)] - (sum_l nu_l KL_l + KL of the outputs) / n: a nu counts whole data sets, so
that "nu per datum" is nu / n. Cost of an epoch: n / B times L (P^3 + B P^2), three times for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._progress import Progress
from quernel._random import torch_generator
from quernel.kernels._deep_kernel_network import (
    CategoricalLikelihood,
    DeepKernelNetwork,
    GaussianLikelihood,
    OutputSums,
    Pass,
)
from quernel.kernels.linalg import jittered_cholesky

Likelihood = GaussianLikelihood | CategoricalLikelihood

# Rows that pass through the network together outside training.
ROWS = 2048
# Alternations of q(u) and noise in closed form.
_NOISE_STEPS = 20
_BETAS = (0.8, 0.9)
# After these shares of the epochs the step is ten times smaller.
_DROPS = (2 / 3, 5 / 6)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    max_epochs: int
    batch_size: int
    lr: float


class Trainer:
    """Adam on the bound of one data set.

    Parameters
    ----------
    network : DeepKernelNetwork
    likelihood : GaussianLikelihood or CategoricalLikelihood
    x, y : Tensor, shapes (n, c), and (n, q) or (n,)
    plan : Plan
    draw : numpy Generator
        For batches and noise.
    """

    def __init__(
        self,
        network: DeepKernelNetwork,
        likelihood: Likelihood,
        x: Tensor,
        y: Tensor,
        plan: Plan,
        draw: np.random.Generator,
    ) -> None:
        self.network, self.likelihood, self.x, self.y, self.plan, self.draw = network, likelihood, x, y, plan, draw
        self.generator = torch_generator(draw)
        held = {id(layer.free): min(1.0, len(x) / layer.nu) for layer in network.gram_layers}
        # Where nu is above n a Gram matrix may hardly move: steps of the usual size would be all noise.
        self.shares = [*held.values(), 1.0]
        groups = [{"params": [layer.free], "lr": plan.lr} for layer in network.gram_layers]
        rest = [p for p in (*network.parameters(), *likelihood.parameters()) if p.requires_grad and id(p) not in held]
        self.optimizer = torch.optim.Adam([*groups, {"params": rest, "lr": plan.lr}], betas=_BETAS, fused=True)

    def run(self, progress: Progress | None = None) -> list[float]:
        """Train; return the mean bound of every epoch's batches, in nats of the whole data set."""
        if isinstance(self.likelihood, GaussianLikelihood):
            self.network.train()
            with torch.no_grad():
                self.network(self.x[:ROWS], self.generator)  # sets the running means
            # Not the noise: before anything is learned the best noise is all there is to explain.
            self.solve_outputs(alternations=0)
        found: list[float] = []
        most = self.plan.max_epochs
        for number in range(most):
            found.append(self.epoch(number))
            if progress is not None:
                progress(
                    f"epoch {number + 1} of {most}, bound {found[-1] / len(self.x):.4g} a row", (number + 1) / most
                )
        return found

    def epoch(self, number: int) -> float:
        """Pass over the data once."""
        rate = self.plan.lr * 0.1 ** sum(number >= share * self.plan.max_epochs for share in _DROPS)
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = rate * share
        n = len(self.x)
        order = torch.from_numpy(self.draw.permutation(n))
        batches = order.tensor_split(math.ceil(n / self.plan.batch_size))
        return sum(len(rows) * self.step(rows) for rows in batches)

    def step(self, rows: Tensor) -> float:
        """Take one step on some rows; return their bound, in nats a row."""
        self.network.train()
        try:
            with torch.enable_grad():
                found = self.network(self.x[rows], self.generator)
                fit = self.likelihood(found, self.y[rows], self.generator)
                bound = fit.mean() - (found.penalty + found.output_kl) / len(self.x)
                self.optimizer.zero_grad()
                (-bound).backward()
            value = float(bound.detach())
            if not math.isfinite(value):
                raise QuernelError(f"the bound is {value}")
        except QuernelError as error:
            raise QuernelError(
                f"training diverged ({error}). Likely causes: (a) lr={self.plan.lr:g} is too large, (b) a jitter too "
                "small for dtype='float32', (c) columns of very different scales, which should be standardised"
            ) from error
        self.optimizer.step()
        return value

    @torch.no_grad()
    def solve_outputs(self, alternations: int = _NOISE_STEPS) -> None:
        """Set q(u) to the best there is for the rest of the network, given Gaussian noise; and learned noise with it.

        Each of the two is the best given the other, so that no alternation lowers the bound.
        """
        if isinstance(self.likelihood, GaussianLikelihood):
            sums = OutputSums(self.network)
            for rows, found in passes(self.network, self.x):
                sums.update(found, self.y[rows])
            for _ in range(alternations if self.likelihood.log_noise.requires_grad else 0):
                self.likelihood.set_noise(sums.solve(self.likelihood.noise))
            sums.solve(self.likelihood.noise)


def passes(network: DeepKernelNetwork, x: Tensor) -> Iterator[tuple[slice, Pass]]:
    """Yield what blocks of rows give after training."""
    network.eval()
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        yield rows, network(x[rows])


@torch.no_grad()
def judged(
    network: DeepKernelNetwork, likelihood: Likelihood, x: Tensor, y: Tensor, indicators: Tensor
) -> tuple[float, list[float]]:
    """Return the bound on all rows in nats, and the alignment of the input and of every layer with the targets.

    Alignment is that of centred kernels, tr(K Y Y^T) / (|K| |Y Y^T|), of a layer's part within the span of its
    inducing points, G_ti G_ii^-1 G_it; indicators: (n, q), targets or one column a class.
    """
    generator = torch.Generator().manual_seed(0)
    bound, alignments = 0.0, []
    for rows, found in passes(network, x):
        bound += float(likelihood(found, y[rows], generator).sum())
        if not rows.start:
            bound -= float(found.penalty + found.output_kl)
            alignments = [_Alignment() for _ in range(len(found.grams) + 1)]
        inner = [torch.linalg.solve_triangular(jittered_cholesky(g.ii), g.ti.T, upper=False).T for g in found.grams]
        for alignment, features in zip(alignments, [x[rows], *inner], strict=True):
            alignment.update(features, indicators[rows])
    return bound, [alignment.value() for alignment in alignments]


class _Alignment:
    """Sums over rows of products, of whose Gram matrices the alignment is to be known."""

    def __init__(self) -> None:
        self.count, self.width = 0, 0
        self.sums, self.products = torch.zeros(()), torch.zeros(())

    def update(self, left: Tensor, right: Tensor) -> None:
        both = torch.cat((left, right), 1)
        self.width, self.count = left.shape[1], self.count + len(both)
        self.sums, self.products = self.sums + both.sum(0), self.products + both.T @ both

    def value(self) -> float:
        centred = self.products - torch.outer(self.sums, self.sums) / self.count
        upper, lower = centred[: self.width], centred[self.width :]
        own, cross, other = upper[:, : self.width].norm(), upper[:, self.width :].norm(), lower[:, self.width :].norm()
        return float(cross.square() / (own * other).clamp_min(torch.finfo(own.dtype).tiny))


def chosen_inducing(x: Tensor, number: int, draw: np.random.Generator) -> Tensor:
    """Return initial inducing inputs, shape (number, c): random rows.

    Not means of clusters nor the rows nearest to them: from those a parity of signs was learned on some seeds only,
    from random rows on all of five.
    """
    return x[torch.from_numpy(draw.permutation(len(x))[:number])]
