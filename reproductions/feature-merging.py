"""Reproduce feature merging (arXiv 2310.06756) on a laptop: narrower nets without data, and what more data brings.

Merging is compared with magnitude (L1) pruning and k-means folding at equal shares of channels in every hidden space,
without data or training.  The over-wide MLP loses next to nothing; nets that use their channels (a small VGG,
ResNet-20) lose much at half of them with every data-free method, L1 pruning the most.  A least-squares refit of the
layers that read merged channels on 512 unlabelled images wins most of it back; it is not part of the paper.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from _fashion_mnist import accuracy, fashion
from _harness import Outcome, Reproduction, at_least, at_most
from _narrow_nets import narrowed, trained
from torch import Tensor, nn

from quernel import data
from quernel.compress import Context, FeatureMerging, feature_complexity
from quernel.models import ResNet20
from quernel.models.resnet20 import MEAN, STD

KEPT = (0.8, 0.6, 0.5, 0.4, 0.3)
# Every group of the residual net is used: it breaks down earlier.
KEPT_RESNET = (0.9, 0.8, 0.7, 0.6, 0.5)
HOW = {"merge": "IFM", "mean": "IFM, means", "fold": "k-means folding", "magnitude": "L1 pruning"}
BETAS = (0.1, 0.2, 0.3, 0.4)
SAMPLES, JPEG_IMAGES = 512, 1000

merging = Reproduction("feature-merging", paper="2310.06756")


@functools.cache
def curves(kind: str, width: int, seed: int) -> dict[str, list[float]]:
    """Return the test accuracy of each method at each share of channels."""
    x, y = fashion("test")
    model = trained(kind, width, seed)
    return {how: [accuracy(narrowed(model, how, kept, x[:2], seed), x, y) for kept in KEPT] for how in HOW}


def table(found: dict[str, list[float]], kept: tuple[float, ...], suffix: str = "") -> list[dict[str, Any]]:
    return [{f"channels kept{suffix}": k} | {HOW[h]: found[h][i] for h in HOW} for i, k in enumerate(kept)]


def wins(found: dict[str, list[float]], rival: str = "magnitude") -> int:
    """Return at how many shares merging is more accurate."""
    return sum(ours > other for ours, other in zip(found["merge"], found[rival], strict=True))


@merging.claim(
    name="over-wide",
    claim="An over-wide network keeps its accuracy at half of its hidden channels, without data or training",
    scale="MLP 784-1024-512-10, 2 epochs; 50 % of the channels of both hidden layers",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="uncompressed",
    rule=at_least(-1.0, of="ours - baseline"),
    checks=("above L1 pruning at 3 of 5 shares",),
    seeds=(0, 1, 2),
)
def over_wide(seed: int) -> Outcome:
    found = curves("mlp", 1, seed)
    won = wins(found)
    return Outcome(
        ours=found["merge"][KEPT.index(0.5)],
        baseline=accuracy(trained("mlp", 1, seed), *fashion("test")),
        checks={"above L1 pruning at 3 of 5 shares": won >= 3},
        rows=table(found, KEPT),
        notes=[f"above L1 pruning at {won} of 5 shares, above k-means folding at {wins(found, 'fold')}"],
    )


@merging.claim(
    name="convnet",
    claim="Merging keeps more accuracy than L1 pruning, without data or training",
    scale="VGG-like net of 32 to 128 channels with batch norms, 20,000 images, 2 epochs; 80 to 30 % of the channels",
    data="Fashion-MNIST",
    metric="shares of channels, of 5, at which test accuracy is higher",
    baseline="L1 pruning",
    rule=at_least(3, of="ours"),
    seeds=(0, 1, 2),
)
def convnet(seed: int) -> Outcome:
    found = curves("convnet", 2, seed)
    dense = accuracy(trained("convnet", 2, seed), *fashion("test"))
    notes = [f"uncompressed {dense:.1f} %; above k-means folding at {wins(found, 'fold')} of 5 shares"]
    return Outcome(wins(found), len(KEPT) - wins(found), rows=table(found, KEPT), notes=notes)


@functools.cache
def cifar(name: str) -> tuple[Tensor, Tensor]:
    held = data.load(name, split="test")
    rows = np.linspace(0, len(held.y) - 1, JPEG_IMAGES, dtype=np.int64) if "jpeg" in name else slice(None)
    x = torch.from_numpy(held.x[rows]).permute(0, 3, 1, 2).float().div(255)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), torch.from_numpy(held.y[rows])


@merging.claim(
    name="resnet20",
    claim="Merging keeps more accuracy than L1 pruning in a residual network, without data or training",
    scale="ResNet-20 checkpoint, its 9 inner spaces (the padded stream is left alone); 90 to 50 % of the channels",
    data="CIFAR-10: 2,000 exact training images, 1,000 JPEG test images beside them",
    metric="shares of channels, of 5, at which accuracy is higher",
    baseline="L1 pruning",
    rule=at_least(3, of="ours"),
)
def resnet20(seed: int) -> Outcome:
    model = ResNet20.load_pretrained()
    rows, notes, found = [], [], {}
    for name in ("cifar10-lossless", "cifar10-jpeg"):
        x, y = cifar(name)
        found[name] = {
            how: [accuracy(narrowed(model, how, kept, x[:2], seed), x, y) for kept in KEPT_RESNET] for how in HOW
        }
        rows += table(found[name], KEPT_RESNET)
        notes.append(f"{name}: uncompressed {accuracy(model, x, y):.1f} %; above L1 at {wins(found[name])} of 5 shares")
    won = wins(found["cifar10-lossless"])
    return Outcome(won, len(KEPT_RESNET) - won, rows=rows, notes=notes)


@merging.claim(
    name="complexity",
    claim="Larger networks are more redundant: at one threshold a smaller share of their channels survives",
    scale="VGG-like net of 16 to 64 channels against twice the width, 20,000 images, 2 epochs",
    data="Fashion-MNIST",
    metric="surviving share of channels at beta = 0.4",
    baseline="half the width",
    rule=at_most(0.99, of="ours / baseline", partly=1.0),
    checks=("smaller at beta 0.2, 0.3 and 0.4",),
    seeds=(0, 1, 2),
)
def complexity(seed: int) -> Outcome:
    shares: dict[int, dict[str, list[float]]] = {}
    for width in (1, 2):
        model = trained("convnet", width, seed)
        counts = feature_complexity(model, fashion("test")[0][:2], BETAS)
        sizes = {name: len(model.get_submodule(name).weight) for name in counts}
        shares[width] = {name: [n / sizes[name] for n in counts[name]] for name in counts}
        total = [sum(counts[name][i] for name in counts) / sum(sizes.values()) for i in range(len(BETAS))]
        shares[width]["all"] = total
    names = [*shares[1]]
    rows = [
        {"depth profile": f"layer {name}" if name != "all" else name}
        | {
            f"x{w} at {beta}": round(shares[w][name][i], 3)
            for w in (1, 2)
            for i, beta in enumerate(BETAS)
            if beta > 0.1
        }
        for name in names
    ]
    narrow, wide = shares[1]["all"], shares[2]["all"]
    smaller = [wide[BETAS.index(beta)] < narrow[BETAS.index(beta)] for beta in (0.2, 0.3, 0.4)]
    notes = [f"smaller at {sum(smaller)} of 3 thresholds"]
    return Outcome(wide[-1], narrow[-1], {"smaller at beta 0.2, 0.3 and 0.4": all(smaller)}, rows, notes)


def refitted(model: nn.Module, kept: float, refit: bool) -> float:
    """Return the accuracy after merging, with or without a refit on the last training images."""
    x, y = fashion("test")
    work = copy.deepcopy(model)
    method = FeatureMerging(beta=1.0, max_ratio=1 - kept, refit=refit)
    batches = fashion("train")[0][-SAMPLES:].split(128)
    method.apply(work, method.plan(work, Context(data=batches)))
    return accuracy(work, x, y)


@merging.claim(
    name="refit",
    claim="A least-squares refit on 512 unlabelled images restores most of what merging loses (beyond the paper)",
    scale="VGG-like net of 32 to 128 channels, 20,000 images, 2 epochs; 30 % of the channels",
    data="Fashion-MNIST",
    metric="test accuracy (%)",
    baseline="merging alone",
    rule=at_least(5.0, of="ours - baseline"),
    seeds=(0, 1, 2),
)
def refit(seed: int) -> Outcome:
    rows = [
        {
            "net": kind,
            "channels kept": kept,
            "merged": refitted(model, kept, False),
            "refitted": refitted(model, kept, True),
        }
        for kind, model in (("convnet", trained("convnet", 2, seed)), ("mlp", trained("mlp", 1, seed)))
        for kept in (0.5, 0.3)
    ]
    return Outcome(rows[1]["refitted"], rows[1]["merged"], rows=rows)


if __name__ == "__main__":
    raise SystemExit(merging.main())
