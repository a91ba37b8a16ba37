"""Compressing ``Terminator``, whose layers make kernels for each other: it runs, saves, and loads the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quernel
from quernel.compress import Cast, CrossQuant, FeatureMerging, Method, SparsePointwise, WeightInt8, _measure, compress
from quernel.models import Terminator
from quernel.nn import MAGNet

# Smooth kernels, and those of the public training code, which are read at thousands of radians.
SMOOTH: dict[str, Any] = {}
RELEASED: dict[str, Any] = {"omega0": 2000.0, "context": "batch", "eval_stats": "batch"}


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "LATENCY_SECONDS", 0.02)


def trained(**options: Any) -> tuple[Terminator, torch.Tensor]:
    """A small classifier after some steps, so that no parameter is what it began as; and a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(6, 3, 8, 8)
        model = Terminator(size=8, factors=(4, 1), num_classes=4, **options)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(6) % 4).backward()
            optimizer.step()
    return model.eval(), x


def prune(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                size = module.weight.abs()
                module.weight[size < size.flatten().quantile(0.85)] = 0


@pytest.mark.parametrize(
    ("method", "options", "near"),
    [
        (CrossQuant(), SMOOTH, 0.02),
        (CrossQuant(), RELEASED, 0.02),
        (CrossQuant(activations="keep"), SMOOTH, 0.02),
        (Cast(), SMOOTH, 0.02),
        (Cast("float16"), RELEASED, 0.005),
        (WeightInt8(), SMOOTH, 0.02),
        (FeatureMerging(), SMOOTH, 0.05),
        ([FeatureMerging(), CrossQuant()], SMOOTH, 0.05),
        (SparsePointwise(linear=True), SMOOTH, 1e-4),
        ([SparsePointwise(), CrossQuant()], SMOOTH, 0.02),
    ],
    ids=str,
)
def test_it_stays_near_and_comes_back_equal(
    method: Method | list[Method], options: dict[str, Any], near: float, tmp_path: Path
) -> None:
    model, x = trained(**options)
    if any(isinstance(m, SparsePointwise) for m in (method if isinstance(method, list) else [method])):
        prune(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compress(model, method, data=[x])
    assert result.report.bytes_after < result.report.bytes_before
    assert len(result.report.skipped) < len(result.report.layers)
    with torch.no_grad():
        wanted, got = model(x), result.model(x)
        assert (got - wanted).norm() < near * wanted.norm()
        torch.testing.assert_close(quernel.load(result.save(tmp_path))(x), got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_rounds_no_angles(dtype: str) -> None:
    model, x = trained(**RELEASED)
    cast = compress(model, Cast(dtype), data=[x]).model
    nets = [m for m in cast.modules() if isinstance(m, MAGNet)]
    assert nets and all(m.frequencies.dtype == m.phases.dtype == torch.float32 for m in nets)
    own = cast.get_submodule("blocks.0.interaction.places")
    assert own.get_parameter("map").dtype == getattr(torch, dtype)
    wanted = model.get_submodule("blocks.0.interaction.places")()
    assert (own() - wanted).norm() < 0.02 * wanted.norm()


def test_a_cast_upwards_takes_everything() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow = MAGNet(3, 1, 4, hidden=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.slow()

    cast = compress(Scaled(), Cast("float64"), data=[torch.randn(2, 3, 4)]).model
    assert all(p.dtype == torch.float64 for p in cast.parameters())
