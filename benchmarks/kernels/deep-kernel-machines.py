"""Deep kernel machines: an epoch, a step, predictions, against sparse and deep Gaussian processes of gpytorch.

10,000 rows of 16 columns, 256 inducing points, batches of 512, two Gram layers; float64 for ours, which is its default,
and gpytorch's own (float32 with float64 factors). gpytorch runs in an environment of its own, see ``_peers``; where it
cannot be installed its rows say so. Three kernels do about three times the work of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks._process import in_fresh_process, resident_bytes
from benchmarks._runner import Case, Isolated, allowed
from quernel.kernels import DeepKernelRegressor
from quernel.kernels._deep_kernel_network import DeepKernelNetwork, GaussianLikelihood
from quernel.kernels._deep_kernel_training import Plan, Trainer

ROWS, COLUMNS, INDUCING, BATCH, LAYERS = 10_000, 16, 256, 512, 2
FLOPS = 47e9  # a core: float64 multiply-adds, twice a second
EPOCH_SECONDS, PREDICT_SECONDS = 4.0, 1.0
MOST_BYTES = 300e6
GPYTORCH = ("gpytorch==1.15.2",)


def rows() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((ROWS, COLUMNS))
    return x, np.sin(2 * x[:, 0]) * x[:, 1] + 0.1 * draw.standard_normal(ROWS)


def training() -> SimpleNamespace:
    x, y = (torch.from_numpy(part) for part in rows())
    network = DeepKernelNetwork(x[:INDUCING].clone(), 1, (1.0,) * LAYERS)
    likelihood = GaussianLikelihood(torch.full((1,), 0.1, dtype=x.dtype), learned=True)
    trainer = Trainer(network, likelihood, x, y[:, None], Plan(200, BATCH, 1e-2), np.random.default_rng(0))
    return SimpleNamespace(trainer=trainer, batch=torch.arange(BATCH))


def bound_rises(s: SimpleNamespace) -> None:
    values = [s.trainer.step(s.batch) for _ in range(15)]
    if not values[-1] > values[0]:
        raise ValueError(f"the bound of a batch went from {values[0]:.4g} to {values[-1]:.4g} in 15 steps")


def fitted() -> SimpleNamespace:
    x, y = rows()
    model = DeepKernelRegressor(LAYERS, n_inducing=INDUCING, max_epochs=2, random_state=0).fit(x, y)
    return SimpleNamespace(model=model, x=x)


def blocks_do_not_matter(s: SimpleNamespace) -> None:
    mean, std = s.model.predict(s.x, return_std=True)
    some, deviation = s.model.predict(s.x[-100:], return_std=True)
    np.testing.assert_allclose(some, mean[-100:], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(deviation, std[-100:], rtol=1e-8)


def step_flops() -> float:
    """Return multiply-adds times two of a step: products and triangular solves of the batch, thrice for gradients."""
    layer = 2 * BATCH * INDUCING**2 * 2.5 + 2 * INDUCING**3 * 1.5
    return 3 * ((LAYERS + 1) * layer + 2 * BATCH * INDUCING * COLUMNS)


def bound(steps: int, state: SimpleNamespace, threads: int) -> float:
    return steps * step_flops() / FLOPS / threads * 1e3


def sparse_step() -> Callable[[], Any]:
    """Return a step of a sparse Gaussian process; called in the peer's environment."""
    import gpytorch

    from reproductions._deep_kernel_gpytorch import SparseGP, steps

    x, y = (torch.from_numpy(part).float() for part in rows())
    settings = {"lr": 1e-2, "max_epochs": 10**6, "batch_size": BATCH}
    model, likelihood = SparseGP(x[:INDUCING].clone()).train(), gpytorch.likelihoods.GaussianLikelihood().train()
    taken = steps(model, likelihood, x, y, settings, 0)
    return lambda: next(taken)()


def deep_step() -> Callable[[], Any]:
    """Return a step of a deep Gaussian process of as many layers, two hidden outputs wide, with 10 draws."""
    import gpytorch
    from gpytorch.models.deep_gps import DeepGP, DeepGPLayer

    class Layer(DeepGPLayer):
        def __init__(self, inputs: int, outputs: int | None, inducing: torch.Tensor) -> None:
            batch = torch.Size([outputs]) if outputs else torch.Size([])
            distribution = gpytorch.variational.CholeskyVariationalDistribution(INDUCING, batch_shape=batch)
            strategy = gpytorch.variational.VariationalStrategy(
                self, inducing.expand(*batch, *inducing.shape).clone(), distribution, learn_inducing_locations=True
            )
            super().__init__(strategy, inputs, outputs)
            self.mean_module = gpytorch.means.LinearMean(inputs) if outputs else gpytorch.means.ConstantMean()
            kernel = gpytorch.kernels.MaternKernel(nu=2.5, batch_shape=batch, ard_num_dims=inputs)
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel, batch_shape=batch)

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    class Deep(DeepGP):
        def __init__(self, x: torch.Tensor) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(INDUCING, COLUMNS, generator=generator)
            inner = [Layer(COLUMNS, COLUMNS, x[:INDUCING] if i == 0 else hidden) for i in range(LAYERS)]
            self.inner = torch.nn.ModuleList(inner)
            self.last = Layer(COLUMNS, None, hidden)
            self.likelihood = gpytorch.likelihoods.GaussianLikelihood()

        def forward(self, x: torch.Tensor) -> Any:
            for layer in self.inner:
                x = layer(x)
            return self.last(x)

    x, y = (torch.from_numpy(part).float() for part in rows())
    model = Deep(x).train()
    elbo = gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=ROWS)
    loss = gpytorch.mlls.DeepApproximateMLL(elbo)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = torch.arange(BATCH)

    def take() -> None:
        with gpytorch.settings.num_likelihood_samples(10):
            optimizer.zero_grad()
            (-loss(model(x[batch]), y[batch])).backward()
            optimizer.step()

    return take


def peak_bytes() -> int:
    """Return what fitting and predicting takes beside what is resident before; called in a fresh process."""
    from pathlib import Path

    x, y = rows()
    small = DeepKernelRegressor(1, n_inducing=8, max_epochs=1, random_state=0)
    small.fit(x[:64], y[:64]).predict(x[:64])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to what is resident now
    before = resident_bytes()
    DeepKernelRegressor(LAYERS, n_inducing=INDUCING, max_epochs=1, batch_size=BATCH, random_state=0).fit(x, y).predict(
        x
    )
    return resident_bytes("VmHWM") - before


def memory(state: Any) -> str:
    return f"fit and predict take {in_fresh_process(__file__, 'peak_bytes') / 1e6:.0f} MB"


def fits_in_memory(s: SimpleNamespace) -> None:
    bound_rises(s)
    taken = in_fresh_process(__file__, "peak_bytes")
    if taken > MOST_BYTES:
        raise ValueError(f"fit and predict take {taken / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}")


CASES = [
    Case(
        name=f"one step: batch {BATCH}, {INDUCING} inducing points, two Gram layers",
        setup=training,
        ours=lambda s: s.trainer.step(s.batch),
        peers={
            "gpytorch SVGP": Isolated("sparse_step", requires=GPYTORCH),
            "gpytorch DeepGP, 10 draws": Isolated("deep_step", requires=GPYTORCH),
        },
        gate=bound_rises,
        target={"gpytorch SVGP": 0.25, "gpytorch DeepGP, 10 draws": 5.0},
        bound_ms=partial(bound, 1),
        bound="float64 products and solves at 47 GFLOP/s a core",
    ),
    Case(
        name=f"one epoch of {ROWS:,} rows",
        setup=training,
        ours=lambda s: s.trainer.epoch(0),
        peers={f"{EPOCH_SECONDS:g} s": allowed(EPOCH_SECONDS)},
        gate=fits_in_memory,
        target={f"{EPOCH_SECONDS:g} s": 1.0},
        bound_ms=partial(bound, -(-ROWS // BATCH)),
        bound="float64 products and solves at 47 GFLOP/s a core",
        threads=(2,),
        facts=memory,
    ),
    Case(
        name=f"predicting {ROWS:,} rows, mean and deviation",
        setup=fitted,
        ours=lambda s: s.model.predict(s.x, return_std=True),
        peers={f"{PREDICT_SECONDS:g} s": allowed(PREDICT_SECONDS)},
        gate=blocks_do_not_matter,
        target={f"{PREDICT_SECONDS:g} s": 1.0},
    ),
]
