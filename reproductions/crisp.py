"""Reproduce CRISP (arXiv 2505.11471) on a laptop: is a model better pruned when it was trained through the pruning?

Cranfield and NPL stand in for SciFact and NFCorpus. The encoder is a frozen MiniLM with a linear head, so the
training can only choose a subspace; ``trained-*`` train its last two layers as well; the paper trains all of a Gemma
2B. All arms start from one head that was trained without pooling and take as many further steps at a rate tuned for
each: "unpooled" is the control. Queries that judge were never trained on; every document is searched.
"""

from __future__ import annotations

from typing import Any

import _late_interaction as late
import numpy as np
import torch
from _harness import Outcome, Reproduction, at_least, at_most

from quernel._errors import MissingExtraError

crisp = Reproduction("crisp", paper="2505.11471")

SEEDS = (0, 1, 2)
SCALE = (
    "frozen MiniLM, head 384 to 128: 200 steps without pooling, then 150 of each arm in batches of up to 24; "
    "half the queries train, half judge"
)
SCALE_TRAINED = (
    "MiniLM, its last 2 layers and a head 384 to 128: 200 steps without pooling, then 150 of each arm in batches of up "
    "to 24; half the queries train, half judge"
)
CRANFIELD = "Cranfield (1,400 documents, 225 queries) for SciFact"
NPL = "NPL (11,429 documents, 93 queries) for NFCorpus"
ABOVE_TAIL = "at least 5 points above tail 4x8, trained alike"
KEEPS = "8x32 keeps at least 97 % of the unpooled model"


JUDGED: dict[str, Any] = {
    "metric": "NDCG@10 with 4x8 vectors",
    "baseline": "k-means 4x8 of the unpooled model",
    "rule": at_least(2.0, of="ours - baseline", over="mean"),
    "checks": (ABOVE_TAIL, KEEPS),
    "seeds": SEEDS,
}


def pruned(name: str, seed: int, depth: int = 0) -> Outcome:
    held, heads = late.collection(name, depth), late.heads(name, seed, depth)
    queries = late.split(held, seed)[1]

    def score(arm: str, pool: Any) -> float:
        return late.judged(held, heads[arm], queries, pool)

    trained = {arm: score(arm, pool) for arm, pool in late.ARMS.items()}
    after = {arm: score("unpooled", late.ARMS[arm]) for arm in ("C8x32", "C4x8", "T4x8")}
    rows = [
        {"vectors": arm, "trained through it": trained[arm], "pooled afterwards": after.get(arm, trained[arm])}
        for arm in late.ARMS
    ]
    checks = {
        ABOVE_TAIL: trained["C4x8"] >= trained["T4x8"] + 5,
        KEEPS: trained["C8x32"] >= 0.97 * trained["unpooled"],
    }
    notes = [f"{len(queries)} queries judge; rates {late.tuned(name, depth)}"]
    return Outcome(trained["C4x8"], after["C4x8"], checks, rows, notes)


@crisp.claim(
    name="pruned-cranfield",
    claim="Trained through the clustering, four vectors a query and eight a document rank better than clustered later",
    scale=SCALE,
    data=CRANFIELD,
    **JUDGED,
)
def pruned_cranfield(seed: int) -> Outcome:
    return pruned("cranfield", seed)


@crisp.claim(
    name="pruned-npl",
    claim="On short documents too, training through the clustering ranks better than clustering later",
    scale=SCALE,
    data=NPL,
    **JUDGED,
)
def pruned_npl(seed: int) -> Outcome:
    return pruned("npl", seed)


@crisp.claim(
    name="trained-cranfield",
    claim="With the last two layers of the encoder trained too, training through the clustering ranks better",
    scale=SCALE_TRAINED,
    data=CRANFIELD,
    **JUDGED,
)
def trained_cranfield(seed: int) -> Outcome:
    return pruned("cranfield", seed, depth=2)


@crisp.claim(
    name="trained-npl",
    claim="With the last two layers trained, training through the clustering ranks better on short documents too",
    scale=SCALE_TRAINED,
    data=NPL,
    **JUDGED,
)
def trained_npl(seed: int) -> Outcome:
    return pruned("npl", seed, depth=2)


@crisp.claim(
    name="mechanism",
    claim="Token vectors become clusterable: less of their variance is left within clusters",
    scale=SCALE,
    data=f"{CRANFIELD}; {NPL}",
    metric="variance of a document's tokens within 8 clusters, share of all, Cranfield",
    baseline="the unpooled model",
    rule=at_most(0.9, of="ours / baseline"),
    checks=("at most 0.9 on NPL too",),
    seeds=SEEDS,
)
def mechanism(seed: int) -> Outcome:
    shares = {
        (name, arm): late.spread_within(late.collection(name), late.heads(name, seed)[arm], 8)
        for name in ("cranfield", "npl")
        for arm in ("C4x8", "unpooled")
    }
    ratio = shares["npl", "C4x8"] / shares["npl", "unpooled"]
    rows = [{"collection": name, "trained": arm, "share within": value} for (name, arm), value in shares.items()]
    checks = {"at most 0.9 on NPL too": ratio <= 0.9}
    return Outcome(shares["cranfield", "C4x8"], shares["cranfield", "unpooled"], checks, rows)


def hierarchical(x: np.ndarray, count: int) -> np.ndarray:
    """Return at most ``count`` vectors of a document, the first of them its first token, by the peer."""
    try:
        from sentence_transformers.multi_vector_encoder.modules.token_pooling import HierarchicalTokenPooling
    except ImportError as error:
        raise MissingExtraError("the peer HierarchicalTokenPooling", "hf") from error
    if len(x) <= count:
        return x
    # One token is protected; the rest goes into floor((n - 1) / factor) clusters.
    factor = (len(x) - 1) / (count - 0.5)
    pooled: np.ndarray = HierarchicalTokenPooling(factor).pool_one(torch.from_numpy(x)).numpy()
    return pooled


def against_peer(name: str, seed: int) -> Outcome:
    held, heads = late.collection(name), late.heads(name, seed)
    queries = late.split(held, seed)[1]
    asked = [held.queries[q] for q in queries]
    documents = late.vectors(heads["unpooled"], held.documents, "document", None)
    pooled = [hierarchical(x, 32) for x in documents]
    most = max(map(len, pooled))
    if most > 32:
        raise ValueError(f"the peer gives {most} vectors, not at most 32")
    whole = late.vectors(heads["unpooled"], asked, "query", None)
    peer = late.ndcg(held, late.built(pooled), whole, queries)
    ours = late.judged(held, heads["C8x32"], queries, late.ARMS["C8x32"])
    post_hoc = late.judged(held, heads["unpooled"], queries, late.clusters(None, 32))
    rows = [
        {"model": "CRISP 8x32", "vectors a query": 8, "NDCG@10": ours},
        {"model": "unpooled, Ward 32 a document", "vectors a query": "all", "NDCG@10": peer},
        {"model": "unpooled, k-means 32 a document", "vectors a query": "all", "NDCG@10": post_hoc},
    ]
    return Outcome(ours, peer, {}, rows)


@crisp.claim(
    name="peer-cranfield",
    claim="Against hierarchical pooling of documents alone, with whole queries, eight vectors a query lose little",
    scale=SCALE,
    data=CRANFIELD,
    metric="NDCG@10 with 32 vectors a document",
    baseline="HierarchicalTokenPooling of the unpooled model",
    rule=at_least(-0.5, of="ours - baseline"),
    seeds=SEEDS,
)
def peer_cranfield(seed: int) -> Outcome:
    return against_peer("cranfield", seed)


@crisp.claim(
    name="peer-npl",
    claim="On short documents too, eight vectors a query lose little against hierarchical pooling and whole queries",
    scale=SCALE,
    data=NPL,
    metric="NDCG@10 with 32 vectors a document",
    baseline="HierarchicalTokenPooling of the unpooled model",
    rule=at_least(-0.5, of="ours - baseline"),
    seeds=SEEDS,
)
def peer_npl(seed: int) -> Outcome:
    return against_peer("npl", seed)


@crisp.claim(
    name="sizes",
    claim="The index of clustered documents is several times smaller",
    scale="float32, offsets and ids counted; untrained head, whose vectors are as many as any other's",
    data=f"{CRANFIELD}; {NPL}",
    metric="bytes of the index of 8x32, MB, Cranfield",
    baseline="unpooled",
    rule=at_most(0.40, of="ours / baseline"),
    checks=("4x8 at most 0.15 of the unpooled bytes",),
)
def sizes(seed: int) -> Outcome:
    rows, found = [], {}
    for name in ("cranfield", "npl"):
        held = late.collection(name)
        torch.manual_seed(seed)
        head = late.Head(late.IN, late.OUT, bias=False)
        for arm in ("unpooled", "C8x32", "C4x8"):
            index = late.built(late.vectors(head, held.documents, "document", late.ARMS[arm]))
            found[name, arm] = index.nbytes / 1e6
            ratio = found[name, arm] / found[name, "unpooled"]
            rows.append(
                {"collection": name, "vectors": arm, "a document": index.vectors_per_text, "share of bytes": ratio}
            )
    checks = {
        "4x8 at most 0.15 of the unpooled bytes": found["cranfield", "C4x8"] <= 0.15 * found["cranfield", "unpooled"]
    }
    return Outcome(found["cranfield", "C8x32"], found["cranfield", "unpooled"], checks, rows)


if __name__ == "__main__":
    raise SystemExit(crisp.main())
