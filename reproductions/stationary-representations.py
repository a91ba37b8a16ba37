"""Reproduce stationary representations (arXiv 2405.02581) on a laptop: upgrades without embedding the gallery again.

Four versions of a small net know the first 4, 6, 8 and 10 classes of Fashion-MNIST.  C[i, j] is the share of test
images, embedded by version i, whose class mean among 5,000 other images, embedded by version j, is closest; all ten
classes are asked for and held, whatever a version was trained on.  AC and AA are means over its lower triangle.

Fine-tuning on two new classes at a time with 20 images a class forgets more than most upgrades win, so AC stays near 0
there; ``regime`` looks for the first of three easier settings where it does not, on validation images.

``collapse`` is not reached because cross-entropy on raw features is nearly 0 long before: after 10 epochs the loss is
0.002 and features grow in length (17, then 22) while the variance within classes stays at 0.28 of that between them.
SGD with a weight decay of 5e-4 or 5e-3 for 60 epochs ends at 0.21 and class means as far from the corners.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import _compatible_nets as versions
import _compatible_peers as peers
import _mixer_nets as nets
import torch
from _compatible_arms import (
    BCT,
    DISTILLED,
    HOC,
    NET,
    SEEDS,
    SIMPLEX,
    TRAINABLE,
    aa,
    ac,
    chosen,
    figures,
    of_seed,
    rows,
    tested,
)
from _compatible_nets import CLASSES, SCRATCH, SEQUENCE, Upgrades
from _harness import Outcome, Reproduction, at_least, at_most
from torch import Tensor
from torch.nn import functional as F

from quernel import data
from quernel.nn import SimplexHead
from quernel.search import average_accuracy, average_compatibility, features_of
from quernel.train import CompatibleTrainer, HOCLoss

stationary = Reproduction("stationary-representations", paper="2405.02581")

# From hard to easy: more memory and epochs; more of both; a first version that knows six classes well, as the
# pre-trained start of the paper knows many.
REGIMES = {
    "200 images kept a class, 4 epochs": Upgrades(sequential=True, epochs=4, memory=200),
    "500 images kept a class, first version 8 epochs, then 4": Upgrades(
        sequential=True, epochs=4, memory=500, first_epochs=8
    ),
    "200 images kept a class, first version 6 classes and 8 epochs, then 4": Upgrades(
        sequential=True, epochs=4, memory=200, first_epochs=8, classes=(6, 8, 10)
    ),
}
DATA = "Fashion-MNIST: 30,000 images to train, class means of 5,000 others, 10,000 test images"


FROM_SCRATCH: dict[str, Any] = {
    "scale": f"versions with {CLASSES} classes, each from scratch, 2 epochs; {NET}", "data": DATA, "seeds": SEEDS,
}  # fmt: skip
IN_SEQUENCE: dict[str, Any] = {
    "scale": f"versions with {CLASSES} classes, fine-tuned on 2 new ones, 20 images kept a class, 2 epochs; {NET}",
    "data": DATA, "seeds": SEEDS,
}  # fmt: skip


@stationary.claim(
    name="scratch-simplex",
    claim="Versions trained from scratch share a space if their classifier is the same fixed simplex",
    metric="average accuracy AA",
    baseline=TRAINABLE,
    rule=at_least(0.20, of="ours - baseline", over="mean"),
    **FROM_SCRATCH,
)
def scratch_simplex(seed: int) -> Outcome:
    table = rows(SCRATCH, seed, (SIMPLEX, TRAINABLE))
    return Outcome(aa(SIMPLEX, SCRATCH, seed), aa(TRAINABLE, SCRATCH, seed), rows=table)


@stationary.claim(
    name="scratch-hoc",
    claim="The higher-order constraint towards the version before improves on cross-entropy alone",
    metric="average accuracy AA",
    baseline=SIMPLEX,
    rule=at_least(0.04, of="ours - baseline", over="mean"),
    **FROM_SCRATCH,
)
def scratch_hoc(seed: int) -> Outcome:
    table = rows(SCRATCH, seed, (HOC, SIMPLEX))
    return Outcome(aa(HOC, SCRATCH, seed), aa(SIMPLEX, SCRATCH, seed), rows=table)


@stationary.claim(
    name="scratch-compatible",
    claim="An upgrade searches the old gallery better than the old version did",
    metric="average compatibility AC",
    baseline=TRAINABLE,
    rule=at_least(0.5),
    checks=("AC of the trainable head is 0",),
    **FROM_SCRATCH,
)
def scratch_compatible(seed: int) -> Outcome:
    ours, other = (ac(arm, SCRATCH, seed) for arm in (HOC, TRAINABLE))
    return Outcome(ours, other, {"AC of the trainable head is 0": other == 0}, rows(SCRATCH, seed, (HOC, TRAINABLE)))


@stationary.claim(
    name="sequence-simplex",
    claim="Fine-tuned class by class, versions under the fixed simplex are more compatible than under a trained head",
    metric="average accuracy AA",
    baseline=TRAINABLE,
    rule=at_least(0.01, of="ours - baseline", over="mean"),
    **IN_SEQUENCE,
)
def sequence_simplex(seed: int) -> Outcome:
    table = rows(SEQUENCE, seed, (SIMPLEX, TRAINABLE, DISTILLED))
    return Outcome(aa(SIMPLEX, SEQUENCE, seed), aa(TRAINABLE, SEQUENCE, seed), rows=table)


@stationary.claim(
    name="sequence-hoc",
    claim="Fine-tuned class by class, the higher-order constraint loses nothing against cross-entropy alone",
    metric="average accuracy AA",
    baseline=SIMPLEX,
    rule=at_least(0.0, of="ours - baseline", over="mean"),
    **IN_SEQUENCE,
)
def sequence_hoc(seed: int) -> Outcome:
    table = rows(SEQUENCE, seed, (HOC, SIMPLEX, DISTILLED))
    return Outcome(aa(HOC, SEQUENCE, seed), aa(SIMPLEX, SEQUENCE, seed), rows=table)


@functools.cache
def easiest_needed() -> str:
    """Return the first regime whose AC on validation images is 0.5 with the first seed, else the last."""
    for name, upgrades in REGIMES.items():
        lower = of_seed(HOC, upgrades, SEEDS[0])["validation"]
        if average_compatibility(versions.square(lower)) >= 0.5:
            return name
    return list(REGIMES)[-1]


@stationary.claim(
    name="regime",
    claim="With more memory and a longer start, fine-tuned versions search old galleries better than old ones did",
    scale=f"two new classes a version; the first of three regimes with AC 0.5 on validation images; {NET}",
    data=DATA,
    metric="average compatibility AC",
    baseline=TRAINABLE,
    rule=at_least(0.5),
    seeds=SEEDS,
)
def regime(seed: int) -> Outcome:
    name = easiest_needed()
    upgrades = REGIMES[name]
    table = rows(upgrades, seed, (HOC, SIMPLEX, TRAINABLE))
    return Outcome(ac(HOC, upgrades, seed), ac(TRAINABLE, upgrades, seed), rows=table, notes=[f"regime: {name}"])


# The model from elsewhere is better: twice as wide and trained three times as long.
WIDE_EPOCHS = 6
# Every class gets the prototype of another one.
MOVED = [(c + 3) % 10 for c in range(10)]


@functools.cache
def replaced(seed: int) -> dict[str, Any]:
    """Return the fine-tuned versions with the third one replaced by a wide net, under our class map and another."""
    recipe = {"version": 1, "net": NET, "arm": "replacement", "seed": seed, "moved": MOVED, "epochs": WIDE_EPOCHS}
    rate = chosen(HOC, SEQUENCE)[0]
    recipe |= {"rate": rate, "batch": versions.BATCH}

    def measure() -> dict[str, Any]:
        before = versions.simplex_versions(seed, dataclasses.replace(SEQUENCE, classes=CLASSES[:2]), HOCLoss(), rate)
        wide = versions.wide_model(seed, CLASSES[2], WIDE_EPOCHS, rate)
        moved = versions.wide_model(seed, CLASSES[2], WIDE_EPOCHS, rate, MOVED[: CLASSES[2]])
        return {
            name: {
                "all": versions.matrix([*before, model]),
                "known": versions.matrix([*before, model], known=CLASSES[1]),
            }
            for name, model in (("ours", wide), ("another map", moved))
        }

    return nets.kept("stationary-representations", recipe, measure)


@stationary.claim(
    name="replacement",
    claim="A better model from elsewhere, trained with the same simplex, searches the old gallery as the old one did",
    scale=f"third version: twice the width, trained alone on 8 classes, {WIDE_EPOCHS} epochs; {NET}",
    data=DATA,
    metric="new queries in the gallery of the second version, top-1",
    baseline="second version in its own gallery",
    rule=at_least(-0.02, of="ours - baseline"),
    checks=("with another class map at most 0.2",),
    seeds=SEEDS,
)
def replacement(seed: int) -> Outcome:
    found = replaced(seed)
    ours, other = found["ours"]["all"], found["another map"]["all"]
    table = [
        figures(f"{name}, {part}", found[name][part]) for name in ("ours", "another map") for part in ("all", "known")
    ]
    known = found["ours"]["known"]
    notes = [f"only the {CLASSES[1]} classes of the old gallery's model: {known[2][1]:.3f} against {known[1][1]:.3f}"]
    checks = {"with another class map at most 0.2": other[2][1] <= 0.2}
    return Outcome(ours[2][1], ours[1][1], checks, table, notes)


@stationary.claim(
    name="peers",
    claim="Without embedding the gallery again, retrieval comes close to embedding it again",
    metric="average accuracy AA",
    baseline="embedded again, the better of trainable head and simplex",
    rule=at_least(-0.05, of="ours - baseline"),
    **FROM_SCRATCH,
)
def compared(seed: int) -> Outcome:
    again = {arm: versions.re_embedded(tested(arm, SCRATCH, seed)) for arm in (TRAINABLE, SIMPLEX)}
    table = rows(SCRATCH, seed, (HOC, SIMPLEX, TRAINABLE, DISTILLED, BCT))
    table += [
        figures("trainable head + Procrustes", of_seed(TRAINABLE, SCRATCH, seed)["procrustes"]),
        *(figures(f"{arm}, gallery embedded again", lower) for arm, lower in again.items()),
    ]
    best = max(average_accuracy(versions.square(lower)) for lower in again.values())
    return Outcome(aa(HOC, SCRATCH, seed), best, rows=table)


DIGITS, DIGIT_IMAGES, DIGIT_EPOCHS = 10, 5000, 30


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    held = data.load("mnist", split="train")
    x = torch.from_numpy(held.x[:DIGIT_IMAGES]).float().div(255)[:, None]
    return (x - 0.1307) / 0.3081, torch.from_numpy(held.y[:DIGIT_IMAGES]).long()


@functools.cache
def collapsed(arm: str, seed: int) -> dict[str, float]:
    """Return train accuracy, how far cosines of class means are from -1/9, and the least cosine to the classifier."""
    recipe = {"version": 1, "arm": arm, "seed": seed, "epochs": DIGIT_EPOCHS, "images": DIGIT_IMAGES}

    def measure() -> dict[str, float]:
        x, y = digits()
        rate = versions.adam(versions.RATES[0])
        if arm == SIMPLEX:
            backbone, head = versions.started(seed, 0, lambda: SimplexHead(DIGITS, versions.WIDTH))
            model = CompatibleTrainer(
                backbone, head, epochs=DIGIT_EPOCHS, batch_size=versions.BATCH, seed=1000 * seed, optimizer=rate
            ).fit((x, y)).model  # fmt: skip
            w = head.prototypes(torch.arange(DIGITS))
        else:
            model = versions.started(seed, 0, lambda: versions.TrainableHead(DIGITS, versions.WIDTH))
            loss = peers.plain(model, None)
            versions.fit(
                model, loss, (x, y), memory=None, epochs=DIGIT_EPOCHS, seed=1000 * seed, rate=versions.RATES[0]
            )
            w = F.normalize(model[1].classifier.weight.detach(), dim=1)
        with torch.no_grad():
            right = sum(
                int((model(a)[0].argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
            )
        z = torch.from_numpy(features_of(model, x))
        means = F.normalize(torch.stack([z[y == c].mean(0) for c in range(DIGITS)]), dim=1)
        cosines = (means @ means.T)[~torch.eye(DIGITS, dtype=torch.bool)]
        return {
            "accuracy": right / len(y),
            "worst": float((cosines + 1 / (DIGITS - 1)).abs().max()),
            "to prototypes": float((means * w).sum(1).min()),
        }

    return nets.kept("stationary-representations-collapse", recipe, measure)


@stationary.claim(
    name="collapse",
    claim="At the end of training class means stand where the simplex puts them",
    scale=f"two 3x3 convolutions, 10 prototypes, 9 features, {DIGIT_IMAGES:,} images, {DIGIT_EPOCHS} epochs",
    data="MNIST",
    metric="largest |cosine + 1/9| of two class means",
    baseline=TRAINABLE,
    rule=at_most(0.1),
    checks=("train accuracy above 99.5 %", "cosine to the prototype above 0.95 for every class"),
    seeds=SEEDS,
)
def collapse(seed: int) -> Outcome:
    ours, other = collapsed(SIMPLEX, seed), collapsed(TRAINABLE, seed)
    checks = {
        "train accuracy above 99.5 %": ours["accuracy"] > 0.995,
        "cosine to the prototype above 0.95 for every class": ours["to prototypes"] > 0.95,
    }
    return Outcome(ours["worst"], other["worst"], checks, [{"arm": SIMPLEX, **ours}, {"arm": TRAINABLE, **other}])


if __name__ == "__main__":
    raise SystemExit(stationary.main())
