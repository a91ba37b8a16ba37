"""NTK Grams in blocks against the same formulas on whole NumPy matrices, and networks trained together or one by one.

The Gram is that of 4,000 rows of 64 standard normal numbers under three hidden layers of ReLUs, in float64. NumPy's is
written as one would write it who knows the formulas: norms once, one arccosine an entry and layer, in place where that
is free. The second case trains twelve networks of 2,048 hidden units on the 5 basis vectors for 50 steps of gradient
descent, against loops over the networks: gradients of torch.func, plain PyTorch, and our own steps for one network at
a time, which shows what training together gains by itself.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from benchmarks._runner import Case, allowed
from quernel.apps.permutations import draw_networks, network_outputs, train_networks
from quernel.kernels import NTKernel

ROWS, DIM, DEPTH = 4000, 64, 3
LIMIT_S = 1.5
MODELS, WIDTH, BITS, STEPS = 12, 2048, 5, 50
# A core's float64 multiply-adds twice a second; an arctangent is about 40 of them, the rest of a layer about 20.
FLOPS, LAYER_FLOPS = 47e9, 60
NEVER = 1e-300  # a loss that is not reached: all steps are taken


def rows() -> SimpleNamespace:
    return SimpleNamespace(x=np.random.default_rng(0).standard_normal((ROWS, DIM)), kernel=NTKernel(DEPTH))


def numpy_ntk(x: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Return the NTK for ReLU, weights of variance 1 and no biases."""
    nngp = x @ x.T / x.shape[1]
    ntk = nngp.copy()
    for _ in range(depth):
        roots = np.sqrt(nngp.diagonal())
        lengths = roots[:, None] * roots[None, :]
        cosine = np.clip(nngp / lengths, -1, 1)
        share = (np.pi - np.arccos(cosine)) / np.pi
        nngp = lengths * (np.sqrt(1 - cosine**2) / np.pi + share * cosine) / 2
        ntk *= share / 2
        ntk += nngp
    return ntk


def is_the_formula(s: SimpleNamespace) -> None:
    some = s.x[::8]
    got, wanted = s.kernel.ntk(some), numpy_ntk(some)
    # NumPy's diagonal is off by the root of the precision: the angle of a row with itself is rounding.
    np.testing.assert_allclose(got, wanted, rtol=1e-7)
    np.testing.assert_allclose(s.kernel.ntk(s.x)[::8, ::8], got, rtol=1e-12)


def gram_bound(_: SimpleNamespace, threads: int) -> float:
    entries = ROWS * (ROWS + 1) / 2
    return entries * (2 * DIM + DEPTH * LAYER_FLOPS) / FLOPS / threads * 1e3


def ensemble() -> SimpleNamespace:
    warnings.simplefilter("ignore", ConvergenceWarning)  # the steps are counted, not the loss
    eye = torch.eye(BITS, dtype=torch.float64)
    return SimpleNamespace(networks=draw_networks(MODELS, WIDTH, BITS, BITS, seed=0), x=eye, y=eye.flip(0))


def together(s: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    trained, _ = train_networks(s.networks, s.x, s.y, n_steps=STEPS, tol=NEVER)
    return trained.hidden, trained.output


def one_by_one(s: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    def loss(weights: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return 0.5 * (network_outputs(*weights, s.x) - s.y).square().sum()

    gradient = torch.func.grad(loss)
    found = []
    for start in zip(s.networks.hidden, s.networks.output, strict=True):
        weights = tuple(part.clone() for part in start)
        for _ in range(STEPS):
            for weight, grad in zip(weights, gradient(weights), strict=True):
                weight.sub_(grad)
        found.append(weights)
    hidden, output = zip(*found, strict=True)
    return torch.stack(hidden), torch.stack(output)


def autograd(s: SimpleNamespace) -> list[torch.Tensor]:
    """Train one by one as plain PyTorch code does: backward() and an optimizer."""
    losses = []
    for start in zip(s.networks.hidden, s.networks.output, strict=True):
        weights = [part.clone().requires_grad_() for part in start]
        optimizer = torch.optim.SGD(weights, lr=1.0)
        for _ in range(STEPS):
            loss = 0.5 * (network_outputs(*weights, s.x) - s.y).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    return losses


def ours_one_by_one(s: SimpleNamespace) -> list[torch.Tensor]:
    alone = (s.networks.part(i, i + 1) for i in range(MODELS))
    return [train_networks(one, s.x, s.y, n_steps=STEPS, tol=NEVER)[1] for one in alone]


def are_the_same_networks(s: SimpleNamespace) -> None:
    for ours, theirs in zip(together(s), one_by_one(s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def training_bound(_: SimpleNamespace, threads: int) -> float:
    # Forward, and twice as much backward: 2 flops a multiply-add, 2 layers of BITS x WIDTH for BITS rows.
    return MODELS * STEPS * 3 * 2 * 2 * BITS * BITS * WIDTH / FLOPS / threads * 1e3


CASES = [
    Case(
        name=f"NTK of {ROWS:,} x {ROWS:,} rows, d={DIM}, {DEPTH} hidden layers, float64",
        setup=rows,
        ours=lambda s: s.kernel.ntk(s.x),
        peers={"plain NumPy": lambda s: numpy_ntk(s.x), f"{LIMIT_S} s": allowed(LIMIT_S)},
        gate=is_the_formula,
        target={"plain NumPy": 1.0, f"{LIMIT_S} s": 1.0},
        bound_ms=gram_bound,
        bound="half the entries, products and 60 operations a layer at 47 GFLOP/s",
    ),
    Case(
        name=f"{MODELS} networks of width {WIDTH:,}, {BITS} bits, {STEPS} steps",
        setup=ensemble,
        ours=together,
        peers={
            "loop of torch.func.grad": one_by_one,
            "loop of backward and SGD": autograd,
            "our steps in a loop": ours_one_by_one,
        },
        gate=are_the_same_networks,
        target={"loop of torch.func.grad": 2.0, "loop of backward and SGD": 2.0},
        bound_ms=training_bound,
        bound="multiply-adds at 47 GFLOP/s",
    ),
]
