"""Late interaction over a frozen MiniLM: token states of a collection, kept once; a linear head; NDCG.

A text is its tokens' last hidden states, special tokens included, projected from 384 to 128 numbers and normalised.
Only the projection is trained, on pairs of a training query and one of its relevant documents with the other documents
of the batch as negatives; a document that is relevant to two queries of a batch is not put into it. Half the queries
train, the other half judges. Learning rates are chosen for every arm alike: on a third of the training queries, held
back once with a seed of its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.data import cache_folder
from quernel.kernels.clustering import inertia, kmeans
from quernel.models import MiniLM
from quernel.nn.functional import cluster_tokens, tail_tokens
from quernel.search import MultiVectorIndex
from quernel.train import CrispLoss

IN, OUT, MAX_TOKENS = 384, 128, 256
BATCH, BASE_STEPS, STEPS = 24, 200, 150
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED, TUNING_DOCUMENTS = 99, 3000
TEMPERATURE = 0.05
# Texts encoded, projected or pooled together.
GROUP = 64

Pool = Callable[[dict[str, Any], str], dict[str, Any]]
Texts = list[Tensor]


@dataclass(frozen=True)
class Collection:
    """Token states (n_i, 384) in float16 of documents and queries, and the relevant documents of each query."""

    documents: Texts
    queries: Texts
    relevant: tuple[np.ndarray, ...]


@functools.cache
def collection(name: str) -> Collection:
    """Return a collection; its states are computed once (a minute or two) and kept in the cache folder."""
    held = data.load(name)
    file = cache_folder() / "reproductions" / f"minilm-tokens-{name}-{MAX_TOKENS}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        safetensors.torch.save_file(encoded(held), scratch)
        os.replace(scratch, file)
    stored = safetensors.torch.load_file(file)
    parts = {part: list(stored[part].split(stored[f"{part}_sizes"].tolist())) for part in ("documents", "queries")}
    return Collection(parts["documents"], parts["queries"], held.relevant)


@torch.no_grad()
def encoded(held: data.Retrieval) -> dict[str, Tensor]:
    """Return the token states of documents and queries, one after the other, and how many each has."""
    model = MiniLM.load_pretrained()
    model.max_length = MAX_TOKENS
    found: dict[str, Tensor] = {}
    for part in ("documents", "queries"):
        texts = getattr(held, part)
        order = sorted(range(len(texts)), key=lambda i, texts=texts: len(texts[i]))
        states: Texts = [torch.empty(0)] * len(texts)
        for first in range(0, len(order), GROUP):
            chosen = order[first : first + GROUP]
            batch = model.tokenize([texts[i] for i in chosen])
            hidden = model.encoder(**batch).last_hidden_state
            for i, one, mask in zip(chosen, hidden, batch["attention_mask"], strict=True):
                states[i] = one[mask.bool()].half()
        found[part] = torch.cat(states)
        found[f"{part}_sizes"] = torch.tensor([len(one) for one in states])
    return found


class Head(nn.Linear):
    """Project token states and normalise them, called as a multi-vector model is."""

    def forward(self, features: dict[str, Any], task: str) -> dict[str, Any]:  # type: ignore[override]
        """Return features with the projected states."""
        x = super().forward(features["token_embeddings"])
        return features | {"token_embeddings": F.normalize(x, dim=-1)}


def padded(texts: Texts) -> dict[str, Tensor]:
    x = nn.utils.rnn.pad_sequence([one.float() for one in texts], batch_first=True)
    lengths = torch.tensor([len(one) for one in texts])
    return {"token_embeddings": x, "attention_mask": torch.arange(x.shape[1]) < lengths[:, None]}


def clusters(kq: int | None, kd: int | None) -> Pool:
    """Return the clustering of queries into kq and of documents into kd vectors; None leaves a side alone."""
    return functools.partial(pooled, cluster_tokens, kq, kd)


def tails(kq: int, kd: int) -> Pool:
    return functools.partial(pooled, tail_tokens, kq, kd)


def pooled(how: Any, kq: int | None, kd: int | None, features: dict[str, Any], task: str) -> dict[str, Any]:
    k = kq if task == "query" else kd
    if k is None:
        return features
    vectors, mask = how(features["token_embeddings"], k, mask=features["attention_mask"])
    return features | {"token_embeddings": vectors, "attention_mask": mask}


def split(held: Collection, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries that train and those that judge."""
    asked = np.flatnonzero([len(r) > 0 for r in held.relevant])
    order = np.random.default_rng(seed).permutation(asked)
    return order[: len(order) // 2], order[len(order) // 2 :]


def batch_of(held: Collection, queries: np.ndarray, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return queries and one relevant document of each that is relevant to no other query of the batch."""
    chosen = draw.permutation(queries)[:BATCH]
    times = np.bincount(np.concatenate([held.relevant[q] for q in chosen]), minlength=len(held.documents))
    pairs = [(int(q), own) for q in chosen if len(own := held.relevant[q][times[held.relevant[q]] == 1])]
    return [q for q, _ in pairs], [int(draw.choice(own)) for _, own in pairs]


def train(
    held: Collection, queries: np.ndarray, seed: int, rate: float, steps: int, pool: Pool | None, start: Head | None
) -> Head:
    """Train a head from the start given, or from an orthogonal one, with a linear decay of the rate."""
    head = Head(IN, OUT, bias=False)
    if start is None:
        nn.init.orthogonal_(head.weight, generator=torch.Generator().manual_seed(seed))
    else:
        head.load_state_dict(start.state_dict())
    loss = CrispLoss(head, pool, temperature=TEMPERATURE)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
    draw = np.random.default_rng(seed)
    for step in range(steps):
        asked, documents = batch_of(held, queries, draw)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        value = loss([padded([held.queries[i] for i in asked]), padded([held.documents[i] for i in documents])])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return head


@torch.no_grad()
def vectors(head: Head, texts: Texts, task: str, pool: Pool | None) -> list[np.ndarray]:
    """Return the vectors of every text."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    for first in range(0, len(order), GROUP):
        chosen = order[first : first + GROUP]
        features = head(padded([texts[i] for i in chosen]), task)
        features = features if pool is None else pool(features, task)
        for i, one, mask in zip(chosen, features["token_embeddings"], features["attention_mask"], strict=True):
            found[i] = one[mask].numpy()
    return found


def built(documents: list[np.ndarray], dtype: Any = "float32") -> MultiVectorIndex:
    return MultiVectorIndex(OUT, dtype).add(documents)


def ndcg(held: Collection, index: MultiVectorIndex, asked: list[np.ndarray], queries: np.ndarray) -> float:
    """Return the mean NDCG@10 in percent."""
    ids = index.search(asked, 10)[1]
    gains = 1 / np.log2(np.arange(2, 12))
    values = []
    for q, found in zip(queries, ids, strict=True):
        relevant = held.relevant[q]
        values.append((np.isin(found, relevant) * gains).sum() / gains[: min(10, len(relevant))].sum())
    return 100 * float(np.mean(values))


def judged(held: Collection, head: Head, queries: np.ndarray, pool: Pool | None) -> float:
    """Return the NDCG@10 of a head with a pooling on these queries over all documents."""
    asked = vectors(head, [held.queries[q] for q in queries], "query", pool)
    return ndcg(held, built(vectors(head, held.documents, "document", pool)), asked, queries)


def fewer(held: Collection, queries: np.ndarray, count: int) -> Collection:
    """Return the collection with these queries alone, and of its documents all relevant and some other ones."""
    wanted = np.unique(np.concatenate([held.relevant[q] for q in queries]))
    others = np.setdiff1d(np.arange(len(held.documents)), wanted)
    room = max(0, min(len(others), count - len(wanted)))
    kept = np.sort(np.append(wanted, others[np.arange(room) * len(others) // max(1, room)]))
    return Collection(
        [held.documents[i] for i in kept],
        [held.queries[q] for q in queries],
        tuple(np.searchsorted(kept, held.relevant[q]) for q in queries),
    )


ARMS: dict[str, Pool | None] = {
    "unpooled": None,
    "C8x32": clusters(8, 32),
    "C4x8": clusters(4, 8),
    "T4x8": tails(4, 8),
}


@functools.cache
def tuned(name: str) -> dict[str, float]:
    """Return the learning rate of the base and of each arm, by NDCG@10 with its own pooling on held-back queries."""
    held = collection(name)
    queries = split(held, TUNING_SEED)[0]
    learned = queries[len(queries) // 3 :]
    judging = fewer(held, queries[: len(queries) // 3], TUNING_DOCUMENTS)
    every = np.arange(len(judging.queries))

    def best(steps: int, pool: Pool | None, start: Head | None) -> tuple[float, Head]:
        found = {rate: train(held, learned, TUNING_SEED, rate, steps, pool, start) for rate in RATES}
        rate = max(RATES, key=lambda rate: judged(judging, found[rate], every, pool))
        return rate, found[rate]

    rates = {}
    rates["base"], start = best(BASE_STEPS, None, None)
    for arm, pool in ARMS.items():
        rates[arm], _ = best(STEPS, pool, start)
    return rates


@functools.cache
def heads(name: str, seed: int) -> dict[str, Head]:
    """Return the head of every arm: all start from one that was trained without pooling and take as many steps more."""
    held, rates = collection(name), tuned(name)
    queries = split(held, seed)[0]
    base = train(held, queries, seed, rates["base"], BASE_STEPS, None, None)
    return {arm: train(held, queries, seed + 1000, rates[arm], STEPS, pool, base) for arm, pool in ARMS.items()}


@torch.no_grad()
def spread_within(held: Collection, head: Head, k: int) -> float:
    """Return the mean share of a document's variance of token vectors that is left within k clusters."""
    shares = []
    long = sorted((one for one in held.documents if len(one) > k), key=len)
    for first in range(0, len(long), GROUP):
        features = head(padded(long[first : first + GROUP]), "document")
        x, mask = features["token_embeddings"], features["attention_mask"]
        within = inertia(x, kmeans(x, k, mask=mask, start="farthest"))
        shares.append(within / inertia(x, kmeans(x, 1, mask=mask)))
    return float(torch.cat(shares).mean())
