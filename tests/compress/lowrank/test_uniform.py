"""UniformLowRank: the same share for every matrix, and worse than WeLore where spectra differ."""

from __future__ import annotations

import torch
from torch import nn

from quernel.compress import UniformLowRank, WeLore, compress


def _model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    for layer, decay in zip(model, (0.3, 3.0), strict=True):
        u, v = (torch.linalg.qr(torch.randn(48, 48, generator=generator))[0] for _ in range(2))
        layer.weight = nn.Parameter((u * torch.logspace(0, -decay, 48)) @ v.T)
    return model


def test_every_matrix_loses_the_same_share() -> None:
    result = compress(_model(), UniformLowRank(0.5, budget="params"))
    assert [layer.rank for layer in result.model] == [12, 12]
    assert result.report.summary["weight_reduction"] == 0.5
    assert result.report.summary["tau"] is None


def test_half_the_ranks_of_a_square_save_nothing_and_nothing_is_factored() -> None:
    result = compress(_model(), UniformLowRank(0.5))
    assert [type(layer) for layer in result.model] == [nn.Linear, nn.Linear]
    assert result.report.summary["rank_reduction_attempted"] == 0.5
    assert result.report.summary["rank_reduction_achieved"] == 0.0
    assert any("nothing was factored" in warning for warning in result.report.warnings)


def test_own_ranks_beat_uniform_ones_where_spectra_differ() -> None:
    model, errors = _model(), {}
    for method in (WeLore(0.3, budget="params"), UniformLowRank(0.3, budget="params")):
        compressed = compress(model, method).model
        lost = [new.weight for new in compressed]
        errors[type(method)] = sum(
            (old.weight - (new if isinstance(new, nn.Parameter) else new.dense())).norm().item()
            for old, new in zip(model, lost, strict=True)
        )
    assert errors[WeLore] < errors[UniformLowRank]
