"""WeLore: a low-rank layer against a dense one, a training step of the factors alone, the compression itself.

Layers are 1024 x 1024 at a quarter of the full rank: half the multiply-adds and half the bytes, so 2 is the ideal.
bfloat16 is shown beside, because it is what a user of this processor would try first.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._machine import FLOAT32_OPS, L3_BYTES
from benchmarks._runner import Case
from quernel.compress import Context, WeLore
from quernel.compress.lowrank import _spectra
from quernel.nn import LowRankLinear
from quernel.nn.functional import singular_values
from quernel.train import low_rank_only

SIZE, RANK = 1024, 256
COMPRESSION_SECONDS = 20.0
# Two float32 products of 1024 and 256 terms against one of 1024.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def layers(rows: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(SIZE, SIZE)
    exact = [torch.randn(SIZE, RANK, generator=generator) for _ in range(2)]
    dense.weight = nn.Parameter(exact[0] @ exact[1].T / SIZE)
    thin = LowRankLinear.from_linear(dense, RANK)
    x = torch.randn(rows, SIZE, generator=generator)
    for layer in (dense, thin):
        layer.requires_grad_(False)
    half = copy.deepcopy(dense).bfloat16()
    return SimpleNamespace(x=x, x_half=x.bfloat16(), dense=dense, thin=thin, half=half)


def same_outputs(state: SimpleNamespace) -> None:
    torch.testing.assert_close(state.thin(state.x), state.dense(state.x), **TOLERANCE)


def layer_bound(rows: int, state: SimpleNamespace, threads: int) -> float:
    seconds = max(2 * rows * 2 * SIZE * RANK / FLOAT32_OPS, 4 * 2 * SIZE * RANK / L3_BYTES)
    return seconds / threads * 1e3


def trainers() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    blocks = [
        LowRankLinear(SIZE, SIZE, RANK, generator=generator) if i % 2 else nn.Linear(SIZE, SIZE) for i in range(8)
    ]
    model = nn.Sequential(*blocks)
    frozen = copy.deepcopy(model)
    factors = low_rank_only(frozen)
    return SimpleNamespace(
        x=torch.randn(128, SIZE, generator=generator),
        whole=(model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)),
        factors=(frozen, torch.optim.AdamW(factors, lr=1e-6, fused=True)),
    )


def train_step(x: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    model(x).square().mean().backward()
    optimizer.step()


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for held in optimizer.state.values() for t in held.values() if t.ndim)


def optimizer_memory_follows_what_trains(state: SimpleNamespace) -> None:
    held, trained = [], []
    for model, optimizer in (state.factors, state.whole):
        train_step(state.x, model, optimizer)
        held.append(optimizer_bytes(optimizer))
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    if held[0] * trained[1] != held[1] * trained[0]:
        raise ValueError(f"optimiser bytes {held} for {trained} trainable parameters")


def encoder() -> SimpleNamespace:
    """Return the 36 matrices of a MiniLM, with random values of falling scale."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6
    model = nn.Module()
    for i, (m, n) in enumerate(shapes):
        layer = nn.Linear(n, m)
        weight = torch.randn(m, n, generator=generator) * torch.logspace(0, -i / 12, n)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        model.add_module(str(i), layer)
    weights = [layer.weight for layer in model.children()]
    for weight in weights:
        _spectra.spectrum_of(weight)
    return SimpleNamespace(model=model, weights=weights)


def compresses_in_time(state: SimpleNamespace) -> None:
    _spectra.forget()
    start = time.perf_counter()
    method: Any = WeLore(0.3, budget="params")
    plan = method.plan(state.model, Context())
    seconds = time.perf_counter() - start
    if seconds > COMPRESSION_SECONDS or not plan.summary["low_rank_matrices"]:
        raise ValueError(f"36 matrices took {seconds:.1f} s; allowed are {COMPRESSION_SECONDS:.0f}")


CASES = [
    *(
        Case(
            name=f"linear 1024x1024 at rank 256, M={rows}",
            setup=partial(layers, rows),
            ours=lambda s: s.thin(s.x),
            peers={"fp32": lambda s: s.dense(s.x), "bf16": lambda s: s.half(s.x_half)},
            gate=same_outputs,
            target=target,
            bound_ms=partial(layer_bound, rows),
            bound="multiply-adds at 94 GFLOP/s or bytes at 97 GB/s a core",
        )
        for rows, target in ((1, {"fp32": 0.95}), (32, {}), (512, {"fp32": 1.6}))
    ),
    Case(
        name="AdamW step of 8 layers, the factors of 4 alone",
        setup=trainers,
        ours=lambda s: train_step(s.x, *s.factors),
        peers={"all parameters": lambda s: train_step(s.x, *s.whole)},
        gate=optimizer_memory_follows_what_trains,
    ),
    Case(
        name="spectra of MiniLM's 36 matrices, known ones",
        setup=encoder,
        ours=lambda s: [_spectra.spectrum_of(w) for w in s.weights],
        peers={"decomposed afresh": lambda s: [singular_values(w) for w in s.weights]},
        gate=compresses_in_time,
        bound=f"gate: the whole compression within {COMPRESSION_SECONDS:.0f} s",
    ),
]
