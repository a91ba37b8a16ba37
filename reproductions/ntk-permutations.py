"""Reproduce exact learning of permutations by wide networks (arXiv 2502.16763) on a laptop.

The network in closed form on every input, networks really trained, ensembles of the planned size, how plans grow with
the number of bits, and the numbers of models that the authors logged. A linear model would solve the task from the same
k pairs and in one line; it stands as the baseline of the first claim, so that nobody takes the task for hard. What is
shown is that networks which are not linear solve it, and at what price.

The paper's planner sums a bound over all inputs with the margin of the worst one. That is loose: the inputs which need
most models, those with two ones, are only k (k - 1) / 2, and the exact sum grows almost linearly.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from scipy.stats import binomtest

from quernel.apps import PermutationLearner
from quernel.apps.permutations import draw_networks, network_outputs, train_networks
from quernel.kernels import EnsemblePlan, NTKernel, ntk_dynamics, solve_ridge
from quernel.kernels.ntk import permutation_moments
from quernel.kernels.ntk.plan import thresholds

permutations = Reproduction("ntk-permutations", paper="2502.16763")

LONGEST, PERMUTATIONS = 14, 20
LARGE, LARGE_INPUTS = 200, 100_000
WIDTH = 2048
DELTA, TRIALS = 0.01, 100_000
# What a probability of exactly 0.01 exceeds in so many trials once in a million runs: mean and 4.75 deviations.
ALLOWED = 0.0115
# Trials of ensembles that are too small, and trials in memory at a time.
FEW, SOME = 2000, 2000
ROUNDINGS = ("sign", "midpoint")
# Models that the authors added until 90 % of 1,000 random inputs with two ones came out right.
LOGGED = {10: 69, 20: 117, 30: 175}


def all_inputs(k: int) -> np.ndarray:
    """Return the 2^k - 1 inputs that are not 0."""
    return (np.arange(1, 2**k)[:, None] >> np.arange(k)) & 1


def moved(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    result = np.zeros_like(bits)
    result[:, places] = bits
    return result


def wrong(learner: PermutationLearner, bits: np.ndarray, places: np.ndarray) -> int:
    """Return how many inputs come out wrong in some bit."""
    return int((learner.predict(bits) != moved(bits, places)).any(1).sum())


@permutations.claim(
    name="exhaustive",
    claim="An infinite ensemble trained on the k basis vectors applies any permutation to all nonzero inputs",
    scale="all inputs of 2 to 14 bits, 20 permutations each, both roundings; 100,000 random inputs of 200 bits",
    data="generated",
    metric="share of inputs right in every bit",
    baseline="least squares on the same pairs",
    rule=at_least(1.0),
    checks=("200 bits: every random input is right",),
    seeds=(0, 1, 2),
)
def exhaustive(seed: int) -> Outcome:
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    total = linear = 0
    mistakes = dict.fromkeys(ROUNDINGS, 0)
    for k in range(2, LONGEST + 1):
        bits, found = all_inputs(k), dict.fromkeys(ROUNDINGS, 0)
        for _ in range(PERMUTATIONS):
            places = draw.permutation(k)
            for rounding in ROUNDINGS:
                found[rounding] += wrong(PermutationLearner(rounding).fit(places), bits, places)
            weights = solve_ridge(np.eye(k), moved(np.eye(k), places), 0.0)
            linear += int(((bits @ weights > 0.5) != moved(bits, places)).any(1).sum())
        total += PERMUTATIONS * len(bits)
        rows.append({"bits": k, "inputs": len(bits)} | {f"wrong by {r}": found[r] for r in ROUNDINGS})
        mistakes = {r: mistakes[r] + found[r] for r in ROUNDINGS}
    places = draw.permutation(LARGE)
    # Half the inputs have about as many zeros as ones, the others any number of ones.
    share = np.where(draw.random((LARGE_INPUTS, 1)) < 0.5, 0.5, draw.random((LARGE_INPUTS, 1)))
    bits = (draw.random((LARGE_INPUTS, LARGE)) < share).astype(np.int64)
    bits = bits[bits.any(1)]
    large = [wrong(PermutationLearner(rounding).fit(places), bits, places) for rounding in ROUNDINGS]
    checks = {"200 bits: every random input is right": not any(large)}
    worst = max(mistakes.values())
    return Outcome(1 - worst / total, 1 - linear / total, checks, rows, [f"200 bits: {large} of {len(bits):,} wrong"])


@permutations.claim(
    name="training",
    claim="Networks trained by gradient descent are what the tangent kernel says",
    scale="100 networks of width 2,048, 5 bits, full-batch gradient descent, rate 1, 300 steps",
    data="generated",
    metric="share of single networks and inputs with two ones that are right, midpoint rounding",
    baseline="rounding by sign",
    rule=at_least(0.93),
    checks=(
        "loss below 1e-10",
        "mean of ones 0.56 within 0.02",
        "mean of zeros -0.0146 within 0.005",
        "variance 0.0132 within 15 %",
        "rounding by sign between 0.10 and 0.25",
    ),
    seeds=(0, 1, 2),
)
def training(seed: int) -> Outcome:
    k, eye = 5, torch.eye(5, dtype=torch.float64)
    trained, losses = train_networks(draw_networks(100, WIDTH, k, k, seed=seed), eye, eye, n_steps=300)
    pairs = np.zeros((math.comb(k, 2), k))
    for row, places in zip(pairs, itertools.combinations(range(k), 2), strict=True):
        row[list(places)] = 1
    x, on = torch.from_numpy(pairs / math.sqrt(2)), pairs == 1
    outputs = np.stack([network_outputs(*w, x).numpy() for w in zip(trained.hidden, trained.output, strict=True)])
    moments = permutation_moments(k, 2)
    cuts = {r: float(thresholds(moments.mean_on, moments.mean_off, r)) for r in ROUNDINGS}
    right = {r: float(((outputs > cut) == on).all(2).mean()) for r, cut in cuts.items()}
    mean_on, mean_off = float(outputs[:, on].mean()), float(outputs[:, ~on].mean())
    variance = float(outputs.var(0, ddof=1).mean())
    checks = {
        "loss below 1e-10": float(losses.max()) < 1e-10,
        "mean of ones 0.56 within 0.02": abs(mean_on - 0.56) <= 0.02,
        "mean of zeros -0.0146 within 0.005": abs(mean_off + 0.0146) <= 0.005,
        "variance 0.0132 within 15 %": abs(variance / float(moments.variance) - 1) <= 0.15,
        "rounding by sign between 0.10 and 0.25": 0.10 <= right["sign"] <= 0.25,
    }
    note = f"means {mean_on:.4f} and {mean_off:.4f}, variance {variance:.5f}, largest loss {float(losses.max()):.1e}"
    return Outcome(right["midpoint"], right["sign"], checks, notes=[note])


@permutations.claim(
    name="trained-ensemble",
    claim="A planned ensemble of trained networks applies a permutation to all nonzero inputs",
    scale="8 bits, width 2,048, planned for an error on any of 255 inputs with probability 0.01, midpoint rounding",
    data="generated",
    metric="share of inputs right in every bit",
    baseline="one of the networks",
    rule=at_least(1.0),
    seeds=(0, 1, 2),
)
def trained_ensemble(seed: int) -> Outcome:
    bits, places = all_inputs(8), np.random.default_rng(seed).permutation(8)
    shares, counts = [], []
    for n_models in ("plan", 1):
        learner = PermutationLearner(mode="ensemble", width=WIDTH, n_models=n_models, delta=DELTA, random_state=seed)
        shares.append(1 - wrong(learner.fit(places), bits, places) / len(bits))
        counts.append(learner.n_models_)
    return Outcome(*shares, notes=[f"{counts[0]} networks"])


def failures(k: int, n_models: int, rounding: str, seed: int, trials: int) -> int:
    """Return in how many simulated ensembles some input comes out wrong.

    The average of n networks is drawn from its joint distribution over all inputs; outputs are independent.
    """
    bits = all_inputs(k)
    ones = bits.sum(1)
    made = ntk_dynamics(NTKernel(), np.eye(k), np.eye(k), bits / np.sqrt(ones)[:, None])
    values, vectors = np.linalg.eigh(made.cov / n_models)
    root = vectors * np.sqrt(np.maximum(values, 0))
    moments = permutation_moments(k, ones)
    cuts = thresholds(moments.mean_on, moments.mean_off, rounding)
    judged = (ones > 1) if rounding == "sign" else (ones > 1) & (ones < k)
    draw, total = np.random.default_rng(seed), 0
    for start in range(0, trials, SOME):
        failed = np.zeros(min(SOME, trials - start), bool)
        for j in range(k):
            outputs = made.mean[:, j, None] + root @ draw.standard_normal((len(bits), len(failed)))
            failed |= (((outputs > cuts[:, None]) != bits[:, j, None]) & judged[:, None]).any(0)
        total += int(failed.sum())
    return total


@permutations.claim(
    name="planned-ensembles",
    claim="Ensembles of the planned size err on any input with at most the probability planned for",
    scale="4, 6 and 8 bits, both roundings, planned for 0.01, 100,000 simulated ensembles each",
    data="generated",
    metric="largest share of ensembles with an error on any input",
    baseline="a quarter of the planned models",
    rule=at_most(ALLOWED),
    checks=("a quarter of the models is above 0.01 everywhere, by a binomial test (p < 1e-6)",),
    seeds=(0, 1, 2),
)
def planned_ensembles(seed: int) -> Outcome:
    rows: list[dict[str, Any]] = []
    quarters: list[float] = []
    for k, rounding in itertools.product((4, 6, 8), ROUNDINGS):
        n = EnsemblePlan(k, DELTA, rounding=rounding).n_models
        row: dict[str, Any] = {"bits": k, "rounding": rounding, "models": n}
        row["by the union bound"] = EnsemblePlan(k, DELTA, rounding=rounding, bound="union").n_models
        row["plan"] = failures(k, n, rounding, seed, TRIALS) / TRIALS
        failed = failures(k, max(1, n // 4), rounding, seed, FEW)
        row["quarter"] = failed / FEW
        quarters.append(float(binomtest(failed, FEW, DELTA, alternative="greater").pvalue))
        rows.append(row)
    name = "a quarter of the models is above 0.01 everywhere, by a binomial test (p < 1e-6)"
    checks = {name: max(quarters) < 1e-6}
    return Outcome(max(r["plan"] for r in rows), min(r["quarter"] for r in rows), checks, rows)


SIZES = (8, 16, 32, 64, 128, 256)


def exponent(*options: Any, sizes: tuple[int, ...] = SIZES) -> float:
    """Return the power of k that the number of planned models grows with."""
    counts = [EnsemblePlan(k, DELTA, *options).n_models for k in sizes]
    return float(np.polyfit(np.log(sizes), np.log(counts), 1)[0])


def counts_of(scope: str) -> list[dict[str, Any]]:
    plans = {"sign": ("sign",), "midpoint": ("midpoint",), "sign, union bound": ("sign", "union")}
    return [
        {"bits": k} | {name: EnsemblePlan(k, DELTA, scope, *options).n_models for name, options in plans.items()}
        for k in SIZES
    ]


@permutations.claim(
    name="growth-of-one",
    claim="For one input the ensemble grows as k log k",
    scale="plans for 8 to 256 bits, error 0.01 on the worst input, rounding by sign",
    data="none",
    metric="exponent of the number of models in k",
    baseline="midpoint rounding",
    rule=at_most(1.2),
    checks=("0.89 within 0.05", "midpoint: 0.43 within 0.05", "at most 1.2 from 256 to 1,024 bits too"),
)
def growth_of_one(seed: int) -> Outcome:
    sign, midpoint = exponent("input", "sign"), exponent("input", "midpoint")
    far = exponent("input", "sign", sizes=(256, 512, 1024))
    checks = {
        "0.89 within 0.05": abs(sign - 0.89) <= 0.05,
        "midpoint: 0.43 within 0.05": abs(midpoint - 0.43) <= 0.05,
        "at most 1.2 from 256 to 1,024 bits too": far <= 1.2,
    }
    return Outcome(sign, midpoint, checks, counts_of("input"), [f"256 to 1,024 bits: {far:.2f}"])


@permutations.claim(
    name="growth-of-all",
    claim="For all inputs the ensemble grows as the square of k at most",
    scale="plans for 8 to 256 bits, error 0.01 on any input, rounding by sign, exact sum of tails",
    data="none",
    metric="exponent of the number of models in k",
    baseline="the paper's union bound",
    rule=at_most(2.0),
    checks=("0.97 within 0.05", "midpoint: 1.06 within 0.05", "the union bound: 1.52 within 0.05, and at most 2"),
)
def growth_of_all(seed: int) -> Outcome:
    sign, midpoint, union = (exponent("all", *o) for o in (("sign",), ("midpoint",), ("sign", "union")))
    far = exponent("all", "sign", "union", sizes=(1024, 2048, 4096))
    checks = {
        "0.97 within 0.05": abs(sign - 0.97) <= 0.05,
        "midpoint: 1.06 within 0.05": abs(midpoint - 1.06) <= 0.05,
        "the union bound: 1.52 within 0.05, and at most 2": abs(union - 1.52) <= 0.05 and far <= 2.05,
    }
    notes = [
        f"the union bound from 1,024 to 4,096 bits: {far:.2f}; it is loose, and quadratic where the exact sum is not"
    ]
    return Outcome(sign, union, checks, counts_of("all"), notes)


@permutations.claim(
    name="logged-counts",
    claim="So many models make 90 % of random inputs with two ones come out right",
    scale="10, 20 and 30 bits: planned in the standard parametrisation, which the authors' code trains in",
    data="the authors' logs (69, 117, 175)",
    metric="largest factor between planned and logged models",
    baseline="the NTK's plan",
    rule=at_most(1.6),
)
def logged_counts(seed: int) -> Outcome:
    rows = []
    for k, logged in LOGGED.items():
        row: dict[str, Any] = {"bits": k, "logged": logged}
        for parametrization in ("standard", "ntk"):
            plan = EnsemblePlan(k, 0.1, "input", "sign", parametrization=parametrization, ones=2)
            row[parametrization] = plan.n_models
        rows.append(row)
    factors = [max(max(row[p] / row["logged"], row["logged"] / row[p]) for row in rows) for p in ("standard", "ntk")]
    return Outcome(*factors, rows=rows)


if __name__ == "__main__":
    raise SystemExit(permutations.main())
