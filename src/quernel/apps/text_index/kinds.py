"""Which indexes a ``TextIndex`` can be made of, and what each is given: one vector a passage, or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quernel.search import FlatIndex, FlinngIndex, Index


class Encoder(Protocol):
    """What makes vectors of texts, as ``quernel.models.SentenceEncoder`` does."""

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Return one vector a text, (n, d)."""
        ...


@dataclass(frozen=True)
class Kind:
    """How an index is made, filled, asked, and taken apart again."""

    make: Callable[[int], Index]
    encode: Callable[[Any, Sequence[str]], Any]
    # The items of the slots in their order, deleted ones included, to spread them over other indexes.
    stored: Callable[[Any], Any]
    # Options of a search for k answers.
    options: Callable[[int], dict[str, Any]] = lambda k: {}


def _vectors(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    with torch.inference_mode():
        return encoder.encode(list(texts)).float().cpu().numpy()


KINDS: dict[str, Kind] = {
    "flat": Kind(lambda dim: FlatIndex(dim), _vectors, lambda index: index.vectors),
    "flinng": Kind(
        lambda dim: FlinngIndex(dim, keep_vectors=True),
        _vectors,
        lambda index: index.vectors,
        lambda k: {"rerank": max(200, k)},
    ),
}
