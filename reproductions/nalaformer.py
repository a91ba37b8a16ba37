"""Reproduce NaLaFormer (arXiv 2506.21137) on a laptop: linear attention with and without norms of queries and signs.

Every arm is the same network with the same projections and the same number of parameters; only the features of queries
and keys differ, or the attention is softmax.  No convolution and no gate stands beside the attention, and images come
pixel by pixel, so that nothing else moves information between tokens.  Every arm has its own rate, chosen with the
first seed on what was kept for validation.  The last rows of the table, of the first seed only, take the map apart: a
constant power (the norm cancels again), sizes without signs, keys without their cube; "learned scale" learns how far
norms are told apart, one scale a head.
"""

from __future__ import annotations

import functools
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.nn import GatedSoftmaxAttention, Mixer, NormAwareLinearAttention
from quernel.nn.functional import linear_attention, nala_feature_map

nala = Reproduction("nalaformer", paper="2506.21137")

SIDE, IMAGES, EPOCHS, DIM, HEADS, DEPTH = 14, 5_000, 3, 32, 4, 2
STEPS = EPOCHS * IMAGES // nets.BATCH
TEXT_DIM, LENGTH, TEXT_BATCH, TEXT_STEPS = 64, 512, 8, 300
TEXT_RATES = (3e-3, 6e-3)
SEEDS = (0, 1)
SCALE = f"{SIDE * SIDE} pixels, {DEPTH} blocks of width {DIM}, {HEADS} heads, {IMAGES:,} images, {EPOCHS} epochs"
TEXT_SCALE = (
    f"{LENGTH} characters, {DEPTH} blocks of width {TEXT_DIM}, {HEADS} heads, {TEXT_STEPS} steps of {TEXT_BATCH}"
)
PLAIN = ("ELU + 1", "ReLU")
ABLATIONS = ("constant power", "no signs", "no cube", "learned scale")


class Featured(NormAwareLinearAttention):
    """The layer with another feature map."""

    def __init__(self, dim: int, num_heads: int, kind: str, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.kind = kind

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        return linear_attention(*mapped(self.kind, q, k), v, causal=self.causal, chunk=self.chunk)


def mapped(kind: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of queries and keys."""
    if kind == "ELU + 1":
        return F.elu(q) + 1, F.elu(k) + 1
    if kind == "ReLU":
        return F.relu(q), F.relu(k)
    if kind == "constant power":
        return split(F.normalize(q, dim=-1), 3), split(k, 3)
    phi_q, phi_k = nala_feature_map(q, k)
    if kind == "no signs":
        return tuple(sum(phi.chunk(2, dim=-1)) for phi in (phi_q, phi_k))  # type: ignore[return-value]
    return phi_q, split(k, 1)  # "no cube"


def split(x: Tensor, power: int) -> Tensor:
    return torch.cat([F.relu(x), F.relu(-x)], dim=-1) ** power


def mixer(kind: str, dim: int, causal: bool = False) -> Mixer:
    if kind == "softmax":
        return GatedSoftmaxAttention(dim, HEADS, gate=False, lepe=None)
    options: dict[str, Any] = {"causal": causal, "gate": False, "lepe": None}
    if kind in ("NaLa", "learned scale"):
        return NormAwareLinearAttention(dim, HEADS, norm_scale="learn" if kind == "learned scale" else 1.0, **options)
    return Featured(dim, HEADS, kind, **options)


pixels = functools.partial(nets.pixels, side=SIDE)


@functools.cache
def trained(kind: str, rate: float, seed: int) -> nn.Module:
    x, y = pixels("train", IMAGES)

    def make() -> nn.Module:
        return nets.SequenceNet(lambda d, _: mixer(kind, d), DIM, DEPTH, length=SIDE * SIDE)

    return nets.fitted(make, nets.image_loss(x, y), steps=STEPS, rate=rate, seed=seed)


@functools.cache
def measured(kind: str, seed: int) -> dict[str, float]:
    """Return the test accuracy of a net whose rate was chosen with the first seed."""
    recipe = {"version": 2, "scale": SCALE, "kind": kind, "seed": seed, "rates": nets.RATES}

    def measure() -> dict[str, float]:
        rate = nets.chosen_rate(trained, kind, SEEDS[0], pixels)
        return {"rate": rate, "accuracy": nets.accuracy(trained(kind, rate, seed), *pixels("test"))}

    return nets.kept("nalaformer", recipe, measure)


def row(kind: str, seed: int) -> dict[str, Any]:
    found = measured(kind, seed)
    return {"attention": kind, "accuracy (%)": found["accuracy"], "rate": found["rate"]}


def plain(seed: int) -> float:
    return sum(measured(kind, seed)["accuracy"] for kind in PLAIN) / len(PLAIN)


@nala.claim(
    name="accuracy",
    claim="Norm awareness and signs make linear attention more accurate and close most of its gap to softmax",
    scale=SCALE,
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="mean of ELU + 1 and ReLU linear attention",
    rule=at_least(2.0, of="ours - baseline"),
    checks=("closes at least half of their gap to softmax",),
    seeds=SEEDS,
)
def accuracy(seed: int) -> Outcome:
    ours, before, exact = measured("NaLa", seed)["accuracy"], plain(seed), measured("softmax", seed)["accuracy"]
    checks = {"closes at least half of their gap to softmax": ours - before >= 0.5 * (exact - before)}
    shown = ("NaLa", *PLAIN, "softmax", *(ABLATIONS if seed == SEEDS[0] else ()))
    return Outcome(ours, before, checks, [row(kind, seed) for kind in shown])


@functools.cache
def reader(kind: str, rate: float, seed: int) -> nn.Module:
    vocab, texts = nets.characters()

    def make() -> nn.Module:
        return nets.SequenceNet(lambda d, _: mixer(kind, d, causal=True), TEXT_DIM, DEPTH, vocab=vocab, length=LENGTH)

    loss = nets.text_loss(texts["train"], LENGTH, TEXT_BATCH)
    return nets.fitted(make, loss, steps=TEXT_STEPS, rate=rate, seed=seed)


@functools.cache
def read(kind: str, seed: int) -> dict[str, float]:
    """Return the test loss of a reader whose rate was chosen with the first seed, and its bytes of state."""
    recipe = {"version": 2, "scale": TEXT_SCALE, "kind": kind, "seed": seed, "rates": TEXT_RATES}

    def measure() -> dict[str, float]:
        texts = nets.characters()[1]
        losses = {
            rate: nets.text_loss_of(reader(kind, rate, SEEDS[0]), texts["validation"], LENGTH) for rate in TEXT_RATES
        }
        rate = min(losses, key=losses.__getitem__)
        model = reader(kind, rate, seed)
        found = {"rate": rate, "loss": nets.text_loss_of(model, texts["test"], LENGTH)}
        if kind == "NaLa":
            found |= {f"bytes after {n}": state_bytes(model, n) for n in (1, LENGTH)}
        return found

    return nets.kept("nalaformer-text", recipe, measure)


@torch.no_grad()
def state_bytes(model: nn.Module, tokens: int) -> float:
    """Return the bytes of the states of all mixers after so many tokens, one by one."""
    total = 0
    for layer in (m for m in model.modules() if isinstance(m, NormAwareLinearAttention)):
        state = layer.init_state(1)
        for x in torch.randn(tokens, 1, layer.dim, generator=torch.Generator().manual_seed(0)):
            _, state = layer.step(x, state)
        total += sum(t.untyped_storage().nbytes() for t in (*state.sums, state.recent))
    return float(total)


@nala.claim(
    name="text",
    claim="Causal norm-aware linear attention models language better than ELU + 1, with memory that does not grow",
    scale=TEXT_SCALE,
    data="tinyshakespeare",
    metric="test loss (nats a character)",
    baseline="ELU + 1 linear attention",
    rule=at_most(0.0, of="ours - baseline"),
    checks=("a state has the same size after 1 and after 512 tokens",),
    seeds=SEEDS,
)
def text(seed: int) -> Outcome:
    ours, other = read("NaLa", seed), read("ELU + 1", seed)
    checks = {
        "a state has the same size after 1 and after 512 tokens": ours["bytes after 1"] == ours[f"bytes after {LENGTH}"]
    }
    rows = [
        {"attention": kind, "loss": found["loss"], "rate": found["rate"]}
        for kind, found in (("NaLa", ours), ("ELU + 1", other))
    ]
    cache = 2 * DEPTH * LENGTH * TEXT_DIM * 4
    notes = [f"{ours[f'bytes after {LENGTH}']:.0f} bytes of state; keys and values of {LENGTH} tokens take {cache}"]
    return Outcome(ours["loss"], other["loss"], checks, rows, notes)


if __name__ == "__main__":
    raise SystemExit(nala.main())
