"""Small models with data for them, of which methods make the examples that the conformance suite runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quernel.compress._method import Method


def two_layer_example(method: Method) -> dict[str, Any]:
    """Return what the conformance suite needs: a small model with decaying spectra, and data for it."""

    def model() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        layers = [nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 5)]
        with torch.no_grad():
            for layer in layers:
                scale = torch.logspace(0, -2, layer.in_features)
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * scale)
                layer.bias.uniform_(-0.1, 0.1, generator=generator)
        return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2]).eval()

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(16, 24, generator=generator) for _ in range(4)]
    return {"method": method, "model": model, "data": data, "example_inputs": (data[0],)}
