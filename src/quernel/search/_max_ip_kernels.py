"""The fused query of ``MaxIPIndex``: project, look into the likeliest buckets, score what is there, in one function.

Codes of a table that differ from the query's in the bits of its smallest projections are looked up first after its
own. Which sets of ranks come when does not depend on the query: ``probe_masks`` orders them once, by the squares that
the sorted projections have on average (Lv et al., 2007), so a query only sorts K numbers a table.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from quernel._intrinsics import Emitter, keyed
from quernel.hashing._projection_kernels import project_row
from quernel.search._top_k import keep_best

# Sums in any order and fused products; NaN cannot come, vectors are finite.
_SUMS = {"reassoc", "contract", "nsz"}
# Flips among so many of the smallest projections; 2^12 sets are more than any number of probes.
_RANKS = 12
MAX_PROBES = 2**_RANKS
# Rows fetched ahead of the one that is scored.
_AHEAD = 12
_ONE, _WORD = np.uint64(1), np.uint64(63)


def probe_masks(bits: int, probes: int) -> NDArray[np.uint32]:
    """Return which ranks each probe flips, bit r being the r-th smallest projection; the first flips none.

    Examples
    --------
    >>> probe_masks(bits=8, probes=5).tolist()
    [0, 1, 2, 3, 4]
    """
    ranks = min(bits, _RANKS)
    squares = [NormalDist().inv_cdf(0.5 + (r + 0.5) / bits / 2) ** 2 for r in range(ranks)]
    costs = np.zeros(1)
    for square in squares:
        costs = np.concatenate([costs, costs + square])
    return np.argsort(costs, kind="stable")[:probes].astype(np.uint32)


def _make_prefetch() -> Any:
    @intrinsic
    def prefetch(typing: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            Emitter(builder).prefetch(args[0])
            return context.get_dummy_value()

        return types.void(types.int64), emit

    return prefetch


_prefetch = _make_prefetch()


@njit(nogil=True, cache=True, fastmath=_SUMS)
def product(a: Any, b: Any) -> Any:
    """Return the inner product of two float32 vectors."""
    total = np.float32(0.0)
    for k in range(a.shape[0]):
        total += a[k] * b[k]
    return total


@njit(nogil=True, cache=True, fastmath=False)
def gather(
    projections: Any, bits: Any, masks: Any, offsets: Any, items: Any, alive: Any, cap: Any, seen: Any, found: Any
) -> Any:
    """Write the slots of the probed buckets to ``found``, each once; return how many.

    projections: (>= L K,), masks: (probes,) of ``probe_masks``, offsets and items: of ``BucketTables``,
    seen: (slots / 64,) zeros, the bits of what was found are set. Of a larger bucket ``cap`` items are taken, another
    stretch in every table, so that many equal vectors do not hide what lies beside them.
    """
    codes = np.int64(1) << np.int64(bits)
    tables = (offsets.shape[0] - 1) // codes
    sizes, flips = np.empty(bits, np.float32), np.empty(bits, np.int64)
    count = np.int64(0)
    for t in range(tables):
        code = np.int64(0)
        for b in range(bits):
            value = projections[t * bits + b]
            flip = np.int64(1) << np.int64(b)
            if value >= 0:
                code |= flip
            size, place = abs(value), b
            while place > 0 and sizes[place - 1] > size:
                sizes[place], flips[place] = sizes[place - 1], flips[place - 1]
                place -= 1
            sizes[place], flips[place] = size, flip
        for p in range(masks.shape[0]):
            mask, rank, other = np.int64(masks[p]), 0, code
            while mask:
                if mask & 1:
                    other ^= flips[rank]
                mask >>= 1
                rank += 1
            first, last = offsets[t * codes + other], offsets[t * codes + other + 1]
            if last - first > cap:
                first += (last - first - cap) * t // max(tables - 1, 1)
                last = first + cap
            for e in range(first, last):
                slot = np.int64(items[e])
                word, bit = slot >> 6, _ONE << (np.uint64(slot) & _WORD)
                if seen[word] & bit == 0 and alive[slot]:
                    seen[word] |= bit
                    found[count] = slot
                    count += 1
    return count


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def search_rows(
    queries: Any,
    directed: Any,
    panels: Any,
    bits: Any,
    masks: Any,
    offsets: Any,
    items: Any,
    alive: Any,
    vectors: Any,
    cap: Any,
    best: Any,
    slots: Any,
    start: Any,
    stop: Any,
) -> None:
    """Write the best items found for queries [start, stop) to ``best`` and ``slots`` (n, k), filled with NaN and -1.

    queries: (n, d), directed: (n, d + 1) what is hashed, panels: of ``Projections``, vectors: (slots, d); float32.
    """
    size = vectors.shape[0]
    tables = (offsets.shape[0] - 1) >> bits
    seen = np.zeros((size + 63) // 64, np.uint64)
    found = np.empty(min(size, tables * masks.shape[0] * cap), np.int32)
    projections = np.empty(panels.shape[0] * panels.shape[2], np.float32)
    base, pitch = vectors.ctypes.data, 4 * vectors.shape[1]
    for i in range(start, stop):
        project_row(directed[i], panels, projections)
        count = gather(projections, bits, masks, offsets, items, alive, cap, seen, found)
        held = 0
        for j in range(count):
            ahead = base + np.int64(found[min(j + _AHEAD, count - 1)]) * pitch
            for line in range(0, pitch, 64):
                _prefetch(ahead + line)
            slot = np.int64(found[j])
            held = keep_best(best[i], slots[i], held, product(vectors[slot], queries[i]), slot)
        for j in range(count):
            seen[found[j] >> 6] = 0


def _warmup() -> None:
    """Compile the query; ``quernel warmup`` calls it."""
    from quernel.search.max_inner_product import MaxIPIndex

    MaxIPIndex(1, n_tables=1, bits=1).add(np.ones((1, 1))).search(np.ones((1, 1)), 1)
