"""Which indexes a ``TextIndex`` can be made of, and what each is given: one vector a passage, or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quernel.nn.functional import cluster_tokens
from quernel.search import FlatIndex, FlinngIndex, FunnelIndex, Index, MultiVectorIndex

# Vectors of a passage and of a query where there are several: those of CRISP's C8x32.
PASSAGE_VECTORS, QUERY_VECTORS = 32, 8
# The prefix that a funnel scans is a share of the vector: the encoder's were not trained to be cut shorter.
PREFIX_SHARE, SHORTLIST = 4, 400


class Encoder(Protocol):
    """What makes vectors of texts, as ``quernel.models.SentenceEncoder`` does."""

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Return one vector a text, (n, d)."""
        ...

    def encode_tokens(self, sentences: Sequence[str]) -> list[Tensor]:
        """Return the vectors of each text's tokens, (n_i, d); needed for ``"multi-vector"`` only."""
        ...


@dataclass(frozen=True)
class Kind:
    """How an index is made, filled and asked; its ``vectors`` are what it was filled with, by slot."""

    make: Callable[[int], Index]
    # (encoder, texts, whether they are queries) -> what ``add`` and ``search`` take.
    encode: Callable[[Any, Sequence[str], bool], Any]
    # Options of a search for k answers.
    options: Callable[[int], dict[str, Any]] = lambda k: {}


def _vectors(encoder: Encoder, texts: Sequence[str], query: bool) -> np.ndarray:
    with torch.inference_mode():
        return encoder.encode(list(texts)).float().cpu().numpy()


def _several(encoder: Encoder, texts: Sequence[str], query: bool) -> list[np.ndarray]:
    k = QUERY_VECTORS if query else PASSAGE_VECTORS
    with torch.inference_mode():
        tokens = encoder.encode_tokens(list(texts))
        return [cluster_tokens(one[None].float(), k).vectors[0].cpu().numpy() for one in tokens]


def _funnel(dim: int) -> FunnelIndex:
    return FunnelIndex(dim, (max(1, dim // PREFIX_SHARE),), (SHORTLIST,), metric="cosine")


KINDS: dict[str, Kind] = {
    "flat": Kind(lambda dim: FlatIndex(dim), _vectors),
    "flinng": Kind(
        lambda dim: FlinngIndex(dim, keep_vectors=True),
        _vectors,
        lambda k: {"rerank": max(200, k)},
    ),
    "funnel": Kind(_funnel, _vectors),
    "multi-vector": Kind(lambda dim: MultiVectorIndex(dim, "float16"), _several),
}
