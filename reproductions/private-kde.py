"""Reproduce private similarity computation (arXiv 2403.08917) on a laptop: densities, distances, projection, classes.

Every guarantee is for one record more or less ("add_remove"), with the delta that the claim names. The noise of all
releases comes from the operating system, so that figures vary a little from run to run, beyond the seeds of features.
"""

from __future__ import annotations

import functools
import statistics
import time

import numpy as np
from _harness import Outcome, Reproduction, at_least, at_most
from _private_probe import DELTA, EPOCHS, HELD_OUT, best_probe, rows, trained_probe
from numpy.typing import NDArray

from quernel import data
from quernel.kernels.features import shift_invariant_kernel
from quernel.sketch import PrivateDistanceSum, PrivateKDE, PrivateSimilarityClassifier
from quernel.sketch._count_trees import l1_coefficients
from quernel.sketch.dp import Mechanism, PrivacyLedger, Sensitivity, calibrate
from quernel.sketch.dp.noise import NoiseSource

private = Reproduction("private-kde", paper="2403.08917")

Array = NDArray[np.float32]
FASHION_DELTA = 1e-5
# Known without the images: at this distance in pixel values 0..1 densities are some hundredths.
BANDWIDTH = 5.0
QUERIES = 1000
FEATURES = (512, 2048, 8192, 16384)
# Images taken in at a time: the exact kernel is never held for all at once.
PART = 10_000


@functools.cache
def images(split: str) -> Array:
    """Return Fashion-MNIST as rows over the public constant 255."""
    held = data.load("fashion-mnist", split=split)
    return held.x.reshape(len(held.x), -1).astype(np.float32) / np.float32(255)


@functools.cache
def exact(bandwidth: float) -> NDArray[np.float64]:
    """Return kernel sums over the training images at the first test images."""
    x, q = images("train"), images("test")[:QUERIES]
    parts = (
        shift_invariant_kernel("gaussian", q, x[i : i + PART], bandwidth=bandwidth) for i in range(0, len(x), PART)
    )
    return np.sum([part.sum(1) for part in parts], axis=0)


@functools.cache
def densities(seed: int) -> dict[tuple[str, float, int], NDArray[np.float64]]:
    """Return answers by mechanism, epsilon and number of features; the features are summed once each."""
    found = {}
    for n_features in FEATURES:
        kde = PrivateKDE(bandwidth=BANDWIDTH, n_features=n_features, delta=FASHION_DELTA, feature_seed=seed)
        kde.partial_fit(images("train"))
        ledger = PrivacyLedger(1e6, FASHION_DELTA)  # of an experiment: these are not the releases of one owner
        for epsilon in (0.5, 1.0):
            for name, delta in (("gaussian", FASHION_DELTA), ("laplace", 0.0)):
                release = kde.release(ledger, epsilon=epsilon, delta=delta, mechanism=name)
                found[name, epsilon, n_features] = release.query(images("test")[:QUERIES])
    return found


def density_rows(seed: int, epsilon: float) -> list[dict[str, float]]:
    """Return errors of both mechanisms at every number of features."""
    truth, rows = exact(BANDWIDTH), []
    for n_features in FEATURES:
        row: dict[str, float] = {"features": n_features}
        for name in ("gaussian", "laplace"):
            error = densities(seed)[name, epsilon, n_features] - truth
            row[f"{name} RMSE"] = float(np.sqrt((error**2).mean()))
            row[f"{name} relative"] = float(np.median(np.abs(error) / truth))
        rows.append(row)
    return rows


@private.claim(
    name="density",
    claim="Kernel densities are released privately with the error of random features, not of the noise",
    scale="60,000 images, 1,000 queries, bandwidth 5, epsilon 0.5, delta 1e-5, add_remove; the best of four numbers of "
    "features each",
    data="Fashion-MNIST train, queries from test",
    metric="root mean square error of kernel sums",
    baseline="Laplace noise on the same features (LSQ), delta 0",
    rule=at_most(0.3, of="ours / baseline", partly=0.5),
    seeds=(0, 1, 2),
)
def density(seed: int) -> Outcome:
    rows = density_rows(seed, 0.5)
    best = {name: min(row[f"{name} RMSE"] for row in rows) for name in ("gaussian", "laplace")}
    return Outcome(best["gaussian"], best["laplace"], rows=rows)


@private.claim(
    name="relative-error",
    claim="A private density is close to the exact one",
    scale="60,000 images, 1,000 queries, bandwidth 5, epsilon 1, delta 1e-5, add_remove; 16,384 features",
    data="Fashion-MNIST train, queries from test",
    metric="median relative error against exact sums",
    baseline="Laplace noise at its best number of features, delta 0",
    rule=at_most(0.05, of="ours", partly=0.1),
    seeds=(0, 1, 2),
)
def relative_error(seed: int) -> Outcome:
    rows = density_rows(seed, 1.0)
    return Outcome(rows[-1]["gaussian relative"], min(row["laplace relative"] for row in rows), rows=rows)


JL_DIM, JL_FEATURES = 128, 4096


@private.claim(
    name="projection",
    claim="A public projection decouples the cost of a query from the dimension at a small additive error",
    scale="60,000 images, 784 to 128 coordinates, 4,096 features, bandwidth 5, epsilon 1, delta 1e-5, add_remove",
    data="Fashion-MNIST train, queries from test",
    metric="root mean square error of the mean kernel",
    baseline="the same without projection",
    # Distances squared are off by sqrt(2 / 128) = 1/8, and the kernel then by at most an e-th of that.
    rule=at_most(0.046, of="ours"),
    checks=("at least 5 times fewer multiply-adds a query",),
    seeds=(0, 1, 2),
)
def projection(seed: int) -> Outcome:
    truth, errors = exact(BANDWIDTH) / len(images("train")), []
    for jl_dim in (JL_DIM, None):
        settings = {"bandwidth": BANDWIDTH, "n_features": JL_FEATURES, "delta": FASHION_DELTA, "feature_seed": seed}
        kde = PrivateKDE(jl_dim=jl_dim, **settings).partial_fit(images("train"))
        answers = kde.release().query(images("test")[:QUERIES], mean=True)
        errors.append(float(np.sqrt(((answers - truth) ** 2).mean())))
    # The projection is three transforms of 1,024 coordinates: 10 additions a coordinate each.
    ours, plain = 3 * 10 * 1024 + JL_DIM * JL_FEATURES, images("train").shape[1] * JL_FEATURES
    checks = {"at least 5 times fewer multiply-adds a query": plain >= 5 * ours}
    return Outcome(errors[0], errors[1], checks, notes=[f"{plain / ours:.1f} times fewer operations"])


RELEASES, LEAVES = 50, 256


def error_of(answers: NDArray[np.float64], truth: NDArray[np.float64], n: int) -> float:
    """Return the root mean square error a row."""
    return float(np.sqrt(((answers - truth) ** 2).mean())) / n


@private.claim(
    name="distances",
    claim="Sums of l1 distances are released with little additive error (here: consistent trees, no factor 1 + alpha)",
    scale="60,000 numbers in [0, 1], 256 leaves, 99 queries, 50 releases, epsilon 1, delta 0, add_remove",
    data="mean brightness of Fashion-MNIST train images",
    metric="root mean square error over the number of rows",
    baseline="the paper's shells, alpha 0.1",
    rule=at_least(20, of="baseline / ours", partly=5),
    checks=("at most the error of a noisy histogram",),
    seeds=(0, 1, 2),
)
def distances(seed: int) -> Outcome:
    x = images("train").mean(1, dtype=np.float64)[:, None]
    y = np.linspace(0.01, 0.99, 99)[:, None]
    # Against the leaves' centres: what rounding costs is the same for all three, and printed.
    centres = (np.floor(x * LEAVES).clip(0, LEAVES - 1) + 0.5) / LEAVES
    truth = np.abs(y - centres.T).sum(1)
    answers: dict[str, list[NDArray[np.float64]]] = {"consistent": [], "shells": [], "histogram": []}
    for method in ("consistent", "shells"):
        sums = PrivateDistanceSum(leaves=LEAVES, method=method, epsilon=1.0).partial_fit(x)
        ledger = PrivacyLedger(float(RELEASES))
        answers[method] = [sums.release(ledger).query(y) for _ in range(RELEASES)]
    answers["histogram"] = histogram_answers(x, y)
    errors = {name: error_of(np.array(held), truth, len(x)) for name, held in answers.items()}
    rounding = error_of(np.abs(y - x.T).sum(1), truth, len(x))
    checks = {"at most the error of a noisy histogram": errors["consistent"] <= errors["histogram"]}
    rows = [{"answer": name, "RMSE / n": error} for name, error in errors.items()]
    return Outcome(errors["consistent"], errors["shells"], checks, rows, [f"rounding to leaves: {rounding:.2g}"])


def histogram_answers(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return answers from noisy leaf counts alone: one record moves one leaf, so the noise is nine times less."""
    leaves = np.bincount((x[:, 0] * LEAVES).astype(int).clip(0, LEAVES - 1), minlength=LEAVES)
    mechanism: Mechanism = calibrate(Sensitivity(1.0, 1.0, LEAVES, "add_remove"), 1.0)
    found = []
    for _ in range(RELEASES):
        noisy = mechanism.randomise(leaves.astype(np.int64), NoiseSource()).astype(np.float64)
        slopes, intercepts = l1_coefficients(noisy[None], np.zeros(1), np.full(1, 1 / LEAVES))
        place = np.floor(y[:, 0] * LEAVES + 0.5).astype(int)
        found.append(slopes[0, place] * y[:, 0] + intercepts[0, place])
    return found


# Tried on held-out training rows, like the rates and lots of the probe.
SIMILARITIES = (
    {"similarity": "dot"},
    {"similarity": "l2sq"},
    *({"similarity": "kernel", "bandwidth": s, "n_features": 1024} for s in (0.7, 1.0, 1.5, 2.0)),
)


def classifier(epsilon: float, seed: int, **settings: object) -> PrivateSimilarityClassifier:
    """Return an unfitted classifier; labels 0 and 1 are public."""
    return PrivateSimilarityClassifier([0, 1], epsilon=epsilon, delta=DELTA, clip=True, feature_seed=seed, **settings)


@functools.cache
def best_similarity(epsilon: float) -> int:
    """Return the place of the setting that is best on held-out training rows."""
    x, y, *_ = rows()
    scores = [
        classifier(epsilon, 100, **s).fit(x[:-HELD_OUT], y[:-HELD_OUT]).score(x[-HELD_OUT:], y[-HELD_OUT:])
        for s in SIMILARITIES
    ]
    return int(np.argmax(scores))


def declare(epsilon: float) -> None:
    """Enter the claim of classification at one epsilon."""

    @private.claim(
        name=f"classes-{epsilon:g}",
        claim=f"Average similarity classifies about as well as DP-SGD, in one pass: epsilon {epsilon:g}",
        scale=f"67,349 rows of 384 public MiniLM coordinates, epsilon {epsilon:g}, delta 1e-5, add_remove; settings of "
        "both chosen on 5,000 held-out rows",
        data="SST-2 train (phrases), judged on dev",
        metric="accuracy (%)",
        baseline=f"Opacus DP-SGD logistic probe, {EPOCHS} epochs",
        rule=at_least(-3.0, of="ours - baseline", partly=-5.0, over="mean"),
        checks=("within 4 points of itself without noise",),
        seeds=(0, 1, 2),
    )
    def run(seed: int) -> Outcome:
        x, y, xt, yt = rows()
        settings = SIMILARITIES[best_similarity(epsilon)]
        start = time.perf_counter()
        model = classifier(epsilon, seed, **settings).fit(x, y)
        seconds = time.perf_counter() - start
        ours = 100 * model.score(xt, yt)
        # So little noise that it is nothing beside the sums.
        plain = 100 * classifier(1e6, seed, **settings).fit(x, y).score(xt, yt)
        rate, lot, clip = best_probe(epsilon)
        probe = trained_probe(epsilon, seed, tuning=False, rate=rate, lot=lot, clip=clip)
        several = [100 * classifier(epsilon, seed, **settings).fit(x, y).score(xt, yt) for _ in range(3)]
        notes = [
            f"{settings}; without noise {plain:.2f}; three more releases: sd {statistics.stdev(several):.2f}",
            f"DP-SGD: rate {rate}, lots of {lot}, epsilon {probe['epsilon']:.3f}",
            f"{seconds:.2f} s to fit, DP-SGD {probe['seconds']:.1f} s when it was trained; ratios: see the benchmark",
        ]
        checks = {"within 4 points of itself without noise": ours >= plain - 4}
        return Outcome(ours, probe["accuracy"], checks, notes=notes)


for _epsilon in (0.5, 1.0, 3.0):
    declare(_epsilon)


if __name__ == "__main__":
    raise SystemExit(private.main())
