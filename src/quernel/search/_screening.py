"""Exact search in two steps: all scores in bfloat16 with a bound on their error, then exactly those that may be best.

With unit roundoff u = 2^-8, rounding the factors changes <q, x> by at most (2 u + u^2) |q| |x|, rounding the product by
u of it, so a score is off by less than e = 3.1 u max|x| sum |q|.  The k-th best rough score less e bounds the k-th best
true one from below, so every text of the answer has a rough score of at least the k-th best less 2 e.  Those are scored
exactly.  Worth it where the processor multiplies bfloat16 several times faster than float32.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quernel._array_folder import readable
from quernel._intrinsics import portable, target_features
from quernel._threads import parallel_ranges, workspace
from quernel.search._index import Scores
from quernel.search._multi_vector_kernels import add_rough_maxima
from quernel.search._ragged import Ragged, RaggedVectors
from quernel.search._top_k import top_k

# The last part is for sums in float32 of some hundred terms.
_ERROR = 3.1 * 2.0**-8
# Vectors of a block at least and at most, and products between them: both stay in the second-level cache.
_ROWS, _PRODUCTS = (2**10, 2**12), 2**17
# Of fewer query vectors, or fewer stored ones, the conversion costs more than it saves.
LEAST_COLUMNS, LEAST_ROWS = 6, 2**14


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return not portable() and "avx512bf16" in target_features()


def worth_it(store: RaggedVectors, columns: int) -> bool:
    """Whether so many query vectors should be screened."""
    return fast_bfloat16() and columns >= LEAST_COLUMNS and len(store.rows) >= LEAST_ROWS


def rough_scores(store: RaggedVectors, queries: Ragged) -> Scores:
    """Return the scores of all texts (n, texts), in bfloat16 up to the sums."""
    asked, offsets = torch.from_numpy(queries.rows).bfloat16().T, store.offsets
    columns, out = asked.shape[1], np.empty((len(queries), len(store)), np.float32)
    cuts = store.blocks(min(_ROWS[1], max(_ROWS[0], _PRODUCTS // columns)))

    def work(start: int, stop: int) -> None:
        for a, b in zip(cuts[start:stop], cuts[start + 1 : stop + 1], strict=True):
            first, last = int(offsets[a]), int(offsets[b])
            n = last - first
            x = workspace("rough vectors", n * store.dim, torch.bfloat16).view(n, -1)
            products = workspace("rough products", n * columns, torch.bfloat16).view(n, columns)
            maxima = workspace("rough maxima", columns, torch.int16).numpy()
            bits = workspace("rough bits", columns, torch.int32).numpy()
            # int8 first gets its scales, or the best of a text would not be the best.
            x.copy_(readable(store.values(first, last) if store.dtype == "int8" else store.rows[first:last]))
            torch.mm(x, asked, out=products)
            halves = products.view(torch.int16).numpy()
            add_rough_maxima(halves, offsets, offsets[a], queries.offsets, maxima, bits, out, a, b)

    parallel_ranges(work, len(cuts) - 1)
    return out


def possible(
    store: RaggedVectors, queries: Ragged, rough: Scores, k: int, alive: NDArray[np.bool_]
) -> list[NDArray[np.int64]]:
    """Return, for each query, the texts that may be among its k best."""
    lengths = np.linalg.norm(queries.rows.astype(np.float64), axis=1)
    errors = _ERROR * store.longest() * np.add.reduceat(lengths, queries.offsets[:-1])
    found: list[NDArray[np.int64]] = []
    worst: Any = top_k(rough, k, alive)[0][:, -1]
    for i, error in enumerate(errors):
        # NaN: fewer than k texts are there.
        least = -np.inf if np.isnan(worst[i]) else worst[i] - 2 * error
        found.append(np.flatnonzero((rough[i] >= least) & alive))
    return found
