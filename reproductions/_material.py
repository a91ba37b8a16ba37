"""What several scripts measure on: MiniLM with STS-B sentences, small language models with windows of text.

Everything is drawn with a seed; calibration and judging never share a sentence or a text.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel.models import MiniLM, TinyLM

CALIBRATION_TOKENS = 4096
WINDOW, WINDOWS, BATCH = 256, 32, 8


@functools.cache
def minilm() -> MiniLM:
    return MiniLM.load_pretrained()


@functools.cache
def sentences(split: str) -> tuple[str, ...]:
    """Return the different sentences of an STS-B split, in order."""
    pairs = data.load("stsb", split=split)
    return tuple(dict.fromkeys((*pairs.first, *pairs.second)))


def chosen(split: str, seed: int) -> list[str]:
    """Return the sentences of a split in an order of this seed."""
    held = sentences(split)
    return [held[i] for i in np.random.default_rng(seed).permutation(len(held))]


def calibration(seed: int) -> list[dict[str, Tensor]]:
    """Return batches of 32 training sentences with 4,096 tokens in all."""
    batches, tokens, rest = [], 0, chosen("train", seed)
    while tokens < CALIBRATION_TOKENS:
        batch, rest = minilm().tokenize(rest[:32]), rest[32:]
        batches.append(batch)
        tokens += int(batch["attention_mask"].sum())
    return batches


def similarities(vectors: Tensor) -> np.ndarray:
    """Return the cosines of all pairs; vectors: (n, D), unit length."""
    rows, columns = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[rows, columns].numpy()


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Return exp of the mean next-token loss; windows: (n, T + 1)."""
    losses = [F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten()) for w in windows.split(BATCH)]
    return float(torch.stack(losses).mean().exp())


def windows_of(ids: Tensor, seed: int) -> Tensor:
    """Cut 32 windows of 256 tokens and the one after at random places; ids: (T,)."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - WINDOW - 1, WINDOWS)
    return torch.stack([ids[start : start + WINDOW + 1] for start in starts.tolist()])


@functools.cache
@torch.no_grad()
def told(seed: int) -> Tensor:
    """Let stories260K tell 32 stories of 256 tokens at temperature 1; (32, 257) with the first token."""
    model = TinyLM.stories260k()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.ones(WINDOWS, 1, dtype=torch.int64)  # 1 begins a text
    for _ in range(WINDOW):
        following = torch.multinomial(model(ids)[:, -1].softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, following), dim=1)
    return ids
