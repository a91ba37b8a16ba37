"""Compiles the kernels of ``FlinngIndex`` ahead of the first item."""

from __future__ import annotations

import numpy as np

from quernel.search.flinng import FlinngIndex


def _warmup() -> None:
    """Compile the kernels of the usual kinds of items (see ``quernel warmup``)."""
    x = np.eye(4, dtype=np.float32)
    for index in (FlinngIndex(4, keep_vectors=True), FlinngIndex(4, "l2", width=1.0, keep_vectors=True)):
        index.add(x).add(x).search(x, k=1, rerank=2)
    FlinngIndex(metric="jaccard", keep_vectors=True).add([[1, 2], [3]]).search([[1, 2]], k=1, rerank=2)
