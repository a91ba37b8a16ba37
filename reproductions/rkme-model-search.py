"""Claims of rkme-model-search: reductions, herding, and finding the generator of an image or a sentence among many.

No diffusion models here: generators are samplers on principal components of Fashion-MNIST in five styles, and trigram
samplers of texts, so that the origin of every query is known. The temperature is chosen on the hub, by leaving its own
points out, never on queries. Baselines are the plain specification without prompts, the mean of all outputs (by cosine
or distance, whichever is better), and votes of the nearest of all outputs (with the best number of them): the ceiling.

The comparison with learnware's reduction uses its rule as ``_reduction_peers`` writes it: ten rounds of one step
of size 0.1 with half the repulsion, weights by the quadratic programme. The benchmark runs the package itself.
"""

from __future__ import annotations

import functools
from typing import Any

import _model_hubs as hubs
import _reduction_peers as peers
import _sentence_vectors as vectors
import numpy as np
import torch
from _harness import Outcome, Reproduction, at_least, at_most

from quernel.kernels import ReducedMeanEmbedding
from quernel.kernels._mean_targets import best_weights, kernel_matrix
from quernel.kernels.statistics import median_gamma, paired_bootstrap

rkme = Reproduction("rkme-model-search", paper="2412.12232")

# A power of two times the 50 points, which kernel thinning halves down to.
ROWS, POINTS = 6400, 50


class Errors:
    """E of points and weights, with what does not depend on them computed once."""

    def __init__(self, x: np.ndarray, gamma: float) -> None:
        self.x, self.gamma = x, gamma
        self.constant = float(np.mean([self.kernel(part, x).mean() for part in np.split(x, 16)]))

    def kernel(self, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return k between rows of y and of z."""
        return kernel_matrix(y, z, "gaussian", self.gamma)

    def parts(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return K of the points, and their mean kernel with the rows."""
        return self.kernel(z, z), self.kernel(z, self.x).mean(1)

    def mmd(self, z: np.ndarray, beta: np.ndarray | None = None) -> float:
        """Return the discrepancy of weighted points, uniform by default."""
        k, c = self.parts(z)
        b = np.full(len(z), 1 / len(z)) if beta is None else beta
        return float(np.sqrt(max(0.0, b @ k @ b - 2 * b @ c + self.constant)))

    def weights(self, z: np.ndarray) -> np.ndarray:
        """Return the best weights on the simplex."""
        k, c = (torch.from_numpy(part) for part in self.parts(z))
        return best_weights(k, c, None, simplex=True).numpy()


@rkme.claim(
    name="reduction",
    claim="Few weighted points stand for the mean embedding of all outputs",
    scale="50 points for 6,400 images in 32 principal components, gamma 1 / median^2",
    data="Fashion-MNIST train",
    metric="maximum mean discrepancy to all rows",
    baseline="learnware's rule, ten rounds from the same centres",
    rule=at_most(0.8, of="ours / baseline"),
    checks=(
        "at most half of random rows and of k-means centres, uniform weights",
        "at most 0.9 of k-means centres with the best weights",
        "at most that of kernel thinning (goodpoints)",
    ),
    seeds=(0, 1, 2),
)
def reduction(seed: int) -> Outcome:
    draw = np.random.default_rng(seed)
    pixels, _ = hubs._fashion("train")
    flat = pixels[draw.permutation(len(pixels))[:ROWS]].reshape(ROWS, -1)
    mean, axes = vectors.principal(flat, 32, centred=True)
    x = ((flat - mean) @ axes).astype(np.float64)
    gamma = median_gamma(x)
    errors = Errors(x, gamma)
    start = ReducedMeanEmbedding(POINTS, gamma=gamma, rounds=0, random_state=seed).fit(x)
    found: dict[str, float] = {
        "random rows": float(np.median([errors.mmd(x[draw.choice(ROWS, POINTS, replace=False)]) for _ in range(10)])),
        "k-means centres, uniform": errors.mmd(start.z),
        "k-means centres, best weights": errors.mmd(start.z, start.beta),
        "kernel thinning": errors.mmd(x[peers.kernel_thinning(x, gamma, seed)]),
    }
    found["learnware's rule"] = errors.mmd(*peers.learnware_descent(start.z, x, gamma, errors.weights, 10))
    for rounds in (2, 10, 20):
        spec = ReducedMeanEmbedding(POINTS, gamma=gamma, rounds=rounds, random_state=seed).fit(x)
        found[f"ours, {rounds} rounds"] = errors.mmd(spec.z, spec.beta)
    ours = found["ours, 20 rounds"]
    checks = {
        "at most half of random rows and of k-means centres, uniform weights": ours
        <= 0.5 * min(found["random rows"], found["k-means centres, uniform"]),
        "at most 0.9 of k-means centres with the best weights": ours <= 0.9 * found["k-means centres, best weights"],
        "at most that of kernel thinning (goodpoints)": ours <= found["kernel thinning"],
    }
    return Outcome(ours, found["learnware's rule"], checks, [{"points": k, "MMD": v} for k, v in found.items()])


@rkme.claim(
    name="herding",
    claim="Samples herded from a specification converge faster than random ones",
    scale="200 samples from 2,000 candidates, a mixture of three Gaussians in two dimensions, 60 points",
    data="generated",
    metric="exponent of the discrepancy in the number of samples",
    baseline="random samples",
    rule=at_most(-0.7, of="ours"),
    seeds=(0, 1, 2),
)
def herding(seed: int) -> Outcome:
    draw = np.random.default_rng(seed)
    centers = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    x = centers[draw.integers(0, 3, 2000)] + 0.7 * draw.standard_normal((2000, 2))
    spec = ReducedMeanEmbedding(60, gamma=0.5, random_state=seed).fit(x)
    sizes = np.unique(np.geomspace(5, 200, 15).astype(int))

    def exponent(chosen: np.ndarray) -> float:
        distances = []
        for t in sizes:
            points = np.concatenate((chosen[:t], spec.z))
            signed = np.concatenate((np.full(t, 1 / t), -spec.beta))
            distances.append(np.sqrt(max(1e-30, signed @ kernel_matrix(points, points, "gaussian", 0.5) @ signed)))
        return float(np.polyfit(np.log(sizes), np.log(distances), 1)[0])

    random = float(np.mean([exponent(x[draw.permutation(2000)[:200]]) for _ in range(10)]))
    return Outcome(exponent(spec.herd(200, x)), random)


def shares(ranks: np.ndarray) -> dict[str, float]:
    return {"top-1": 100 * float((ranks == 0).mean()), "top-4": 100 * float((ranks < 4).mean())}


@functools.lru_cache(maxsize=2)
def methods(kind: str, seed: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return the temperature that the hub chooses, and the ranks of every method."""
    hub = hubs.images(seed) if kind == "images" else hubs.texts(seed)
    temperature = hubs.index_of(hub).choose_temperature()
    return temperature, {
        "weighted RKME": hubs.by_index(hub, prompts=hub.asked, temperature=temperature),
        "plain RKME": hubs.by_index(hub),
        "mean of all outputs": hubs.by_mean(hub),
        "nearest of all outputs": hubs.by_neighbours(hub),
    }


def table(ranks: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [{"method": name, **shares(found)} for name, found in ranks.items()]


@rkme.claim(
    name="images",
    claim="One image finds the most suitable generative model, where unweighted specifications often fail",
    scale="20 samplers on principal components (4 class groups, 5 styles), 50 points for 2,000 outputs, 1,000 queries",
    data="Fashion-MNIST in five styles (no diffusion models); class names by MiniLM as prompts",
    metric="top-1 accuracy (%)",
    baseline="plain RKME",
    rule=at_least(8.0, of="ours - baseline"),
    checks=(
        "top-4 at least 80 %",
        "top-1 at least 8 points above the mean of all outputs",
        "top-1 at most 4 points below the nearest of all outputs",
    ),
    seeds=(0, 1, 2),
)
def images(seed: int) -> Outcome:
    temperature, ranks = methods("images", seed)
    found = {name: shares(r) for name, r in ranks.items()}
    ours = found["weighted RKME"]
    checks = {
        "top-4 at least 80 %": ours["top-4"] >= 80,
        "top-1 at least 8 points above the mean of all outputs": ours["top-1"]
        >= found["mean of all outputs"]["top-1"] + 8,
        "top-1 at most 4 points below the nearest of all outputs": ours["top-1"]
        >= found["nearest of all outputs"]["top-1"] - 4,
    }
    notes = [f"temperature {temperature}, chosen on the hub"]
    return Outcome(ours["top-1"], found["plain RKME"]["top-1"], checks, table(ranks), notes)


@rkme.claim(
    name="texts",
    claim="One sentence finds its source among text generators",
    scale="12 trigram samplers, 50 points for 400 sentences, 40 shared words as prompts, 600 queries, MiniLM",
    data="tinyshakespeare, SST-2, Cranfield and NPL (for SciFact and NFCorpus), WikiText-2 validation and test, Brown",
    metric="top-4 accuracy (%)",
    baseline="plain RKME",
    rule=at_least(80.0, of="ours"),
    checks=("in top-1 weighted RKME, plain RKME and the mean of all outputs come in this order",),
    seeds=(0, 1),
)
def texts(seed: int) -> Outcome:
    temperature, ranks = methods("texts", seed)
    found = {name: shares(r) for name, r in ranks.items()}
    first = [found[name]["top-1"] for name in ("weighted RKME", "plain RKME", "mean of all outputs")]
    checks = {
        "in top-1 weighted RKME, plain RKME and the mean of all outputs come in this order": first
        == sorted(first, reverse=True)
    }
    notes = [f"temperature {temperature}, chosen on the hub; prompts of queries are the nearest of the 40 words"]
    return Outcome(found["weighted RKME"]["top-4"], found["plain RKME"]["top-4"], checks, table(ranks), notes)


@rkme.claim(
    name="more-examples",
    claim="More example images find the model more often, and a wrong prompt does little harm at a high temperature",
    scale="the same 20 samplers, 1,000 queries of 1, 2 and 4 images of one class",
    data="Fashion-MNIST in five styles (no diffusion models); class names by MiniLM as prompts",
    metric="top-1 accuracy with four images (%)",
    baseline="one image",
    rule=at_least(0.0, of="ours - baseline"),
    checks=(
        "two images are not worse than one, nor four than two (paired, 95 %)",
        "a wrong prompt at T = 1 is at most 5 points below plain RKME",
    ),
    seeds=(0, 1, 2),
)
def more_examples(seed: int) -> Outcome:
    hub = hubs.images(seed)
    temperature, ranks = methods("images", seed)
    right = {
        each: (hubs.by_index(hub, each=each, prompts=hub.asked, temperature=temperature) == 0).astype(float)
        for each in (1, 2, 4)
    }
    wrong = shares(hubs.by_index(hub, prompts=hub.wrong, temperature=1.0))["top-1"]
    plain = shares(ranks["plain RKME"])["top-1"]
    gains = [paired_bootstrap(right[more], right[fewer], seed=seed) for fewer, more in ((1, 2), (2, 4))]
    checks = {
        "two images are not worse than one, nor four than two (paired, 95 %)": all(gain.high >= 0 for gain in gains),
        "a wrong prompt at T = 1 is at most 5 points below plain RKME": wrong >= plain - 5,
    }
    rows = [{"images": each, "top-1": 100 * found.mean()} for each, found in right.items()]
    notes = [f"a wrong prompt at T = 1: {wrong:.1f}, plain RKME {plain:.1f}"]
    return Outcome(100 * right[4].mean(), 100 * right[1].mean(), checks, rows, notes)


if __name__ == "__main__":
    raise SystemExit(rkme.main())
