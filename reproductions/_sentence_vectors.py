"""MiniLM vectors of many real sentences, encoded once in parts that are kept in the cache.

``corpus``: the different phrases of SST-2 train and sentences of STS-B train, over 70,000. ``queries``: 1,000 sentences
of SST-2 dev and STS-B test that are not among them. Imports nothing beside it: benchmarks load this file too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quernel import data
from quernel.models import MiniLM
from quernel.models._cached import folder_of

Vectors = NDArray[np.float32]
DIM = 384
# Sentences of a part: seconds of encoding, so that an interrupted run goes on where it was.
PART = 1024
QUERIES = 1000


@functools.cache
def _model() -> MiniLM:
    return MiniLM.load_pretrained()


def encoded(sentences: Sequence[str]) -> Vectors:
    """Return unit vectors of sentences, (n, 384), from the cache or now."""
    parts = [np.zeros((0, DIM), np.float32)]
    for start in range(0, len(sentences), PART):
        part = list(sentences[start : start + PART])
        file = folder_of("reproduction-sentence-vectors", {"model": "all-MiniLM-L6-v2", "sentences": part})
        file = file.with_suffix(".npy")
        if not file.exists():
            with torch.inference_mode():
                vectors = _model().encode(part, batch_size=64).numpy()
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(".tmp.npy")
            np.save(scratch, vectors)
            scratch.replace(file)
        parts.append(np.load(file))
    return np.concatenate(parts)


@functools.cache
def _corpus_sentences() -> tuple[str, ...]:
    pairs = data.load("stsb", split="train")
    return tuple(dict.fromkeys((*data.load("sst2", split="train").text, *pairs.first, *pairs.second)))


@functools.cache
def corpus() -> Vectors:
    """Return the vectors that are searched."""
    return encoded(_corpus_sentences())


@functools.cache
def queries() -> Vectors:
    """Return the vectors of sentences that are asked for, half from each set."""
    known = set(_corpus_sentences())
    pairs = data.load("stsb", split="test")
    sources = (data.load("sst2", split="dev").text, (*pairs.first, *pairs.second))
    held = [[s for s in dict.fromkeys(source) if s not in known] for source in sources]
    return encoded([s for source in held for s in source[: QUERIES // 2]])


@functools.cache
def stsb(split: str) -> tuple[Vectors, NDArray[np.int64], NDArray[np.float32]]:
    """Return vectors of the different sentences of an STS-B split, the rows of each pair (n, 2), and human scores."""
    pairs = data.load("stsb", split=split)
    number = {s: i for i, s in enumerate(dict.fromkeys((*pairs.first, *pairs.second)))}
    rows = np.array([[number[a], number[b]] for a, b in zip(pairs.first, pairs.second, strict=True)])
    return encoded(tuple(number)), rows, pairs.score


def neighbour_pairs(vectors: Vectors, count: int, seed: int, near: int = 10) -> NDArray[np.int64]:
    """Return rows (count, 2): random vectors, each with one of its ``near`` nearest by whole vectors."""
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(vectors))[:count]
    held = torch.from_numpy(vectors)
    found = []
    for part in np.array_split(chosen, max(1, count // 256)):
        scores = held[part] @ held.T
        scores[torch.arange(len(part)), part] = -2.0
        found.append(scores.topk(near).indices.numpy())
    picked = np.concatenate(found)[np.arange(count), draw.integers(0, near, count)]
    return np.stack([chosen, picked], 1)


def principal(vectors: Vectors, dim: int, *, centred: bool) -> tuple[Vectors, Vectors]:
    """Return (mean, axes) of a PCA to ``dim`` coordinates, (1, D) and (D, dim); the mean is zero unless centred."""
    mean = vectors.mean(0, keepdims=True) if centred else np.zeros((1, vectors.shape[1]), np.float32)
    rows = (vectors - mean).astype(np.float64)
    axes = np.linalg.eigh(rows.T @ rows)[1][:, ::-1][:, :dim]
    return mean, axes.astype(np.float32)


def unit(rows: Vectors) -> Vectors:
    """Return rows divided by their lengths."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
