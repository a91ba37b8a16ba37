"""Sparse and deep Gaussian processes of gpytorch, run in an environment of their own; nothing of Quernel is imported.

Every function reads a NumPy archive with ``x, y, test_x`` (standardised rows; targets standardised, or class numbers)
and ``inducing``, trains as long as ours with Adam and the same drops of the rate, writes its answers beside the
archive and returns nothing. Kernels are Matern-5/2 with a length-scale a column, variational distributions full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import gpytorch
import numpy as np
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    IndependentMultitaskVariationalStrategy,
    VariationalStrategy,
)
from torch import Tensor

DROPS = (2 / 3, 5 / 6)
BLOCK = 2048
CLASS_DRAWS = 512


class SparseGP(ApproximateGP):
    """One output, or one a class with kernel and inducing inputs in common."""

    def __init__(self, inducing: Tensor, outputs: int | None = None) -> None:
        batch = torch.Size([outputs]) if outputs else torch.Size([])
        distribution = CholeskyVariationalDistribution(len(inducing), batch_shape=batch)
        strategy: Any = VariationalStrategy(self, inducing, distribution, learn_inducing_locations=True)
        if outputs:
            strategy = IndependentMultitaskVariationalStrategy(strategy, num_tasks=outputs)
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=inducing.shape[1])
        )

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def steps(model: Any, likelihood: Any, x: Tensor, y: Tensor, settings: dict[str, Any], seed: int) -> Iterator[Callable]:
    """Yield, a step, the function that takes it."""
    torch.manual_seed(seed)
    loss = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(x))
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=settings["lr"])
    for epoch in range(settings["max_epochs"]):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * 0.1 ** sum(epoch >= share * settings["max_epochs"] for share in DROPS)
        order = torch.randperm(len(x))
        for rows in order.tensor_split(math.ceil(len(x) / settings["batch_size"])):

            def take(rows: Tensor = rows) -> None:
                optimizer.zero_grad()
                (-loss(model(x[rows]), y[rows])).backward()
                optimizer.step()

            yield take


def _trained(file: str, settings: dict[str, Any], seed: int) -> tuple[Any, Any, Tensor]:
    held = np.load(file)
    x, test_x, inducing = (torch.from_numpy(held[name]).float() for name in ("x", "test_x", "inducing"))
    classes = int(held["y"].max()) + 1 if held["y"].dtype.kind == "i" else None
    if classes:
        y = torch.from_numpy(held["y"]).long()
        likelihood: Any = gpytorch.likelihoods.SoftmaxLikelihood(num_classes=classes, mixing_weights=False)
    else:
        y, likelihood = torch.from_numpy(held["y"]).float(), gpytorch.likelihoods.GaussianLikelihood()
    model = SparseGP(inducing, classes)
    # Draws of a likelihood without closed form: as many as ours takes.
    with gpytorch.settings.num_likelihood_samples(settings.get("n_samples", 10)):
        for take in steps(model.train(), likelihood.train(), x, y, settings, seed):
            take()
    return model.eval(), likelihood.eval(), test_x


def regress(file: str, settings: dict[str, Any], seed: int) -> None:
    """Write ``mean`` and ``std`` of new observations at the test rows."""
    model, likelihood, test_x = _trained(file, settings, seed)
    with torch.no_grad():
        found = [likelihood(model(rows)) for rows in test_x.split(BLOCK)]
    np.savez(
        f"{file}.out.npz", mean=np.concatenate([f.mean for f in found]), std=np.concatenate([f.stddev for f in found])
    )


def classify(file: str, settings: dict[str, Any], seed: int) -> None:
    """Write ``probabilities`` of the classes at the test rows."""
    model, likelihood, test_x = _trained(file, settings, seed)
    torch.manual_seed(0)
    with torch.no_grad(), gpytorch.settings.num_likelihood_samples(CLASS_DRAWS):
        found = [likelihood(model(rows)).probs.mean(0) for rows in test_x.split(BLOCK // 8)]
    np.savez(f"{file}.out.npz", probabilities=torch.cat(found).numpy())
