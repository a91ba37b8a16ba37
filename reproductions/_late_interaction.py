"""Late interaction over MiniLM: token states of a collection, kept once; its last layers and a linear head; NDCG.

A text is its tokens' hidden states, special tokens included, projected from 384 to 128 numbers and normalised. With
``depth`` 0 the trunk is frozen; with depth 2 its last two layers are trained as well, from the states before them.
What is trained is trained on pairs of a training query and one of its relevant documents with the other documents of
the batch as negatives; a document that is relevant to two queries of a batch is not put into it. Half the queries
train, the other half judges. Learning rates are chosen for every arm alike: on a third of the training queries, held
back once with a seed of its own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
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
# Rates of the head that are tried for a depth, and the rate of the layers in terms of it.
RATES = {0: (3e-4, 1e-3, 3e-3), 2: (3e-4, 1e-3)}
LAYERS_SHARE = 0.1
TUNING_SEED, TUNING_DOCUMENTS = 99, 3000
TEMPERATURE = 0.05
# Texts encoded, projected or pooled together.
GROUP = 64

Pool = Callable[[dict[str, Any], str], dict[str, Any]]
Texts = list[Tensor]


@dataclass(frozen=True)
class Collection:
    """Token states (n_i, 384) in float16 of documents and queries, and the relevant documents of each query.

    The states are those before the last ``depth`` layers.
    """

    documents: Texts
    queries: Texts
    relevant: tuple[np.ndarray, ...]
    depth: int = 0


@functools.cache
def collection(name: str, depth: int = 0) -> Collection:
    """Return a collection; its states are computed once (a minute or two) and kept in the cache folder."""
    held = data.load(name)
    file = (
        cache_folder()
        / "reproductions"
        / f"minilm-tokens-{name}-{MAX_TOKENS}{f'-before-{depth}' * bool(depth)}.safetensors"
    )
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        safetensors.torch.save_file(encoded(held, depth), scratch)
        os.replace(scratch, file)
    stored = safetensors.torch.load_file(file)
    parts = {part: list(stored[part].split(stored[f"{part}_sizes"].tolist())) for part in ("documents", "queries")}
    return Collection(parts["documents"], parts["queries"], held.relevant, depth)


@torch.no_grad()
def encoded(held: data.Retrieval, depth: int) -> dict[str, Tensor]:
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
            hidden = model.encoder(**batch, output_hidden_states=True).hidden_states[-1 - depth]
            for i, one, mask in zip(chosen, hidden, batch["attention_mask"], strict=True):
                states[i] = one[mask.bool()].half()
        found[part] = torch.cat(states)
        found[f"{part}_sizes"] = torch.tensor([len(one) for one in states])
    return found


class Encoder(nn.Module):
    """Run the last layers of MiniLM, project the token states and normalise them, called as a multi-vector model is."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        layers = MiniLM.load_pretrained().encoder.encoder.layer[-depth:] if depth else []
        # In eval mode, as they come: no dropout.
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers).eval()
        self.head = nn.Linear(IN, OUT, bias=False)

    def forward(self, features: dict[str, Any], task: str) -> dict[str, Any]:
        """Return features with the projected states."""
        x = features["token_embeddings"]
        with torch.autocast("cpu", torch.bfloat16, enabled=len(self.layers) > 0):
            for layer in self.layers:
                x = layer(x, features["attention_mask"][:, None, None, :])
        return features | {"token_embeddings": F.normalize(self.head(x.float()), dim=-1)}


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
    held: Collection, queries: np.ndarray, seed: int, rate: float, steps: int, pool: Pool | None, start: Encoder | None
) -> Encoder:
    """Train an encoder from the start given, or from an orthogonal head, with a linear decay of the rates."""
    model = Encoder(held.depth)
    if start is None:
        nn.init.orthogonal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    else:
        model.load_state_dict(start.state_dict())
    loss = CrispLoss(model, pool, temperature=TEMPERATURE)
    groups = [{"params": model.head.parameters(), "most": rate}]
    if held.depth:
        groups.append({"params": model.layers.parameters(), "most": rate * LAYERS_SHARE})
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    draw = np.random.default_rng(seed)
    for step in range(steps):
        asked, documents = batch_of(held, queries, draw)
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * (1 - step / steps)
        value = loss([padded([held.queries[i] for i in asked]), padded([held.documents[i] for i in documents])])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model


@torch.no_grad()
def vectors(head: Encoder, texts: Texts, task: str, pool: Pool | None) -> list[np.ndarray]:
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


def judged(held: Collection, head: Encoder, queries: np.ndarray, pool: Pool | None) -> float:
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
        held.depth,
    )


ARMS: dict[str, Pool | None] = {
    "unpooled": None,
    "C8x32": clusters(8, 32),
    "C4x8": clusters(4, 8),
    "T4x8": tails(4, 8),
}


@functools.cache
def tuned(name: str, depth: int = 0) -> dict[str, float]:
    """Return the learning rate of the base and of each arm, by NDCG@10 with its own pooling on held-back queries."""
    held = collection(name, depth)
    queries = split(held, TUNING_SEED)[0]
    learned = queries[len(queries) // 3 :]
    judging = fewer(held, queries[: len(queries) // 3], TUNING_DOCUMENTS)
    every = np.arange(len(judging.queries))

    def best(part: str, steps: int, pool: Pool | None, start: Encoder | None) -> tuple[float, Encoder]:
        recipe = {"of": name, "depth": depth, "part": part, "seed": TUNING_SEED, "steps": steps}
        found = {
            rate: kept(
                recipe | {"rate": rate},
                depth,
                lambda rate=rate: train(held, learned, TUNING_SEED, rate, steps, pool, start),
            )
            for rate in RATES[depth]
        }
        rate = max(RATES[depth], key=lambda rate: judged(judging, found[rate], every, pool))
        return rate, found[rate]

    rates = {}
    rates["base"], start = best("base", BASE_STEPS, None, None)
    for arm, pool in ARMS.items():
        rates[arm], _ = best(arm, STEPS, pool, start)
    return rates


@functools.cache
def heads(name: str, seed: int, depth: int = 0) -> dict[str, Encoder]:
    """Return the encoder of every arm: all start from one trained without pooling and take as many steps more."""
    held, rates = collection(name, depth), tuned(name, depth)
    queries = split(held, seed)[0]
    recipe = {"of": name, "depth": depth, "seed": seed, "steps": [BASE_STEPS, STEPS], "base": rates["base"]}
    base = kept(
        recipe | {"part": "base"}, depth, lambda: train(held, queries, seed, rates["base"], BASE_STEPS, None, None)
    )
    return {
        arm: kept(
            recipe | {"part": arm, "rate": rates[arm]},
            depth,
            lambda arm=arm, pool=pool: train(held, queries, seed + 1000, rates[arm], STEPS, pool, base),
        )
        for arm, pool in ARMS.items()
    }


def kept(recipe: dict[str, Any], depth: int, made: Callable[[], Encoder]) -> Encoder:
    """Return the encoder of a recipe, from the cache folder or trained now."""
    version = {"version": 1, "batch": BATCH, "tokens": MAX_TOKENS, "share": LAYERS_SHARE, "temperature": TEMPERATURE}
    key = hashlib.sha256(json.dumps(version | recipe, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "reproductions" / f"crisp-{recipe['of']}-{depth}-{recipe['part']}-{key}.safetensors"
    if file.is_file():
        model = Encoder(depth)
        model.load_state_dict(safetensors.torch.load_file(file))
        return model
    model = made()
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    safetensors.torch.save_file(model.state_dict(), scratch)
    os.replace(scratch, file)
    return model


@torch.no_grad()
def spread_within(held: Collection, head: Encoder, k: int) -> float:
    """Return the mean share of a document's variance of token vectors that is left within k clusters."""
    shares = []
    long = sorted((one for one in held.documents if len(one) > k), key=len)
    for first in range(0, len(long), GROUP):
        features = head(padded(long[first : first + GROUP]), "document")
        x, mask = features["token_embeddings"], features["attention_mask"]
        within = inertia(x, kmeans(x, k, mask=mask, start="farthest"))
        shares.append(within / inertia(x, kmeans(x, 1, mask=mask)))
    return float(torch.cat(shares).mean())
