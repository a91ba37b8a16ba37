"""A frozen MiniLM with adapters and a classifier on SST-2: SNNK adapters, bottleneck adapters, or a linear probe.

Every arm trains with AdamW, a warm-up and cosine decay, on the same batches. Settings, four for each arm, are chosen by
the loss on training sentences that a short run of a seed of its own left out; the dev split only judges. The peer is
the bottleneck adapter of Houlsby et al. (arXiv 1902.00751), 64 wide, with GELU, behind the same twelve layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import _welore_classifier as shared
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.models import MiniLM
from quernel.nn import SNNKAdapter, add_snnk_adapters, replace_module

STEPS, TUNING_STEPS, TUNING_SEED, HELD_OUT = 200, 60, 99, 60  # all but the seed in batches of 16
DIM, ADAPTERS = 384, 12
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
    """What one run of an arm gave; numbers and bytes are without the head, which all arms have."""

    loss: float
    accuracy: float
    trainable: int
    optimiser_bytes: int
    checkpoint_bytes: int


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
    head = nn.Linear(DIM, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
    return shared.Classifier(encoder, head), adapters


def train(arm: str, seed: int, *, rate: float, **options: Any) -> Trained:
    """Train an arm and judge it on the 872 dev sentences."""
    return fitted(arm, seed, shared.batches("train", seed, STEPS), None, rate=rate, **options)


def fitted(
    arm: str, seed: int, learned: shared.Batches, judged: shared.Batches | None, *, rate: float, **options: Any
) -> Trained:
    """Train an arm on batches and judge it on others."""
    torch.manual_seed(seed)  # dropout
    model, adapters = fresh(arm, seed, **options)
    steps = len(learned)
    optimizer = torch.optim.AdamW([*adapters, *model.head.parameters()], lr=rate, weight_decay=0.01, fused=True)
    model.train()
    for step, (batch, label) in enumerate(learned):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / shared.WARM_UP, (1 + np.cos(np.pi * step / steps)) / 2)
        shared.one_step(model, optimizer, batch, label)
    moments = sum(t.nbytes for p in adapters for t in optimizer.state[p].values() if t.ndim)
    kept = [m for m in model.modules() if isinstance(m, SNNKAdapter | Bottleneck)]
    found = sum(p.numel() for p in adapters), moments, tensor_bytes(nn.ModuleList(kept))
    if found != by_formula(arm, **options):
        raise ValueError(f"{arm}: numbers, optimiser and checkpoint bytes {found}, not {by_formula(arm, **options)}")
    return Trained(*shared.judge(model, judged), *found)


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of the tensors in a file of the module's state."""
    file = save(module.state_dict())
    return len(file) - 8 - int.from_bytes(file[:8], "little")


def by_formula(arm: str, n_features: int = 0, down: int | None = None, ln_before: bool = False) -> tuple[int, int, int]:
    """Return trained numbers, bytes of Adam's two moments, and bytes of a checkpoint: trained numbers and fixed G."""
    up = DIM if down is None else down * DIM + DIM
    one = {"snnk": (down or DIM) * n_features + up, "bottleneck": 2 * DIM * BOTTLENECK + BOTTLENECK + DIM, "probe": 0}
    trained = ADAPTERS * one[arm]
    return trained, 8 * trained, 4 * (trained + ADAPTERS * n_features * (DIM + 1))


@functools.cache
def best(arm: str) -> dict[str, Any]:
    """Return the setting with the lowest loss on held-out training sentences after a short run."""
    batches = shared.batches("train", TUNING_SEED, TUNING_STEPS + HELD_OUT)
    learned, judged = batches[:TUNING_STEPS], batches[TUNING_STEPS:]
    return min(SETTINGS[arm], key=lambda setting: fitted(arm, TUNING_SEED, learned, judged, **setting).loss)
