"""The arms of the comparison of upgrades, what is chosen for each on validation images, and what is kept of them.

Every arm gets the same two learning rates; peers with a second loss get three weights of it as well.  Both are chosen
by AA on 5,000 validation images with the first seed: the weight at the first rate, then the rate.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import _compatible_nets as versions
import _compatible_peers as peers
import _mixer_nets as nets
from _compatible_nets import RATES, Matrix, Upgrades
from torch import nn

from quernel.search import average_accuracy, average_compatibility, self_accuracy
from quernel.train import HOCLoss

SEEDS = (0, 1, 2)
TRAINABLE, SIMPLEX, HOC, BCT, DISTILLED = "trainable head", "simplex + CE", "simplex + HOC", "BCT", "distillation"
WEIGHTS = {BCT: (0.5, 1.0, 2.0), DISTILLED: (1.0, 5.0, 25.0)}
NET = "two 3x3 convolutions of stride 2 with 16 and 32 channels, 64 prototypes, 63 features"


def trained(arm: str, upgrades: Upgrades, seed: int, rate: float, weight: float | None) -> list[nn.Sequential]:
    """Return the versions of an arm."""
    if arm in (SIMPLEX, HOC):
        return versions.simplex_versions(seed, upgrades, HOCLoss() if arm == HOC else None, rate)
    loss: versions.Loss = peers.plain
    if arm == DISTILLED:
        loss = peers.distilled(float(weight or 0))
    elif arm == BCT:
        loss = peers.bct(float(weight or 0), upgrades.classes, lambda t: versions.task(upgrades, t)[0])
    return versions.trainable_versions(seed, upgrades, loss, rate)


@functools.cache
def measured(arm: str, upgrades: Upgrades, seed: int, rate: float, weight: float | None = None) -> dict[str, Any]:
    """Return the matrices of an arm on test and validation images, from the cache or now."""
    recipe = {
        "version": 1, "net": NET, "batch": versions.BATCH, "arm": arm, "rate": rate, "weight": weight, "seed": seed,
        "upgrades": dataclasses.asdict(upgrades),
    }  # fmt: skip

    def measure() -> dict[str, Any]:
        made = trained(arm, upgrades, seed, rate, weight)
        found: dict[str, Any] = {part: versions.matrix(made, part) for part in ("test", "validation")}
        if arm == TRAINABLE:
            found["procrustes"] = peers.procrustes_matrix(made)
        return found

    return nets.kept("stationary-representations", recipe, measure)


@functools.cache
def chosen(arm: str, upgrades: Upgrades) -> tuple[float, float | None]:
    """Return the rate and the weight of an arm."""

    def score(rate: float, weight: float | None) -> float:
        return average_accuracy(versions.square(measured(arm, upgrades, SEEDS[0], rate, weight)["validation"]))

    weight = max(WEIGHTS[arm], key=lambda w: score(RATES[0], w)) if arm in WEIGHTS else None
    return max(RATES, key=lambda rate: score(rate, weight)), weight


def of_seed(arm: str, upgrades: Upgrades, seed: int) -> dict[str, Any]:
    """Return the matrices of an arm with what was chosen for it."""
    return measured(arm, upgrades, seed, *chosen(arm, upgrades))


def tested(arm: str, upgrades: Upgrades, seed: int) -> Matrix:
    """Return the lower triangle of an arm on test images."""
    lower: Matrix = of_seed(arm, upgrades, seed)["test"]
    return lower


def aa(arm: str, upgrades: Upgrades, seed: int) -> float:
    return average_accuracy(versions.square(tested(arm, upgrades, seed)))


def ac(arm: str, upgrades: Upgrades, seed: int) -> float:
    return average_compatibility(versions.square(tested(arm, upgrades, seed)))


def figures(name: str, lower: Matrix, **more: Any) -> dict[str, Any]:
    """Return a row of the table: averages, and the matrix row by row."""
    c = versions.square(lower)
    shown = " | ".join(" ".join(f"{v:.2f}" for v in row) for row in lower)
    averages = {"AA": average_accuracy(c), "AC": average_compatibility(c), "self": self_accuracy(c)}
    return {"arm": name, **averages, "C, row by row": shown, **more}


def rows(upgrades: Upgrades, seed: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a row for each arm, with its rate and weight."""
    settings = {name: chosen(name, upgrades) for name in names}
    return [figures(n, tested(n, upgrades, seed), rate=settings[n][0], weight=settings[n][1] or "") for n in names]
