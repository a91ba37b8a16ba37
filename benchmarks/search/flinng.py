"""FLINNG against hnswlib, faiss, datasketch and exact search on near-duplicates, at a recall of 0.995 each.

Peers run in processes of their own with one thread and take the first setting of a ladder that reaches the recall;
ours is one documented setting that must reach it before anything is timed. hnswlib needs minutes to build 200,000
vectors, so builds are compared on 20,000, where its share of the work is smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks._runner import Case, Isolated, Unavailable

N, DIM, QUERIES, RECALL = 200_000, 100, 1000, 0.995
BUILD = 20_000
SETTING = {"n_rows": 3, "n_tables": 20, "bits": 16}
# A core: float32 multiply-adds twice a second, and bytes from the third-level cache.
FLOPS, CACHE_BYTES = 94e9, 97e9


def gaussian(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return items and queries; query i is item i with noise 0.1."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((n, DIM), dtype=np.float32)
    return x, x[:QUERIES] + 0.1 * draw.standard_normal((QUERIES, DIM), dtype=np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def recall(ids: Any) -> float:
    return float((np.asarray(ids)[:, 0] == np.arange(len(ids))).mean())


def prepared() -> SimpleNamespace:
    from quernel.search import FlatIndex, FlinngIndex

    x, q = gaussian(N)
    return SimpleNamespace(x=x, q=q, index=FlinngIndex(DIM, **SETTING).add(x), flat=FlatIndex(DIM).add(x))  # type: ignore[arg-type]


def finds_them_in_few_bytes(s: SimpleNamespace) -> None:
    got = recall(s.index.search(s.q, 1)[1])
    if got < RECALL:
        raise ValueError(f"recall is {got}, not {RECALL}")
    if s.index.nbytes > 0.8 * s.x.nbytes:
        raise ValueError(f"the index has {s.index.nbytes:,} bytes, the vectors {s.x.nbytes:,}")


def query_bound(rows: int, state: SimpleNamespace, threads: int) -> float:
    """Return the milliseconds that hashing and reading the lists take at least."""
    stats = state.index.stats()
    hashes = 2 * DIM * SETTING["n_tables"] * SETTING["bits"] / FLOPS
    listed = 2 * stats.entries / 2 ** SETTING["bits"] / CACHE_BYTES
    return rows * (hashes + listed) / threads * 1e3


def ladder(search: Callable[[int], Any], steps: tuple[int, ...]) -> int:
    """Return the first step that reaches the recall."""
    for step in steps:
        if recall(search(step)) >= RECALL:
            return step
    raise Unavailable(f"recall {RECALL} is not reached at {steps[-1]}")


def hnsw_index(x: np.ndarray) -> Any:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=DIM)
    index.init_index(max_elements=len(x), M=16, ef_construction=100, random_seed=0)
    index.set_num_threads(1)
    index.add_items(x)
    return index


def hnsw_search(rows: int) -> Callable[[], Any]:
    x, q = (unit(part) for part in gaussian(N))
    index = hnsw_index(x)

    def at(ef: int) -> Any:
        index.set_ef(ef)
        return index.knn_query(q, 1)[0]

    index.set_ef(ladder(at, (10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 640)))
    return lambda: index.knn_query(q[:rows], 1)


def hnsw_build() -> Callable[[], Any]:
    x = unit(gaussian(BUILD)[0])
    return lambda: hnsw_index(x)


def ivf_index(x: np.ndarray) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)
    lists = 1024 if len(x) == N else 256
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(x)
    index.add(x)
    return index


def ivf_search(rows: int) -> Callable[[], Any]:
    x, q = (unit(part) for part in gaussian(N))
    index = ivf_index(x)

    def at(probes: int) -> Any:
        index.nprobe = probes
        return index.search(q, 1)[1]

    index.nprobe = ladder(at, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64))
    return lambda: index.search(q[:rows], 1)


def ivf_build() -> Callable[[], Any]:
    x = unit(gaussian(BUILD)[0])
    return lambda: ivf_index(x)


def to_build() -> SimpleNamespace:
    x, q = gaussian(BUILD)
    return SimpleNamespace(x=x, q=q)


def build(s: SimpleNamespace) -> Any:
    from quernel.search import FlinngIndex

    return FlinngIndex(DIM, **SETTING).add(s.x)  # type: ignore[arg-type]


def builds_a_good_index(s: SimpleNamespace) -> None:
    got = recall(build(s).search(s.q, 1)[1])
    if got < RECALL:
        raise ValueError(f"recall is {got}, not {RECALL}")


SETS, SIZE, SET_QUERIES = 20_000, 100, 200
# The most frequent ids are in most sets, as the commonest shingles of texts are.
IDS, SKEW = 10**6, 3


def sets() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return sets of about 100 skewed ids, and queries with a fifth of a set replaced: similarity about 2/3."""
    draw = np.random.default_rng(0)
    x = [np.unique((IDS * draw.random(SIZE) ** SKEW).astype(np.int64)) for _ in range(SETS)]
    q = [row.copy() for row in x[:SET_QUERIES]]
    for row in q:
        changed = draw.permutation(len(row))[: len(row) // 5]
        row[changed] = IDS + draw.permutation(IDS)[: len(changed)]
    return x, q


class SparseProduct:
    """Exact search by one product with the transposed incidence matrix, which is kept: an inverted file."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.items = np.unique(np.concatenate(rows))
        self.transposed = self.incidence(rows).T.tocsr()
        self.sizes = np.array([len(row) for row in rows])

    def incidence(self, rows: list[np.ndarray]) -> sparse.csr_matrix:
        flat, sizes = np.concatenate(rows), [len(row) for row in rows]
        places = np.minimum(np.searchsorted(self.items, flat), len(self.items) - 1)
        known = (self.items[places] == flat).astype(np.float32)
        return sparse.csr_matrix((known, places, np.cumsum([0, *sizes])), shape=(len(rows), len(self.items)))

    def search(self, rows: list[np.ndarray]) -> np.ndarray:
        common = (self.incidence(rows) @ self.transposed).toarray()
        sizes = np.array([[len(row)] for row in rows])
        return (common / (sizes + self.sizes - common)).argmax(1)


def prepared_sets() -> SimpleNamespace:
    from quernel.search import FlinngIndex

    x, q = sets()
    index = FlinngIndex(metric="jaccard", n_tables=40, bits=13).add(x)
    return SimpleNamespace(q=q, index=index, product=SparseProduct(x))


def finds_the_sets(s: SimpleNamespace) -> None:
    exact = s.product.search(s.q)
    got = recall(s.index.search(s.q, 1)[1])
    if got < RECALL or recall(exact[:, None]) < RECALL:
        raise ValueError(f"recall is {got}, not {RECALL}")


def lsh_search() -> Callable[[], Any]:
    """Return the search of the first setting that reaches the recall."""
    from datasketch import MinHash, MinHashLSH

    x, q = sets()

    def hashed(row: np.ndarray, permutations: int) -> Any:
        mixed = (row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        value = MinHash(num_perm=permutations, hashfunc=int)
        value.update_batch(mixed.tolist())
        return value

    def searched(permutations: int, threshold: float) -> Callable[[], list[list[int]]]:
        held = [hashed(row, permutations) for row in x]
        index = MinHashLSH(threshold=threshold, num_perm=permutations)
        for number, value in enumerate(held):
            index.insert(number, value)

        def nearest(row: np.ndarray) -> int:
            value = hashed(row, permutations)
            return max(index.query(value), key=lambda number: held[number].jaccard(value), default=-1)

        return lambda: [[nearest(row)] for row in q]

    for setting in ((64, 0.5), (128, 0.5), (128, 0.4), (128, 0.3), (256, 0.3)):
        search = searched(*setting)
        if recall(search()) >= RECALL:
            return search
    raise Unavailable(f"recall {RECALL} is not reached by 256 permutations")


CASES = [
    *(
        Case(
            name=f"{N:,} vectors of {DIM}, near-duplicate queries at recall {RECALL}, {rows:,} a call",
            setup=prepared,
            ours=lambda s, rows=rows: s.index.search(s.q[:rows], 1),
            peers={
                "hnswlib": Isolated("hnsw_search", rows),
                "faiss IVF1024": Isolated("ivf_search", rows),
                "exact": lambda s, rows=rows: s.flat.search(s.q[:rows], 1),
            },
            gate=finds_them_in_few_bytes,
            target={"hnswlib": 5.0, "faiss IVF1024": 2.0} if rows > 1 else {},
            bound_ms=partial(query_bound, rows),
            bound="hashes at 94 GFLOP/s and lists at 97 GB/s a core",
            threads=(1,),
        )
        for rows in (QUERIES, 1)
    ),
    Case(
        name=f"build of {BUILD:,} vectors of {DIM}",
        setup=to_build,
        ours=build,
        peers={"hnswlib": Isolated("hnsw_build"), "faiss IVF256": Isolated("ivf_build")},
        gate=builds_a_good_index,
        target={"hnswlib": 10.0},
        threads=(1,),
    ),
    Case(
        name=f"{SETS:,} sets of {SIZE} ids, {SET_QUERIES} queries of Jaccard similarity 2/3",
        setup=prepared_sets,
        ours=lambda s: s.index.search(s.q, 1),
        peers={"datasketch MinHashLSH": Isolated("lsh_search"), "sparse product": lambda s: s.product.search(s.q)},
        gate=finds_the_sets,
        target={"datasketch MinHashLSH": 10.0, "sparse product": 10.0},
        threads=(1,),
    ),
]
