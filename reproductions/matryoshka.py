"""Reproduce Matryoshka representations (arXiv 2205.13147) on a laptop: nested classifiers, an adapter, funnel search.

Representations are trained on Fashion-MNIST at full length; for text there is an adapter behind a frozen encoder, since
no large encoder is trained here. Where a bound is for a mean of three seeds, the claim takes it itself and is called
once. Speeds against faiss stand in ``benchmarks/search/matryoshka.py``.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import _nested_nets as nets
import _sentence_vectors as sentences
import numpy as np
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from scipy.stats import spearmanr
from torch import nn

from quernel._errors import MissingExtraError
from quernel.search import FlatIndex, FunnelIndex
from quernel.train import CascadeClassifier, MatryoshkaAdapter, fit_matryoshka_adapter

matryoshka = Reproduction("matryoshka", paper="2205.13147")

SEEDS = nets.SEEDS
SHORT = 32
FASHION = "Fashion-MNIST, 30,000 training images"
# Human scores, 0 to 5, from here on are pairs that belong together: 3 is "roughly equivalent".
TOGETHER = 3.0


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


@functools.cache
def classified() -> dict[str, dict[int, float]]:
    """Return accuracies by arm and length, means over the seeds; "ff" has a net of its own for each length."""
    found: dict[str, dict[int, float]] = {}
    for arm in ("mrl", "mrl-e"):
        runs = [nets.accuracies(nets.net(arm, seed), "test") for seed in SEEDS]
        found[arm] = {m: mean(run[m] for run in runs) for m in nets.DIMS}
    found["ff"] = {m: mean(nets.accuracies(nets.net(f"ff-{m}", seed), "test")[m] for seed in SEEDS) for m in nets.DIMS}
    return found


@matryoshka.claim(
    name="classification",
    claim="Each prefix of one representation classifies as well as a representation trained for that length alone",
    scale="2-conv net, 64 numbers with classifiers on 2, 4, ... 64, 4 epochs; means over seeds 0, 1, 2",
    data=FASHION,
    metric="accuracy at the length where ours is furthest behind (%)",
    baseline="a net for that length alone",
    rule=at_least(-2.0, of="ours - baseline"),
    checks=("from 4 numbers on, at most 0.5 points behind", "the whole is at most 1 point behind a plain net"),
)
def classification(seed: int) -> Outcome:
    found = classified()
    behind = {m: found["ff"][m] - found["mrl"][m] for m in nets.DIMS}
    worst = max(nets.DIMS, key=lambda m: behind[m])
    checks = {
        "from 4 numbers on, at most 0.5 points behind": all(behind[m] <= 0.5 for m in nets.DIMS if m >= 4),
        "the whole is at most 1 point behind a plain net": behind[nets.DIM] <= 1.0,
    }
    rows = [{"length": m, **{arm: found[arm][m] for arm in ("mrl", "mrl-e", "ff")}} for m in nets.DIMS]
    return Outcome(found["mrl"][worst], found["ff"][worst], checks, rows, [f"furthest behind at {worst} numbers"])


@functools.cache
def neighbours() -> dict[str, dict[int, float]]:
    """Return 1-NN accuracies by arm and length, means over the seeds."""
    runs: list[dict[str, dict[int, float]]] = []
    for seed in SEEDS:
        nested = [nets.features(nets.net("mrl", seed), split) for split in ("train", "test")]
        plain = [nets.features(nets.net(f"ff-{nets.DIM}", seed), split) for split in ("train", "test")]
        axes = torch.linalg.eigh(plain[0].double().T @ plain[0].double()).eigenvectors.flip(1).float()
        arms = {"mrl": nested, "truncated": plain, "svd": [z @ axes for z in plain]}
        run = {}
        for arm, (known, asked) in arms.items():
            run[arm] = {m: nets.nearest_accuracy(known[:, :m], asked[:, :m]) for m in nets.DIMS}
        runs.append(run)
    return {arm: {m: mean(run[arm][m] for run in runs) for m in nets.DIMS} for arm in runs[0]}


@matryoshka.claim(
    name="neighbours",
    claim="Nearest neighbours by a short prefix are better than by a cut or projected plain representation",
    scale="1-NN by the cosine of 4 of 64 numbers; means over seeds 0, 1, 2",
    data=FASHION,
    metric="1-NN accuracy at 4 numbers (%)",
    baseline="SVD of the plain representation",
    rule=at_least(3.0, of="ours - baseline"),
    checks=("10 points above the plain representation cut",),
)
def nearest(seed: int) -> Outcome:
    found = neighbours()
    rows = [{"length": m, **{arm: found[arm][m] for arm in found}} for m in nets.DIMS]
    checks = {"10 points above the plain representation cut": found["mrl"][4] >= found["truncated"][4] + 10}
    return Outcome(found["mrl"][4], found["svd"][4], checks, rows)


@matryoshka.claim(
    name="cascade",
    claim="Inputs need few dimensions on average when each stops at the first classifier that is sure",
    scale="thresholds from 5,000 validation images, judged on 10,000 test images",
    data=FASHION,
    metric="expected dimension",
    baseline="the whole representation",
    rule=at_most(8.0),
    checks=("accuracy within 0.3 points of the whole head", "thresholds above 1 are the whole head"),
    seeds=SEEDS,
)
def cascade(seed: int) -> Outcome:
    net = nets.net("mrl", seed)
    held, test = (nets.features(net, split) for split in ("validation", "test"))
    y = nets.images("test")[1]
    whole = net.head(test, dim=nets.DIM).argmax(1)
    classifier = CascadeClassifier(net.head).calibrate(held, nets.images("validation")[1], max_drop=0.003)
    labels, dims = classifier.predict(test, return_dims=True)
    right, full = (100 * float((guess == y).float().mean()) for guess in (labels, whole))
    above = CascadeClassifier(net.head, [1.01] * (len(nets.DIMS) - 1)).predict(test)
    checks = {
        "accuracy within 0.3 points of the whole head": right >= full - 0.3,
        "thresholds above 1 are the whole head": torch.equal(above, whole),
    }
    shares = [{"stops at": m, "share (%)": 100 * float((dims == m).float().mean())} for m in nets.DIMS]
    notes = [f"accuracy {right:.2f} %, whole head {full:.2f} %; validation promised {classifier.expected_dim_:.2f}"]
    return Outcome(float(dims.float().mean()), float(nets.DIM), checks, shares, notes)


def spearman(z: np.ndarray, split: str = "test") -> float:
    """Return the rank correlation of cosines of vectors (n, m) of an STS-B split with human scores."""
    _, rows, score = sentences.stsb(split)
    u = sentences.unit(z)
    return float(spearmanr((u[rows[:, 0]] * u[rows[:, 1]]).sum(1), score).statistic)


def together() -> np.ndarray:
    """Return the STS-B training pairs that people find alike."""
    _, rows, score = sentences.stsb("train")
    return rows[(score >= TOGETHER) & (rows[:, 0] != rows[:, 1])]


RATES = (3e-4, 1e-3, 3e-3)
EPOCHS = 20
BATCH = 128


def chosen(fit: Any) -> Any:
    """Return the fit of the rate that is best at 32 numbers on STS-B dev."""
    E = sentences.stsb("dev")[0]
    return max((fit(rate) for rate in RATES), key=lambda adapter: spearman(adapter.transform(E, SHORT), "dev"))


def peer_adapter(rate: float, seed: int) -> MatryoshkaAdapter:
    """Train the same linear map from the same start with the loss of sentence-transformers."""
    try:
        from sentence_transformers import losses
    except ImportError as error:
        raise MissingExtraError("the peer of the adapter", "hf") from error
    E, pairs = torch.from_numpy(sentences.stsb("train")[0]), torch.from_numpy(together())
    adapter = fit_matryoshka_adapter(E, epochs=0, seed=seed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = adapter

        def get_embedding_dimension(self) -> int:
            return sentences.DIM

        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sentence_embedding": self.adapter(features["x"])}

    model = Model()
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), list(adapter.dims))
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(adapter.parameters(), lr=rate)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPOCHS * -(-len(pairs) // BATCH))
    for _ in range(EPOCHS):
        for part in pairs[torch.randperm(len(pairs), generator=generator)].split(BATCH):
            adam.zero_grad()
            loss([{"x": E[part[:, side]]} for side in (0, 1)], None).backward()
            adam.step()
            fall.step()
    return adapter.eval()


def projections(train: np.ndarray, test: np.ndarray, dim: int) -> dict[str, np.ndarray]:
    """Return both kinds of PCA of vectors, about the mean and about the origin."""
    found = {}
    for name, centred in (("PCA", True), ("SVD", False)):
        middle, axes = sentences.principal(train, dim, centred=centred)
        found[name] = (test - middle) @ axes
    return found


@matryoshka.claim(
    name="text",
    claim="A linear map behind a frozen encoder makes short prefixes rank sentences better than PCA does",
    scale="384 numbers, prefixes of 8 to 384; rates chosen on dev for both trained arms",
    data="STS-B, all-MiniLM-L6-v2",
    metric="Spearman correlation at 32 numbers",
    baseline="the better of PCA and SVD",
    rule=at_least(0.02, of="ours - baseline"),
    checks=(
        "0.04 above the plain prefix",
        "the whole within 0.01 of the encoder",
        "within 0.01 of sentence-transformers' loss",
        "a fit takes less than 3 processor minutes",
    ),
    seeds=SEEDS,
)
def text(seed: int) -> Outcome:
    E, test = sentences.stsb("train")[0], sentences.stsb("test")[0]
    seconds: list[float] = []

    def fit(rate: float) -> MatryoshkaAdapter:
        start = time.process_time()
        made = fit_matryoshka_adapter(E, together(), lr=rate, epochs=EPOCHS, batch_size=BATCH, seed=seed)
        seconds.append(time.process_time() - start)
        return made

    adapter, peer = chosen(fit), chosen(lambda rate: peer_adapter(rate, seed))
    rows = []
    for m in adapter.dims:
        arms = {"plain": test[:, :m], **projections(E, test, m)}
        arms |= {"ours": adapter.transform(test, m), "sentence-transformers": peer.transform(test, m)}
        rows.append({"length": m, **{name: spearman(z) for name, z in arms.items()}})
    short = next(row for row in rows if row["length"] == SHORT)
    checks = {
        "0.04 above the plain prefix": short["ours"] >= short["plain"] + 0.04,
        "the whole within 0.01 of the encoder": abs(rows[-1]["ours"] - rows[-1]["plain"]) <= 0.01,
        "within 0.01 of sentence-transformers' loss": short["ours"] >= short["sentence-transformers"] - 0.01,
        "a fit takes less than 3 processor minutes": max(seconds) < 180,
    }
    return Outcome(short["ours"], max(short["PCA"], short["SVD"]), checks, rows, [f"a fit: {max(seconds):.0f} s"])


def similarity_errors(z: np.ndarray, whole: np.ndarray, dims: tuple[int, ...]) -> dict[int, float]:
    """Return the mean squared error of all cosines between vectors, by length."""
    wanted = sentences.unit(whole) @ sentences.unit(whole).T
    cut = {m: sentences.unit(z[:, :m]) for m in dims}
    return {m: float(np.square(u @ u.T - wanted).mean()) for m, u in cut.items()}


@matryoshka.claim(
    name="unsupervised",
    claim="Without pairs, prefixes that are trained to keep similarities keep them better than PCA does",
    scale="384 numbers, prefixes of 8 to 384, 20 epochs over the training sentences",
    data="STS-B, all-MiniLM-L6-v2",
    metric="squared error of cosines between test sentences, summed over lengths",
    baseline="the better of PCA and SVD",
    rule=at_most(1.0, of="ours / baseline"),
    checks=("rank correlation at 32 numbers not 0.005 below PCA",),
    seeds=SEEDS,
)
def unsupervised(seed: int) -> Outcome:
    E, test = sentences.stsb("train")[0], sentences.stsb("test")[0]
    adapter = fit_matryoshka_adapter(E, seed=seed)
    arms = {"ours": adapter.transform(test), **projections(E, test, sentences.DIM)}
    errors = {name: similarity_errors(z, test, adapter.dims) for name, z in arms.items()}
    ranks = {name: spearman(z[:, :SHORT]) for name, z in arms.items()}
    rows = [{"length": m, **{name: errors[name][m] for name in arms}} for m in adapter.dims]
    totals = {name: sum(errors[name].values()) for name in arms}
    best = max(ranks["PCA"], ranks["SVD"])
    checks = {"rank correlation at 32 numbers not 0.005 below PCA": ranks["ours"] >= best - 0.005}
    notes = ["rank correlation at 32: " + ", ".join(f"{name} {value:.4f}" for name, value in ranks.items())]
    return Outcome(totals["ours"], min(totals["PCA"], totals["SVD"]), checks, rows, notes)


PAIRS = 30_000
LENGTHS, PREFIXES = (20, 50, 100, 200, 400), (8, 16, 32, 64)
TOLERANCE = 0.5


def recall(vectors: np.ndarray, asked: np.ndarray, truth: np.ndarray, width: int, kept: int) -> float:
    """Return recall@10 in percent of a funnel with one stage."""
    return shared(FunnelIndex(vectors.shape[1], (width,), (kept,)).add(vectors).search(asked, truth.shape[1])[1], truth)


def shared(ids: np.ndarray, truth: np.ndarray) -> float:
    """Return how much of the true answers is among others, in percent."""
    return 100 * mean(len(np.intersect1d(a, b)) / len(b) for a, b in zip(ids, truth, strict=True))


@matryoshka.claim(
    name="retrieval",
    claim="A shortlist by a short prefix loses next to nothing against exact search, and less than by PCA",
    scale="over 70,000 sentences, 32 of 384 numbers, 200 kept; the adapter is trained on pairs of near neighbours",
    data="SST-2 and STS-B, all-MiniLM-L6-v2; 1,000 other sentences as queries",
    metric="recall@10 against exact search (%)",
    baseline="the better of PCA and SVD",
    rule=at_least(97.0),
    checks=(
        "at least 50,000 vectors",
        "above the plain prefix and PCA with 50 kept",
        "50 kept hold more of the encoder's own ten nearest than by the plain prefix and PCA",
        "recall does not fall with the shortlist or the prefix",
    ),
    seeds=SEEDS,
)
def retrieval(seed: int) -> Outcome:
    vectors, asked = sentences.corpus(), sentences.queries()
    adapter = fit_matryoshka_adapter(
        vectors, sentences.neighbour_pairs(vectors, PAIRS, seed), epochs=5, batch_size=512, seed=seed
    )
    arms = {"ours": (adapter.transform(vectors), adapter.transform(asked)), "plain": (vectors, asked)}
    for name, centred in (("PCA", True), ("SVD", False)):
        middle, axes = sentences.principal(vectors, sentences.DIM, centred=centred)
        arms[name] = tuple(sentences.unit((x - middle) @ axes) for x in (vectors, asked))
    original = FlatIndex(sentences.DIM, "ip").add(vectors).search(asked, 10)[1]
    rows, by_arm, held = [], {}, {}
    for name, (x, q) in arms.items():
        # Each is held to exact search among its own whole vectors, and its shortlist to the encoder's.
        truth = FlatIndex(sentences.DIM, "ip").add(x).search(q, 10)[1]
        by_arm[name] = {kept: recall(x, q, truth, SHORT, kept) for kept in LENGTHS}
        shortlist = FunnelIndex(sentences.DIM, (SHORT,), (50,)).add(x).search(q, 50, dim=SHORT)[1]
        held[name] = shared(shortlist, original)
        lengths = {f"{kept} kept": value for kept, value in by_arm[name].items()}
        rows.append({"arm": name, **lengths, "encoder's ten in 50": held[name]})
        if name == "ours":
            by_prefix = [recall(x, q, truth, width, 100) for width in PREFIXES]
    climbs = (list(by_arm["ours"].values()), by_prefix)
    others = max(by_arm[name][50] for name in arms if name != "ours")
    checks = {
        "at least 50,000 vectors": len(vectors) >= 50_000,
        "above the plain prefix and PCA with 50 kept": by_arm["ours"][50] > others,
        "50 kept hold more of the encoder's own ten nearest than by the plain prefix and PCA": held["ours"]
        > max(held[name] for name in arms if name != "ours"),
        "recall does not fall with the shortlist or the prefix": all(
            later >= earlier - TOLERANCE for climb in climbs for earlier, later in itertools.pairwise(climb)
        ),
    }
    x, q = arms["ours"]
    same = shared(FunnelIndex(sentences.DIM, (SHORT,), (200,)).add(x).search(q, 10)[1], original)
    listed = ", ".join(f"{m}: {r:.2f}" for m, r in zip(PREFIXES, by_prefix, strict=True))
    notes = [
        f"recall with 100 kept by prefixes of {listed}",
        f"{same:.1f} % of the answers are among the ten nearest by the encoder's own vectors",
    ]
    return Outcome(by_arm["ours"][200], max(by_arm["PCA"][200], by_arm["SVD"][200]), checks, rows, notes)


if __name__ == "__main__":
    raise SystemExit(matryoshka.main())
