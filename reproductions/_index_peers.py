"""Peers of the indexes, each in a process of its own with one thread: faiss beside torch in one process can crash.

``run(name, arrays, **settings)`` returns what the function of this name printed, a JSON list with one row a setting:
processor seconds of the build and microseconds a query, and the file of the ids that it found. Processor time, not wall
time: one thread, and a busy machine changes it little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from quernel._errors import MissingExtraError

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
MISSING = 3


def run(name: str, arrays: Mapping[str, np.ndarray], **settings: Any) -> list[dict[str, Any]]:
    """Run one peer on arrays ``x`` and ``q``; every row gets its ``ids``."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", **arrays)
        command = [sys.executable, __file__, name, folder, json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}, check=False)
        if done.returncode == MISSING:
            raise MissingExtraError(f"the peer {name}", "peers")
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
        rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        for i, row in enumerate(rows):
            row["ids"] = np.load(Path(folder) / f"{i}.npy")
    return rows


def timed(function: Callable[[], Any], at_least: float = 0.3) -> tuple[Any, float]:
    """Return what a function gives and its processor seconds, the mean over calls that take so long together."""
    result = function()
    calls, start = 0, time.process_time()
    while time.process_time() - start < at_least:
        function()
        calls += 1
    return result, (time.process_time() - start) / calls


def ivf(data: Mapping[str, np.ndarray], lists: int, probes: list[int], k: int) -> list[tuple[dict[str, Any], Any]]:
    import faiss

    faiss.omp_set_num_threads(1)
    x, q = data["x"], data["q"]
    start = time.process_time()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(x.shape[1]), x.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.train(x)
    index.add(x)
    built = time.process_time() - start
    rows = []
    for n in probes:
        index.nprobe = n
        (_, ids), seconds = timed(lambda: index.search(q, k))
        rows.append(({"setting": f"IVF{lists}, nprobe={n}", "build": built, "us": 1e6 * seconds / len(q)}, ids))
    return rows


def hnsw(data: Mapping[str, np.ndarray], efs: list[int], k: int) -> list[tuple[dict[str, Any], Any]]:
    import hnswlib

    x, q = data["x"], data["q"]
    index = hnswlib.Index(space="ip", dim=x.shape[1])
    start = time.process_time()
    index.init_index(max_elements=len(x), M=16, ef_construction=100, random_seed=0)
    index.set_num_threads(1)
    index.add_items(x)
    built = time.process_time() - start
    rows = []
    for ef in efs:
        index.set_ef(ef)
        (ids, _), seconds = timed(lambda: index.knn_query(q, k))
        rows.append(
            ({"setting": f"HNSW16, ef={ef}", "build": built, "us": 1e6 * seconds / len(q)}, ids.astype(np.int64))
        )
    return rows


def sets_of(data: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    offsets = data[f"{name}_offsets"]
    return [data[f"{name}_items"][a:b] for a, b in itertools.pairwise(offsets)]


def min_hash_lsh(data: Mapping[str, np.ndarray], settings: list[list[float]]) -> list[tuple[dict[str, Any], Any]]:
    """The answer of datasketch is a bag of candidates; the best of them by their MinHash is the nearest."""
    from datasketch import MinHash, MinHashLSH

    sets, queries = sets_of(data, "x"), sets_of(data, "q")
    rows = []
    for permutations, threshold in settings:
        start = time.process_time()

        def hashed(one: np.ndarray, size: int = int(permutations)) -> Any:
            # Hashed to 32 bits here, all at once: its own way would hash one item after the other.
            mixed = (one.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
            value = MinHash(num_perm=size, hashfunc=int)
            value.update_batch(mixed.tolist())
            return value

        held = [hashed(one) for one in sets]
        index = MinHashLSH(threshold=threshold, num_perm=int(permutations))
        for number, value in enumerate(held):
            index.insert(number, value)
        built = time.process_time() - start

        def nearest(query: np.ndarray, index: Any = index, held: Any = held, hashed: Any = hashed) -> int:
            value = hashed(query)
            return max(index.query(value), key=lambda i: (held[i].jaccard(value), -i), default=-1)

        ids, seconds = timed(lambda nearest=nearest: [nearest(query) for query in queries])
        label = f"MinHashLSH, {int(permutations)} permutations, threshold {threshold}"
        rows.append(({"setting": label, "build": built, "us": 1e6 * seconds / len(queries)}, np.array(ids)[:, None]))
    return rows


class SparseProduct:
    """Exact search of sets by one product with the transposed incidence matrix, which is kept: an inverted file."""

    def __init__(self, offsets: np.ndarray, items: np.ndarray) -> None:
        self.items, places = np.unique(items, return_inverse=True)
        ones = np.ones(len(places), np.float32)
        held = sparse.csr_matrix((ones, places, offsets), shape=(len(offsets) - 1, len(self.items)))
        self.sizes, self.transposed = np.diff(offsets), held.T.tocsr()

    def search(self, offsets: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return the most similar set of each query."""
        places = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
        known = (self.items[places] == items).astype(np.float32)
        asked = sparse.csr_matrix((known, places, offsets), shape=(len(offsets) - 1, len(self.items)))
        common = (asked @ self.transposed).toarray()
        return (common / (np.diff(offsets)[:, None] + self.sizes - common)).argmax(1)


def nn_descent(data: Mapping[str, np.ndarray]) -> list[tuple[dict[str, Any], Any]]:
    """Build only, after a warm-up on a few rows that compiles it."""
    from pynndescent import NNDescent

    sets = sets_of(data, "x")
    items, places = np.unique(np.concatenate(sets), return_inverse=True)
    offsets = data["x_offsets"] - data["x_offsets"][0]
    matrix = sparse.csr_matrix((np.ones(len(places), np.float32), places, offsets), shape=(len(sets), len(items)))
    matrix.sort_indices()
    NNDescent(matrix[:300], metric="jaccard", n_jobs=1, random_state=0)
    start = time.process_time()
    NNDescent(matrix, metric="jaccard", n_jobs=1, random_state=0)
    row = {"setting": "pynndescent", "build": time.process_time() - start, "us": float("nan")}
    return [(row, np.zeros((0, 1), np.int64))]


PEERS: dict[str, Callable[..., list[tuple[dict[str, Any], Any]]]] = {
    "ivf": ivf,
    "hnsw": hnsw,
    "min_hash_lsh": min_hash_lsh,
    "nn_descent": nn_descent,
}


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads)
    options = parser.parse_args()
    try:
        with np.load(options.folder / "data.npz") as held:
            rows = PEERS[options.name](dict(held), **options.settings)
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    for i, (_, ids) in enumerate(rows):
        np.save(options.folder / f"{i}.npy", ids)
    print(json.dumps([row for row, _ in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
