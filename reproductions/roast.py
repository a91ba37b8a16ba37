"""Reproduce ROAST (arXiv 2207.10702) on a laptop: networks made of one array that is 10 and 100 times smaller.

Whatever does not hold is said beside its verdict, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from _harness import Outcome, Reproduction, at_least
from _roast_nets import judged

roast = Reproduction("roast", paper="2207.10702")

FASHION = "784-512-512-10 net, 3 epochs of Adam, one cycle, tuned rates"
CIFAR = "ResNet-20, 4,000 images, 4 epochs of Adam, one cycle, tuned rates"
TEXT = "2 blocks of 64 over 8,000 words of 64 numbers, 20,000 sentences, 3 epochs, tuned rates"
SEEDS = (0, 1, 2)


def compared(task: str, seed: int, *arms: tuple[str, float], checks: Mapping[str, bool] | None = None) -> Outcome:
    """Train the arms (name, ratio); the first is ours, the second the baseline."""
    found = {arm: judged(task, *arm, seed) for arm in arms}
    rows = [
        {"arm": name, "ratio": ratio, "parameters": a.parameters, "rate": a.rate, "accuracy": a.accuracy}
        for (name, ratio), a in found.items()
    ]
    return Outcome(found[arms[0]].accuracy, found[arms[1]].accuracy, checks or {}, rows)


def _claim(name: str, claim: str, scale: str, data: str, baseline: str, bound: float, **more: Any) -> Any:
    return roast.claim(
        name=name, claim=claim, scale=scale, data=data, metric="test accuracy (%)", baseline=baseline,
        rule=at_least(bound, of="ours - baseline"), seeds=SEEDS, **more,
    )  # fmt: skip


@_claim(
    "mlp-10x",
    "A network of 10 times fewer parameters in one hashed array loses next to nothing",
    f"{FASHION}; one array of a tenth",
    "Fashion-MNIST",
    "dense",
    -1.2,
    checks=("1 point above a narrow dense net of equal parameters",),
)
def mlp_ten(seed: int) -> Outcome:
    ours, narrow = (judged("fashion", arm, 0.1, seed).accuracy for arm in ("roast", "narrow"))
    checks = {"1 point above a narrow dense net of equal parameters": ours >= narrow + 1}
    return compared("fashion", seed, ("roast", 0.1), ("dense", 1.0), ("narrow", 0.1), checks=checks)


@_claim(
    "mlp-100x",
    "At 100 times fewer parameters it is far better than a small dense network",
    f"{FASHION}; one array of a hundredth",
    "Fashion-MNIST",
    "narrow dense net of equal parameters",
    4.0,
)
def mlp_hundred(seed: int) -> Outcome:
    return compared("fashion", seed, ("roast", 0.01), ("narrow", 0.01))


@_claim(
    "hashednet",
    "Hashing tiles is as good as hashing every number",
    f"{FASHION}; one array of a tenth, tiles of 16 x 16",
    "Fashion-MNIST",
    "HashedNet over one array",
    -0.5,
)
def hashednet(seed: int) -> Outcome:
    return compared("fashion", seed, ("roast", 0.1), ("hashed", 0.1))


@_claim(
    "global",
    "Sharing one array over all layers is at least as good as an array a layer",
    f"{FASHION}; a hundredth of the numbers",
    "Fashion-MNIST",
    "an array a layer",
    -0.3,
)
def shared_by_all(seed: int) -> Outcome:
    return compared("fashion", seed, ("roast", 0.01), ("local", 0.01))


@_claim(
    "resnet-10x",
    "A convolutional network in one hashed array is better than a narrow one of equal parameters",
    f"{CIFAR}; one array of a tenth",
    "CIFAR-10, 4,000 JPEG training images, 2,000 JPEG test images",
    "narrow ResNet-20 of equal parameters",
    1.0,
)
def resnet_ten(seed: int) -> Outcome:
    return compared("cifar", seed, ("roast", 0.1), ("narrow", 0.1))


@_claim(
    "resnet-100x",
    "At 100 times fewer parameters a hashed convolutional network is far better than a narrow one",
    f"{CIFAR}; one array of a hundredth",
    "CIFAR-10, 4,000 JPEG training images, 2,000 JPEG test images",
    "narrow ResNet-20 of equal parameters",
    4.0,
)
def resnet_hundred(seed: int) -> Outcome:
    return compared("cifar", seed, ("roast", 0.01), ("narrow", 0.01))


@_claim(
    "text-10x",
    "Embedding, attention and MLP of a text classifier live in one hashed array",
    f"{TEXT}; one array of a tenth",
    "SST-2 train (20,000 sentences), judged on dev",
    "narrow dense net of equal parameters",
    1.0,
)
def text_ten(seed: int) -> Outcome:
    return compared("text", seed, ("roast", 0.1), ("narrow", 0.1), ("dense", 1.0))


@_claim(
    "text-100x",
    "A text classifier trains from scratch in an array 100 times smaller",
    f"{TEXT}; one array of a hundredth",
    "SST-2 train (20,000 sentences), judged on dev",
    "narrow dense net of equal parameters",
    4.0,
)
def text_hundred(seed: int) -> Outcome:
    return compared("text", seed, ("roast", 0.01), ("narrow", 0.01))


if __name__ == "__main__":
    raise SystemExit(roast.main())
