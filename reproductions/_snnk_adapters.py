"""A frozen MiniLM with adapters and a classifier on SST-2: SNNK adapters, bottleneck adapters, or a linear probe.

Every arm trains with AdamW, a warm-up and cosine decay, on the same batches. Settings are chosen by the loss after a
short run of a seed of its own, four for each kind of adapter. The peer is the bottleneck adapter of Houlsby et al.
(arXiv 1902.00751), 64 wide, with GELU, behind the same twelve layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import _welore_classifier as shared
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.models import MiniLM
from quernel.nn import add_snnk_adapters, replace_module

STEPS, TUNING_STEPS, TUNING_SEED = 200, 60, 99
BOTTLENECK = 64
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "snnk": tuple(
        {"rate": rate, **options}
        for options in ({"n_features": 16}, {"n_features": 64, "down": 8, "ln_before": True})
        for rate in (3e-3, 1e-2)
    ),
    "bottleneck": tuple({"rate": rate} for rate in (3e-4, 1e-3, 3e-3, 6e-3)),
    "probe": tuple({"rate": rate} for rate in (3e-3, 1e-2, 2e-2, 3e-2)),
}


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), the identity at first."""

    def __init__(self, dim: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.down.weight.normal_(std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


@dataclass(frozen=True)
class Trained:
    """What one run of an arm gave; ``trainable`` is without the head, which all arms have."""

    loss: float
    accuracy: float
    trainable: int


def fresh(arm: str, seed: int, **options: Any) -> tuple[shared.Classifier, list[nn.Parameter]]:
    """Return a frozen encoder with new adapters and a new head, and the adapters' parameters."""
    generator = torch.Generator().manual_seed(seed)
    encoder = MiniLM.load_pretrained().requires_grad_(False)
    encoder.normalize = False
    adapters: list[nn.Parameter] = []
    if arm == "snnk":
        adapters = add_snnk_adapters(encoder, ("output.dense",), generator=generator, **options)
    elif arm == "bottleneck":
        for name, layer in list(encoder.named_modules()):
            if name.endswith("output.dense"):
                adapter = Bottleneck(layer.out_features, BOTTLENECK, generator)
                replace_module(encoder, name, nn.Sequential(layer, adapter))
                adapters += adapter.parameters()
    head = nn.Linear(384, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
    return shared.Classifier(encoder, head), adapters


def train(arm: str, seed: int, steps: int = STEPS, *, rate: float, **options: Any) -> Trained:
    """Train an arm and return its loss and accuracy on the 872 dev sentences."""
    torch.manual_seed(seed)  # dropout
    model, adapters = fresh(arm, seed, **options)
    optimizer = torch.optim.AdamW([*adapters, *model.head.parameters()], lr=rate, weight_decay=0.01, fused=True)
    model.train()
    for step, (batch, label) in enumerate(shared.batches("train", seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / shared.WARM_UP, (1 + np.cos(np.pi * step / steps)) / 2)
        shared.one_step(model, optimizer, batch, label)
    return Trained(*shared.judge(model), sum(p.numel() for p in adapters))


@functools.cache
def best(arm: str) -> dict[str, Any]:
    """Return the setting with the lowest loss after a short run of the tuning seed."""
    return min(SETTINGS[arm], key=lambda setting: train(arm, TUNING_SEED, TUNING_STEPS, **setting).loss)
