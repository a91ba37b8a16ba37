"""A MiniLM of 70 % parameters with a classifier on SST-2: what its parts can learn, in how much memory and time.

Arms: ``full`` trains everything, ``factors`` the low-rank factors, ``some factors`` a part of them, ``dense`` the
matrices that stayed dense.  The new head is trained in every arm.  Run as a script, it trains one arm for a few steps
and prints the peak memory that this took beyond the loaded model.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.compress import Context, WeLore
from quernel.models import MiniLM
from quernel.nn.weights import LowRankWeight
from quernel.train import low_rank_only

STEPS, BATCH, LENGTH = 200, 16, 24
TUNING_STEPS, TUNING_SEED, RATES = 50, 99, (1e-4, 3e-4)
PROBE_STEPS, TIMED_ROUNDS = 5, 10
WARM_UP = 20

Batches = list[tuple[dict[str, Tensor], Tensor]]


class Classifier(nn.Module):
    """The compressed encoder's mean token vector, and a linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.encoder(batch["input_ids"], batch["attention_mask"]))


@dataclass(frozen=True)
class Trained:
    """What one run of an arm gave."""

    loss: float
    accuracy: float
    trainable: int


@functools.cache
def compressed() -> MiniLM:
    """Return the encoder at 70 % of the parameters of its 36 matrices, its output not normalised."""
    model = MiniLM.load_pretrained()
    method = WeLore(0.3, budget="params")
    method.apply(model, method.plan(model, Context()))
    model.normalize = False
    return model


@functools.cache
def batches(split: str, seed: int, count: int) -> Batches:
    """Return batches of sentences of like length, in random order; labels beside them."""
    held = data.load("sst2", split=split)
    generator = np.random.default_rng(seed)
    picked = generator.permutation(len(held.text))[: count * BATCH]
    picked = sorted(picked.tolist(), key=lambda i: len(held.text[i]))
    model = MiniLM.load_pretrained()
    model.max_length = LENGTH
    made = []
    for start in range(0, len(picked), BATCH):
        rows = picked[start : start + BATCH]
        made.append((model.tokenize([held.text[i] for i in rows]), torch.as_tensor(held.y[rows])))
    return [made[i] for i in generator.permutation(len(made))]


def fresh(arm: str, seed: int) -> tuple[Classifier, list[nn.Parameter]]:
    """Return a new classifier and what this arm trains of it."""
    head = nn.Linear(384, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(seed))
    encoder = copy.deepcopy(compressed())
    dense = [m.weight for m in encoder.modules() if type(m) is nn.Linear]
    if arm == "full":
        trainable = list(encoder.requires_grad_(True).parameters())
    elif arm == "factors":
        trainable = low_rank_only(encoder)
    elif arm == "dense":
        encoder.requires_grad_(False)
        trainable = [weight.requires_grad_(True) for weight in dense]
    else:
        trainable = _some_factors(encoder, sum(weight.numel() for weight in dense), seed)
    model = Classifier(encoder, head)
    return model, [*trainable, *head.parameters()]


def train(arm: str, rate: float, seed: int, steps: int = STEPS, held: Batches | None = None) -> Trained:
    """Train an arm and return its loss on the dev split, or on ``held``."""
    torch.manual_seed(seed)  # dropout
    model, trainable = fresh(arm, seed)
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01, fused=True)
    model.train()
    for step, (batch, label) in enumerate(batches("train", seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARM_UP, (1 + np.cos(np.pi * step / steps)) / 2)
        one_step(model, optimizer, batch, label)
    return Trained(*judge(model, held), sum(p.numel() for p in trainable))


def one_step(model: Classifier, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], label: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
    optimizer.zero_grad()
    F.cross_entropy(logits.float(), label).backward()
    optimizer.step()


@torch.no_grad()
def judge(model: Classifier, held: Batches | None = None) -> tuple[float, float]:
    """Return mean loss and accuracy on batches, by default the 872 dev sentences."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(model(batch), label) for batch, label in (batches("dev", 0, 55) if held is None else held)]
    logits, labels = torch.cat([a.float() for a, _ in pairs]), torch.cat([b for _, b in pairs])
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


@functools.cache
def best_rate(arm: str) -> float:
    """Return the rate with the lowest loss on other training sentences after a short run; equal for all arms."""
    held = batches("train", TUNING_SEED + 1, TUNING_STEPS)
    return min(RATES, key=lambda rate: train(arm, rate, TUNING_SEED, TUNING_STEPS, held).loss)


@functools.cache
def tokens_a_second(arms: tuple[str, ...]) -> dict[str, float]:
    """Return the training speed of each arm, their steps interleaved; padded tokens do not count."""
    held = {}
    for arm in arms:
        model, trainable = fresh(arm, 0)
        held[arm] = model.train(), torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for batch, label in batches("train", 0, STEPS)[: TIMED_ROUNDS + 1]:
        for arm, (model, optimizer) in held.items():
            start = time.perf_counter()
            one_step(model, optimizer, batch, label)
            rates[arm].append(int(batch["attention_mask"].sum()) / (time.perf_counter() - start))
    # The first step allocates the optimiser's state.
    return {arm: statistics.median(values[1:]) for arm, values in rates.items()}


def peak_mebibytes(arm: str) -> float:
    """Return how far a few steps raise this process's peak resident memory; Linux only."""
    model, trainable = fresh(arm, 0)
    compressed.cache_clear()
    held = batches("train", 0, STEPS)[:PROBE_STEPS]
    model.train()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident_peak()
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    for batch, label in held:
        one_step(model, optimizer, batch, label)
    return _resident_peak() - before


def _resident_peak() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _some_factors(encoder: nn.Module, most: int, seed: int) -> list[nn.Parameter]:
    """Train random factored matrices with at most so many numbers together."""
    encoder.requires_grad_(False)
    weights = [m for m in encoder.modules() if isinstance(m, LowRankWeight)]
    picked: list[nn.Parameter] = []
    for i in np.random.default_rng(seed).permutation(len(weights)):
        size = sum(p.numel() for p in weights[i].parameters())
        if sum(p.numel() for p in picked) + size <= most:
            picked += [p.requires_grad_(True) for p in weights[i].parameters()]
    return picked


if __name__ == "__main__":
    print(peak_mebibytes(sys.argv[1]))
