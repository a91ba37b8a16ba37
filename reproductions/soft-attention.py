"""Reproduce SOFT (arXiv 2207.03341) on a laptop: accuracy against softmax attention, and images of another size.

Two stages of MetaFormer blocks on Fashion-MNIST at 32 x 32, a token every 2 x 2 pixels at first; only the attention
differs.  Nystrom attention with softmax is that of Xiong et al. (arXiv 2102.03902): means of the tokens as landmarks,
softmax of all three kernels, the pseudo-inverse by its own iteration.
"""

from __future__ import annotations

import functools
from typing import Any

import _mixer_nets as nets
import torch
from _harness import Outcome, Reproduction, at_least
from torch import Tensor, nn

from quernel.nn import Mixer, SoftmaxAttention, SoftmaxFreeAttention

soft = Reproduction("soft-attention", paper="2207.03341")

DIMS, DEPTHS, HEADS, RATIOS = (32, 64), (1, 1), (2, 4), (4, 2)
SIDE, IMAGES, EPOCHS = 32, 10_000, 3
STEPS = EPOCHS * IMAGES // nets.BATCH
SEEDS = (0, 1)
SCALE = f"two stages of {DIMS} channels, {IMAGES:,} images of {SIDE} x {SIDE}, {EPOCHS} epochs"

photos = functools.partial(nets.images, side=SIDE)


class SoftmaxNystrom(SoftmaxAttention):
    """softmax(q k_l^T) softmax(q_l k_l^T)^+ softmax(q_l k^T) v, landmarks the means of the tokens' cells."""

    def __init__(self, dim: int, num_heads: int, ratio: int) -> None:
        super().__init__(dim, num_heads)
        self.ratio = ratio

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        sizes = x.shape[1:-1]
        q, k, v = self._heads(x.flatten(1, -2))
        q = q * q.shape[-1] ** -0.5
        q_marks, k_marks = (self._means(t, sizes) for t in (q, k))
        inner = torch.softmax(q_marks @ k_marks.mT, -1)
        inverse = inner.mT / (inner.sum(-2).amax(-1) * inner.sum(-1).amax(-1))[..., None, None]
        eye = torch.eye(inner.shape[-1])
        for _ in range(6):
            step = inner @ inverse
            inverse = 0.25 * inverse @ (13 * eye - step @ (15 * eye - step @ (7 * eye - step)))
        y = torch.softmax(q @ k_marks.mT, -1) @ (inverse @ (torch.softmax(q_marks @ k.mT, -1) @ v))
        return self._merged(y).view_as(x)

    def _means(self, t: Tensor, sizes: Any) -> Tensor:
        grid = t.mT.flatten(0, 1).unflatten(-1, sizes)
        return nn.functional.avg_pool2d(grid, self.ratio).flatten(2).mT.unflatten(0, t.shape[:2])


def mixer(kind: str, dim: int, stage: int) -> Mixer:
    heads, ratio = HEADS[stage], RATIOS[stage]
    if kind == "softmax":
        return SoftmaxAttention(dim, heads)
    if kind == "softmax Nystrom":
        return SoftmaxNystrom(dim, heads, ratio)
    norm: Any = {"SOFT": "bottleneck", "SOFT, token norm": "token", "SOFT, no norm": None}[kind]
    return SoftmaxFreeAttention(dim, heads, ratio, norm=norm)


@functools.cache
def measured(kind: str, seed: int) -> dict[str, float]:
    """Return the test accuracies at both sizes of a net whose rate was chosen with the first seed."""
    recipe = {"version": 1, "scale": SCALE, "kind": kind, "seed": seed}

    def measure() -> dict[str, float]:
        rate = nets.chosen_rate(trained, kind, SEEDS[0], photos)
        model = trained(kind, rate, seed)
        sizes = {side: nets.accuracy(model, *nets.images("test", None, side)) for side in (SIDE, 2 * SIDE)}
        return {"rate": rate, "same": sizes[SIDE], "twice": sizes[2 * SIDE]}

    return nets.kept("soft-attention", recipe, measure)


@functools.cache
def trained(kind: str, rate: float, seed: int) -> nn.Module:
    x, y = nets.images("train", IMAGES, SIDE)

    def make() -> nn.Module:
        grid = SIDE // 2
        return nets.VisionNet(lambda d, s: mixer(kind, d, s), DIMS, DEPTHS, stride=2, side=grid, positions=True)

    return nets.fitted(make, nets.image_loss(x, y), steps=STEPS, rate=rate, seed=seed)


def row(kind: str, seed: int) -> dict[str, Any]:
    found = measured(kind, seed)
    return {
        "attention": kind,
        f"{SIDE} x {SIDE} (%)": found["same"],
        f"{2 * SIDE} x {2 * SIDE} (%)": found["twice"],
        "rate": found["rate"],
    }


@soft.claim(
    name="accuracy",
    claim="Attention without softmax through a few landmarks is as accurate as softmax attention",
    scale=f"{SCALE}; 16 landmarks of 256 and of 64 tokens",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="softmax attention",
    rule=at_least(-1.5, of="ours - baseline"),
    checks=("at least as accurate as softmax Nystrom attention",),
    seeds=SEEDS,
)
def accuracy(seed: int) -> Outcome:
    kinds = ("SOFT", "softmax", "softmax Nystrom")
    ours, exact, other = (measured(kind, seed)["same"] for kind in kinds)
    checks = {"at least as accurate as softmax Nystrom attention": ours >= other}
    return Outcome(ours, exact, checks, [row(kind, seed) for kind in kinds])


@soft.claim(
    name="resolution",
    claim="Symmetric normalisation keeps the accuracy when images get larger",
    scale=f"{SCALE}, judged at {2 * SIDE} x {2 * SIDE} (upsampled): 64 landmarks of 1024 tokens and of 256",
    data="Fashion-MNIST",
    metric="loss of test accuracy (points)",
    baseline="the same without a norm",
    rule=at_least(0.0, of="baseline - ours"),
    seeds=SEEDS,
)
def resolution(seed: int) -> Outcome:
    kinds = ("SOFT, token norm", "SOFT, no norm", "SOFT", "softmax")
    lost = {kind: measured(kind, seed)["same"] - measured(kind, seed)["twice"] for kind in kinds}
    rows = [row(kind, seed) for kind in kinds]
    return Outcome(lost["SOFT, token norm"], lost["SOFT, no norm"], rows=rows)


if __name__ == "__main__":
    raise SystemExit(soft.main())
