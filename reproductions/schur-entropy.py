"""Reproduce Schur complement entropy (arXiv 2412.18645) on a laptop: texts that follow prompts, images of classes.

The paper's text-to-image models are replaced by generators whose variety is known: real sentences of an article that
follow a prompt, one of them, two or eight; and k different images a class name.

What does not hold: with ten times as many prompts the added part moves by a quarter and the explained part does not
quite double, because MiniLM does not add the vectors of two sentences; what the second adds depends on the first. And a
fixed ridge is not the same for all encoders: CLIP's vectors of class names are so alike that 1e-3 leaves much of them
unexplained. The ridge of least leave-one-out error removes most of that difference, not all.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from _harness import Outcome, Reproduction, at_least, at_most
from _schur_pairs import COCO, FASHION, FOLLOWING, Vectors, erased_by_leace, image_vectors, topics, turned_images
from _sentence_vectors import encoded
from sklearn.linear_model import LogisticRegression

from quernel import data
from quernel.kernels import ConditionalResidual, SchurEntropy, SchurReport, vendi_score
from quernel.kernels.statistics import Interval, paired_bootstrap

schur = Reproduction("schur-entropy", paper="2412.18645")

PROMPTS, DRAWS, RESAMPLES = 50, 16, 50
GENERATORS = {"A, one answer": 1, "B, one of 2": 2, "C, one of 8": FOLLOWING}


def report(t: np.ndarray, x: np.ndarray, seed: int = 0, resamples: int = 0) -> SchurReport:
    """Return the scores of pairs at the default ridge."""
    metric = SchurEntropy(keep_pairs=resamples > 0, random_state=seed).update(t, x)
    return metric.compute(resamples=resamples)


def least_gap(intervals: list[Interval]) -> float:
    """Return the least distance from the end of an interval to the beginning of the next; negative if they overlap."""
    return min(after.low - before.high for before, after in itertools.pairwise(intervals))


@schur.claim(
    name="generators",
    claim="Diversity that a generator adds to its prompts is measured, where similarity to the prompt does not see it",
    scale=f"{PROMPTS} prompts, {DRAWS} answers each from one, two or eight sentences; MiniLM vectors, eta 1e-3",
    data="WikiText-2: first clauses and the eight sentences that follow them",
    metric="least gap between 95 % intervals of neighbouring generators, of the entropy (nats)",
    baseline="the same gap of the mean cosine of prompt and answer, rising or falling",
    rule=at_least(0.0, of="ours"),
    checks=("mean cosine changes by less than 5 % from B to C", "the cosine does not order the generators"),
    seeds=(0, 1, 2),
)
def generators(seed: int) -> Outcome:
    chosen = topics(seed, PROMPTS)
    t = encoded([prompt for prompt, _, _ in chosen])
    answers = encoded([sentence for _, _, following in chosen for sentence in following]).reshape(
        PROMPTS, FOLLOWING, -1
    )
    draw = np.random.default_rng(seed)
    number = np.repeat(np.arange(PROMPTS), DRAWS)
    rows, entropies, cosines = [], [], []
    for name, kinds in GENERATORS.items():
        x = answers[number, draw.integers(0, kinds, len(number))]
        found = report(t[number], x, seed, RESAMPLES)
        cosine = paired_bootstrap((t[number] * x).sum(1), seed=seed)
        entropies.append(found.ci)
        cosines.append(cosine)
        rows.append(
            {"generator": name, "SCE": found.sce_image, "from": found.ci.low, "to": found.ci.high}
            | {"score": found.score, "tau": found.tau, "SCE of prompts": found.sce_text, "Vendi": found.vendi}
            | {"cosine": cosine.estimate, "dof": found.dof}
        )
    # A similarity that falls from A to C would order them as well as one that rises.
    gap = max(least_gap(cosines), least_gap(cosines[::-1]))
    change = abs(cosines[2].estimate / cosines[1].estimate - 1)
    checks = {
        "mean cosine changes by less than 5 % from B to C": change < 0.05,
        "the cosine does not order the generators": gap < 0,
    }
    notes = [f"mean cosine from B to C: {100 * change:.1f} %"]
    return Outcome(least_gap(entropies), gap, checks, rows, notes)


@schur.claim(
    name="prompts",
    claim="More different prompts raise the explained part, not the part that the generator adds",
    scale="5 and 50 prompts, 800 answers: the rest of the prompt's sentence and one of eight fixed sentences; MiniLM",
    data="WikiText-2",
    metric="explained entropy with 50 prompts over that with 5",
    baseline="the same of the entropy that was added",
    rule=at_least(2.0, of="ours"),
    checks=("the added part moves by less than 15 %",),
    seeds=(0, 1, 2),
)
def prompts(seed: int) -> Outcome:
    chosen = topics(seed, PROMPTS + 1)
    fixed, chosen = chosen[-1][2], chosen[:-1]
    t = encoded([prompt for prompt, _, _ in chosen])
    answers = encoded([f"{rest} {more}" for _, rest, _ in chosen for more in fixed]).reshape(PROMPTS, FOLLOWING, -1)
    rows = []
    for count in (5, PROMPTS):
        number, kind = np.divmod(np.arange(PROMPTS * DRAWS), FOLLOWING)
        number %= count
        found = report(t[number], answers[number, kind])
        rows.append(
            {"prompts": count, "SCE of prompts": found.sce_text, "SCE": found.sce_image, "tau": found.tau}
            | {"Vendi": found.vendi, "dof": found.dof}
        )
    text, image = (rows[1][name] / rows[0][name] for name in ("SCE of prompts", "SCE"))
    return Outcome(text, image, {"the added part moves by less than 15 %": abs(image - 1) < 0.15}, rows)


KEPT = (1, 4, 16, 64)


@schur.claim(
    name="images",
    claim="Among images of class names, the score grows with different images a class; plain diversity mixes both",
    scale="10 classes, 64 images each of which k = 1, 4, 16, 64 differ; ResNet-20 features; one-hot prompts",
    data="Fashion-MNIST, MiniLM vectors of its class names",
    metric="least growth of the entropy from one k to the next (nats)",
    baseline="growth of log Vendi from 2 to 10 classes at k = 64, over that of the entropy",
    rule=at_least(0.01, of="ours"),
    checks=("grows with k for MiniLM prompts too", "classes move log Vendi more than the entropy"),
    seeds=(0, 1, 2),
)
def images(seed: int) -> Outcome:
    held = data.load("fashion-mnist", split="train")
    draw = np.random.default_rng(seed)
    pixels = np.concatenate([held.x[draw.choice(np.flatnonzero(held.y == c), 64, replace=False)] for c in range(10)])
    vectors = image_vectors(pixels).reshape(10, 64, -1)
    names = encoded([f"a photo of a {name}" for name in FASHION])
    rows: list[dict[str, float]] = []
    for kept, classes in [*((k, 10) for k in KEPT), (64, 2)]:
        x = vectors[:classes, np.arange(64) % kept].reshape(classes * 64, -1)
        number = np.repeat(np.arange(classes), 64)
        hot, text = report(np.eye(classes)[number], x), report(names[number], x)
        rows.append(
            {"classes": classes, "k": kept, "SCE one-hot": hot.sce_image, "SCE MiniLM": text.sce_image}
            | {"SCE of prompts": hot.sce_text, "log Vendi": hot.entropy_total, "tau": hot.tau}
        )
    growth = {name: float(np.diff([row[name] for row in rows[:4]]).min()) for name in ("SCE one-hot", "SCE MiniLM")}
    more = {name: rows[3][name] - rows[4][name] for name in ("log Vendi", "SCE one-hot")}
    checks = {
        "grows with k for MiniLM prompts too": growth["SCE MiniLM"] > 0,
        "classes move log Vendi more than the entropy": more["log Vendi"] > more["SCE one-hot"],
    }
    ratio = more["log Vendi"] / more["SCE one-hot"] if more["SCE one-hot"] > 0 else math.inf
    return Outcome(growth["SCE one-hot"], ratio, checks, rows)


PLACES = (
    "on a wooden table", "in the rain at night", "next to a mountain lake", "in a crowded market", "seen from above",
    "under a red umbrella", "in an old black and white photograph", "on the moon",
)  # fmt: skip

RIDGES = ("loo", 1e-3)


@schur.claim(
    name="encoders",
    claim="Prompts and answers may be embedded by different encoders",
    scale="80 class names of COCO, eight answers each of which k = 1, 2, 4, 8 differ; answers in MiniLM, eta by LOO",
    data="CLIP ViT-B/32 text vectors of the class names; MiniLM vectors of 'a <name> <place>'",
    metric="largest difference of the entropy between CLIP and MiniLM prompts at k > 1 (%)",
    baseline="the same at the fixed ridge 1e-3",
    rule=at_most(10.0, of="ours"),
    checks=("grows with k for both encoders of the prompts",),
    seeds=(0, 1, 2),
)
def encoders(seed: int) -> Outcome:
    spaces = {
        "CLIP": data.load("clip-class-names", split="coco").x,
        "MiniLM": encoded([f"a {name}" for name in COCO]),
        "one-hot": np.eye(len(COCO)),
    }
    # Which places the first k are, a seed decides.
    places = np.random.default_rng(seed).permutation(PLACES)
    answers = encoded([f"a {name} {place}" for name in COCO for place in places]).reshape(len(COCO), len(PLACES), -1)
    number, draw = np.divmod(np.arange(len(COCO) * len(PLACES)), len(PLACES))
    rows: list[dict[str, float]] = []
    for k in (1, 2, 4, 8):
        row: dict[str, float] = {"k": k}
        for name, t in spaces.items():
            for ridge in RIDGES:
                found = SchurEntropy(eta=ridge).update(t[number], answers[number, draw % k]).compute()
                row[f"{name}, {ridge}"] = found.sce_image
                if ridge == "loo":
                    row[f"its ridge, {name}"] = found.eta
        rows.append(row)
    loo, fixed = (
        max(100 * abs(row[f"CLIP, {ridge}"] / row[f"MiniLM, {ridge}"] - 1) for row in rows[1:]) for ridge in RIDGES
    )
    grows = all(min(np.diff([row[f"{name}, loo"] for row in rows])) > 0 for name in ("CLIP", "MiniLM"))
    return Outcome(loo, fixed, {"grows with k for both encoders of the prompts": grows}, rows)


FIT, JUDGE = 4000, 2000


def probe(x: Vectors, y: np.ndarray, held: Vectors, held_y: np.ndarray) -> float:
    """Return the accuracy (%) of a linear probe on held-out vectors; columns are scaled first."""
    mean, std = x.mean(0), x.std(0) + 1e-9
    model = LogisticRegression(C=1.0, max_iter=300).fit((x - mean) / std, y)
    return 100 * float(model.score((held - mean) / std, held_y))


@schur.claim(
    name="defocus",
    claim="What a text says is taken out of embeddings and other attributes stay",
    scale=f"{FIT} pairs to fit, {JUDGE} to judge; ResNet-20 features of images turned by quarters; eta 0",
    data="Fashion-MNIST, MiniLM vectors of its class names; LEACE by concept-erasure",
    metric="accuracy of a linear probe for the class (%), chance is 10",
    baseline="after LEACE",
    rule=at_most(15.0, of="ours"),
    checks=("the probe for the rotation loses less than 3 points",),
    seeds=(0, 1, 2),
)
def defocus(seed: int) -> Outcome:
    x, y, turn = turned_images("train", FIT, seed)
    held, held_y, held_turn = turned_images("test", JUDGE, seed)
    names = encoded([f"a photo of a {name}" for name in FASHION])
    arms: dict[str, tuple[Vectors, Vectors]] = {"as they are": (x, held)}
    for name, eta in (("residual, eta 0", 0.0), ("residual, eta 1e-3", 1e-3)):
        model = ConditionalResidual(eta=eta).fit(names[y], x)
        arms[name] = model.transform(names[y], x), model.transform(names[held_y], held)
    first, second = erased_by_leace(x, y, held)
    arms["LEACE"] = first, second
    rows = [
        {"vectors": name, "class": probe(a, y, b, held_y), "rotation": probe(a, turn, b, held_turn)}
        | {"Vendi": vendi_score(b)}
        for name, (a, b) in arms.items()
    ]
    by = {row["vectors"]: row for row in rows}
    lost = by["as they are"]["rotation"] - by["residual, eta 0"]["rotation"]
    checks = {"the probe for the rotation loses less than 3 points": lost < 3.0}
    leace = by["as they are"]["rotation"] - by["LEACE"]["rotation"]
    notes = [
        f"the rotation's probe loses {lost:.2f} points, {leace:.2f} after LEACE",
        "the residual needs the text of what it is applied to, LEACE does not",
    ]
    return Outcome(by["residual, eta 0"]["class"], by["LEACE"]["class"], checks, rows, notes)


if __name__ == "__main__":
    raise SystemExit(schur.main())
