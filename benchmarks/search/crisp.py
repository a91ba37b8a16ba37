"""Chamfer search: pooled against unpooled texts, against sentence-transformers' maxsim, and candidates against all.

Pooled texts are the clusters of the unpooled ones. Texts are generated: 1,000 topics, 20 fields of 60 topics each, a
text draws its vectors from six topics of one field and a query from four of those of one text, all with noise; so the
ten best of a query are those few of its field that share three or four topics with it, among many that share two. The
peer gets padded arrays without a mask, its fastest layout, in float32 and in bfloat16, which rounds its scores to eight
bits. The approximate search is not timed below a recall of 0.95.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks._machine import DRAM_BYTES, VECTOR_OPS
from benchmarks._runner import Case, Unavailable

DIM, QUERY, TEXT = 128, 8, 32
# What the pooled vectors of a query and of a text stand for.
TOKENS_QUERY, TOKENS_TEXT = 16, 128
# Of each coordinate: a vector has a cosine of about 0.66 with its topic.
NOISE = 0.1
RECALL = 0.95
# float32 sums of 128 products in another order, eight of them.
SAME = 1e-4


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def collection(n: int, asked: int, text: int, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts (n, text, DIM) and queries (asked, query, DIM)."""
    draw = np.random.default_rng(0)
    topics = unit(draw.standard_normal((1000, DIM), dtype=np.float32))
    fields = draw.integers(0, len(topics), (20, 60))
    field = draw.integers(0, len(fields), n)
    own = fields[field[:, None], draw.random((n, 60)).argsort(1)[:, :6]]

    def vectors(choices: np.ndarray, count: int) -> np.ndarray:
        which = np.take_along_axis(choices, draw.integers(0, choices.shape[1], (len(choices), count)), 1)
        noise = draw.standard_normal((len(choices), count, DIM), dtype=np.float32)
        return unit(topics[which] + np.float32(NOISE) * noise)

    return vectors(own, text), vectors(own[draw.permutation(n)[:asked], :4], query)


def prepared(n: int, asked: int) -> SimpleNamespace:
    import torch

    from quernel.search import MultiVectorIndex

    x, q = collection(n, asked, TEXT, QUERY)
    state = SimpleNamespace(x=torch.from_numpy(x), q=torch.from_numpy(q), queries=list(q))
    state.half = state.x.bfloat16(), state.q.bfloat16()
    state.index = MultiVectorIndex(DIM).add(x)
    state.small = MultiVectorIndex(DIM, "float16").add(x)
    return state


def by_maxsim(q: Any, x: Any) -> Any:
    try:
        from sentence_transformers.util import maxsim
    except ImportError as error:
        raise Unavailable("sentence-transformers is not installed") from error
    return maxsim(q, x).topk(10)


def equals_maxsim(s: SimpleNamespace) -> None:
    wanted = by_maxsim(s.q, s.x)
    scores, ids = s.index.search(s.queries, 10)
    np.testing.assert_allclose(scores, wanted.values.numpy(), atol=SAME)
    if (ids == wanted.indices.numpy()).mean() < 0.99:  # two may differ by less than the rounding
        raise ValueError("other texts than the peer's")


def with_unpooled(n: int, asked: int) -> SimpleNamespace:
    """Return a collection with every vector, and the same one with those of a text and of a query clustered."""
    import torch

    from quernel.nn.functional import cluster_tokens
    from quernel.search import MultiVectorIndex

    every, all_queries = collection(n, asked, TOKENS_TEXT, TOKENS_QUERY)
    x, q = (
        torch.cat([cluster_tokens(part, k)[0] for part in torch.from_numpy(vectors).split(256)])
        for vectors, k in ((every, TEXT), (all_queries, QUERY))
    )
    return SimpleNamespace(
        x=x,
        q=q,
        queries=list(q.numpy()),
        index=MultiVectorIndex(DIM).add(x.numpy()),
        unpooled=MultiVectorIndex(DIM).add(every),
        all_queries=list(all_queries),
    )


def with_lists(n: int, asked: int) -> SimpleNamespace:
    state = prepared(n, asked)
    state.index.optimize()
    return state


def approximate(s: SimpleNamespace) -> Any:
    return s.index.search(s.queries, 10, mode="approximate")


def finds_the_best(s: SimpleNamespace) -> None:
    exact, found = s.index.search(s.queries, 10)[1], approximate(s)[1]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(found, exact, strict=True)])
    if recall < RECALL:
        raise ValueError(f"recall is {recall:.3f}, not {RECALL}")


def exact_bound(n: int, asked: int, _: Any, threads: int) -> float:
    """Return the milliseconds of the multiply-adds, or of reading the vectors, whichever is longer."""
    work = 2.0 * n * TEXT * asked * QUERY * DIM / VECTOR_OPS / threads
    return max(work, 4.0 * n * TEXT * DIM / (DRAM_BYTES * threads)) * 1e3


def candidate_bound(asked: int, _: Any, threads: int) -> float:
    """Return the milliseconds of reading 512 candidates a query."""
    return asked * 512 * TEXT * DIM * 4 / (DRAM_BYTES * threads) * 1e3


PEERS = {
    "sentence-transformers maxsim": lambda s: by_maxsim(s.q, s.x),
    "sentence-transformers maxsim, bfloat16": lambda s: by_maxsim(s.half[1], s.half[0]),
    "ours, float16": lambda s: s.small.search(s.queries, 10),
}

CASES = [
    *(
        Case(
            name=f"exact, {n:,} texts of {TEXT} vectors, {asked} queries of {QUERY} a call",
            setup=partial(prepared, n, asked),
            ours=lambda s: s.index.search(s.queries, 10),
            peers=PEERS,
            gate=equals_maxsim,
            target={"sentence-transformers maxsim": 3.0},
            bound_ms=partial(exact_bound, n, asked),
            bound="multiply-adds at 230 GFLOP/s, or 34 GB/s, a core",
        )
        for n, asked in ((20_000, 32), (20_000, 1))
    ),
    Case(
        name=f"exact, 5,000 texts, pooled ({QUERY} x {TEXT}) against all vectors ({TOKENS_QUERY} x {TOKENS_TEXT})",
        setup=partial(with_unpooled, 5000, 32),
        ours=lambda s: s.index.search(s.queries, 10),
        peers={"unpooled": lambda s: s.unpooled.search(s.all_queries, 10)},
        gate=equals_maxsim,
        target={"unpooled": 4.0},
        bound_ms=partial(exact_bound, 5000, 32),
        bound="multiply-adds at 230 GFLOP/s, or 34 GB/s, a core",
    ),
    *(
        Case(
            name=f"approximate, 50,000 texts of {TEXT} vectors, {asked} queries of {QUERY} a call, recall {RECALL}",
            setup=partial(with_lists, 50_000, asked),
            ours=approximate,
            peers={"exact": lambda s: s.index.search(s.queries, 10)},
            gate=finds_the_best,
            target={"exact": 3.0},
            bound_ms=partial(candidate_bound, asked),
            bound="bytes of the candidates / 34 GB/s a core",
        )
        for asked in (16, 1)
    ),
]
