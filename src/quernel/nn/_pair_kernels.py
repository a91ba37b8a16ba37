"""Compiled sums of pair rows: ids in, mixed tokens out, and their gradient; no tensor of pairs times columns.

A query finds the rows of its pairs (one hash a pair, one more a hash function), asks for their cache lines, weighs the
pairs by count or by softmax, and adds the rows up. All of a query's pairs are hashed before the first row is read, so
that the reads, which miss every cache of a large table, wait together and not one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from quernel._intrinsics import F32, I32, Emitter
from quernel.hashing.mixers import U64, fastrange_small, mix64_step
from quernel.nn._addresses import pointer
from quernel.nn._spmm import kept

SQRT, MEAN, SOFTMAX = 0, 1, 2
# The id that stands for padding; any other negative id is an error. It fits 32 bits.
GAP = -(2**31)
LINE = 64
_FASTMATH = {"contract", "reassoc"}

# What tells one layer from another, all int64: see ``_pair_ops.Layout``.
LAYOUT = (
    *("state", "rows", "hashes", "chunk", "vocab", "direct", "window"),
    *("distances", "keyed", "normaliser", "causal", "heads"),
)
# What one call hands to its threads: addresses (0: none), then the sizes of the ids.
FIELDS = ("weight", "scores", "relative", "ids", "out", "batch", "length", "queries", *LAYOUT)
CALL = np.dtype([(name, np.int64) for name in FIELDS])


@intrinsic
def _widen(typing: Any, x: Any) -> Any:
    """Return a stored number as it is computed with: bfloat16 comes as uint16, the upper half of float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] != types.uint16:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), F32)

    return (types.float32 if x == types.uint16 else x)(x), emit


@intrinsic
def _fetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line of an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emitter(builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@njit(nogil=True, cache=True, fastmath=False)
def span_of(call: Any) -> Any:
    """Return the largest number of pairs that a query can have."""
    if call.window == 0:
        return call.length
    return min(call.length, call.window if call.causal else 2 * call.window - 1)


@njit(nogil=True, cache=True, fastmath=False)
def buckets_of(call: Any) -> Any:
    """Return how many distances are told apart."""
    return call.distances if call.causal else 2 * call.distances - 1


@njit(nogil=True, cache=True, fastmath=False)
def bucket_of(call: Any, distance: Any) -> Any:
    """Return the bucket of a distance t - j; without causality the first is of the farthest later token."""
    far = call.distances - 1
    return min(distance, far) if call.causal else max(-far, min(distance, far)) + far


@njit(nogil=True, cache=True, fastmath=False)
def find_pairs(call: Any, ids: Any, item: Any, rows: Any, distances: Any) -> Any:
    """Find the pairs of query number ``item``.

    ids: (batch length,)  rows: (hashes, span), rows of the table of chunks  distances: (span,), t - j

    Returns
    -------
    n : int
        How many there are; none if the query is padding, -1 if an id is out of range.
    """
    t = call.length - call.queries + item % call.queries
    start = item // call.queries * call.length
    u = np.int64(ids[start + t])
    if u == GAP:
        return 0
    buckets, hashes = buckets_of(call), call.hashes
    first = 0 if call.window == 0 else max(0, t - call.window + 1)
    last = t if call.causal else call.length - 1
    if call.window and not call.causal:
        last = min(last, t + call.window - 1)
    limit = call.vocab if call.vocab else np.int64(2**62)
    size = U64(call.rows)
    state = mix64_step(U64(call.state), U64(u))
    n = 0
    for j in range(first, last + 1):
        v = np.int64(ids[start + j])
        if v == GAP:
            continue
        if v < 0 or v >= limit:
            return -1
        distances[n] = t - j
        if call.direct:
            row = u * limit + v
            rows[0, n] = row * buckets + bucket_of(call, t - j) if call.keyed else row
        else:
            h = mix64_step(state, U64(v))
            if call.keyed:
                h = mix64_step(h, U64(bucket_of(call, t - j)))
            for c in range(hashes):
                rows[c, n] = np.int64(fastrange_small(mix64_step(h, U64(c)), size)) * hashes + c
        n += 1
    return n


@njit(nogil=True, cache=True, fastmath=False)
def weigh_pairs(call: Any, scores: Any, relative: Any, rows: Any, distances: Any, n: Any, shares: Any) -> None:
    """Write what each of n pairs counts; shares: (heads, span)."""
    number = shares.dtype.type
    buckets = buckets_of(call)
    if n == 0:
        return
    if call.normaliser != SOFTMAX:
        whole = number(1.0 / np.sqrt(n)) if call.normaliser == SQRT else number(1.0 / n)
        for i in range(n):
            shares[0, i] = whole * relative[bucket_of(call, distances[i])] if relative.size else whole
        return
    for h in range(call.heads):
        largest = number(-np.inf)
        for i in range(n):
            score = scores[rows[0, i] // call.hashes * call.heads + h]
            if relative.size:
                score += relative[h * buckets + bucket_of(call, distances[i])]
            shares[h, i] = score
            largest = max(largest, score)
        total = number(0.0)
        for i in range(n):
            shares[h, i] = np.exp(shares[h, i] - largest)
            total += shares[h, i]
        for i in range(n):
            shares[h, i] /= total


@njit(nogil=True, cache=True, fastmath=False)
def pieces_of(call: Any) -> Any:
    """Return into how many parts of equal width a row falls, so that each has one hash function and one head."""
    a, b = call.hashes, call.heads
    while b:
        a, b = b, a % b
    return call.hashes * call.heads // a


@njit(nogil=True, cache=True, fastmath=False)
def sum_pairs(call: Any, weight: Any, rows: Any, shares: Any, n: Any, out: Any) -> None:
    """Add up the rows of n pairs; weight: (rows of chunks, chunk), out: (width,)."""
    pieces = pieces_of(call)
    width = out.size // pieces
    out[:] = 0
    for p in range(pieces):
        c, h, column = p * call.hashes // pieces, p * call.heads // pieces, p * width
        offset = column - c * call.chunk
        for i in range(n):
            row, share = rows[c, i], shares[h, i]
            for x in range(width):
                out[column + x] += share * _widen(weight[row, offset + x])


@njit(nogil=True, cache=True, fastmath=False)
def _fetch_rows(weight: Any, width: Any, rows: Any, n: Any) -> None:
    """Ask for the rows of n pairs; weight: an address, width: bytes of a row."""
    for c in range(rows.shape[0]):
        for i in range(n):
            row = weight + rows[c, i] * width
            for byte in range(0, width, LINE):
                _fetch(row + byte)


@functools.cache
def sums(stored: str, ids: str) -> int:
    """Return the address of the C function over queries for ``run_ranges``; its fields are ``FIELDS``.

    stored: "float32", "float64", or "uint16" for bfloat16  ids: "int64" or "int32"
    """
    element, key = np.dtype(stored).type, np.dtype(ids).type
    wide = np.float64 if stored == "float64" else np.float32
    item_bytes = np.dtype(stored).itemsize

    def run(table: Any, start: Any, stop: Any, part: Any) -> None:
        call = carray(pointer(table), (1,), CALL)[0]
        buckets = buckets_of(call)
        chunks = (call.rows * call.hashes, call.chunk)
        weight = carray(pointer(call.weight), chunks, element)
        scores = carray(pointer(call.scores), (call.rows * call.heads if call.scores else 0,), wide)
        relative = carray(pointer(call.relative), (call.heads * buckets if call.relative else 0,), wide)
        tokens = carray(pointer(call.ids), (call.batch * call.length,), key)
        out = carray(pointer(call.out), (call.batch * call.queries, call.hashes * call.chunk), wide)
        span = span_of(call)
        rows, distances = np.empty((call.hashes, span), np.int64), np.empty(span, np.int64)
        shares = np.empty((call.heads, span), wide)
        for item in range(start, stop):
            n = find_pairs(call, tokens, item, rows, distances)
            if n < 0:
                carray(pointer(table), (len(FIELDS) + 1,), np.int64)[len(FIELDS)] = 1
                return
            _fetch_rows(call.weight, item_bytes * call.chunk, rows, n)
            weigh_pairs(call, scores, relative, rows, distances, n, shares)
            sum_pairs(call, weight, rows, shares, n, out[item])

    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(run))


@njit(nogil=True, cache=True, fastmath=False)
def list_rows(calls: Any, ids: Any, padding: Any, out: Any, start: Any, stop: Any) -> Any:
    """Write the table rows of the queries' pairs by distance, ``padding`` elsewhere; out: (items, hashes, distances).

    Returns
    -------
    failed : bool
        Whether an id is out of range.
    """
    call, span = calls[0], span_of(calls[0])
    rows, distances = np.empty((call.hashes, span), np.int64), np.empty(span, np.int64)
    nearest = 0 if call.causal else out.shape[2] // 2
    for item in range(start, stop):
        n = find_pairs(call, ids, item, rows, distances)
        if n < 0:
            return True
        out[item] = padding
        for i in range(n):
            for c in range(call.hashes):
                out[item, c, nearest + distances[i]] = rows[c, i]
    return False


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def _dot(weight: Any, row: Any, offset: Any, grad: Any, column: Any, width: Any) -> Any:
    total = grad.dtype.type(0)
    for x in range(width):
        total += _widen(weight[row, offset + x]) * grad[column + x]
    return total


@njit(nogil=True, cache=True, fastmath=False)
def pair_terms(calls: Any, ids: Any, weight: Any, scores: Any, relative: Any, grad: Any, first: Any, rows: Any,
               distances: Any, counts: Any, shares: Any, slopes: Any, start: Any, stop: Any) -> None:  # fmt: skip
    """Write rows, distances, shares, and the gradient by each pair's score or gain, of queries ``first + start`` on.

    grad: (items, width)  rows: (block, hashes, span)  distances: (block, span)  counts: (block,)
    shares: (block, heads, span)  slopes: of the same shape, or empty where nobody asks
    """
    call = calls[0]
    pieces = pieces_of(call)
    width = grad.shape[1] // pieces
    for k in range(start, stop):
        n = find_pairs(call, ids, first + k, rows[k], distances[k])
        counts[k] = n
        weigh_pairs(call, scores, relative, rows[k], distances[k], n, shares[k])
        if slopes.size == 0:
            continue
        slopes[k, :, :n] = 0
        for p in range(pieces):
            c, h, column = p * call.hashes // pieces, p * call.heads // pieces, p * width
            for i in range(n):
                slopes[k, h, i] += _dot(weight, rows[k, c, i], column - c * call.chunk, grad[first + k], column, width)
        if call.normaliser != SOFTMAX:
            # The share without its gain, which may be zero.
            whole = grad.dtype.type(1.0 / np.sqrt(n) if call.normaliser == SQRT else 1.0 / n) if n else 0
            for i in range(n):
                slopes[k, 0, i] *= whole
            continue
        for h in range(call.heads):
            mean = grad.dtype.type(0)
            for i in range(n):
                mean += shares[k, h, i] * slopes[k, h, i]
            for i in range(n):
                slopes[k, h, i] = shares[k, h, i] * (slopes[k, h, i] - mean)


@njit(nogil=True, cache=True, fastmath=False)
def add_rows(calls: Any, slots: Any, rows: Any, counts: Any, shares: Any, slopes: Any, grad: Any, first: Any,
             by_weight: Any, by_scores: Any, low: Any, high: Any) -> None:  # fmt: skip
    """Add a block's share of the gradient to rows [low, high) of ``by_weight``, and to their scores.

    slots: place of a table row in the gradient plus one, or empty where the gradient has all rows
    by_weight: (places, chunk)  by_scores: (places or pair rows, heads), or empty where nobody asks
    Threads share places, not queries: every sum is taken in one order, whatever their number.
    """
    call = calls[0]
    pieces = pieces_of(call)
    width = grad.shape[1] // pieces
    for k in range(counts.size):
        for p in range(pieces):
            c, h, column = p * call.hashes // pieces, p * call.heads // pieces, p * width
            offset = column - c * call.chunk
            for i in range(counts[k]):
                place = rows[k, c, i]
                if slots.size:
                    place = np.int64(slots[place]) - 1
                if low <= place < high:
                    share = shares[k, h, i]
                    for x in range(width):
                        by_weight[place, offset + x] += share * grad[first + k, column + x]
        if by_scores.size:
            for i in range(counts[k]):
                place = rows[k, 0, i]
                if slots.size:
                    place = np.int64(slots[place]) - 1
                if low <= place < high:
                    # Without slots a place is a row of chunks, of which a pair's row has several.
                    target = place if slots.size else place // call.hashes
                    for h in range(call.heads):
                        by_scores[target, h] += slopes[k, h, i]


@njit(nogil=True, cache=True, fastmath=False)
def add_distances(calls: Any, distances: Any, counts: Any, slopes: Any, out: Any) -> None:
    """Add a block's gradient by the gain or bias of each distance; out: (heads, buckets)."""
    for k in range(counts.size):
        for h in range(out.shape[0]):
            for i in range(counts[k]):
                out[h, bucket_of(calls[0], distances[k, i])] += slopes[k, h, i]


@njit(nogil=True, cache=True, fastmath=False)
def note_rows(rows: Any, counts: Any, slots: Any, found: Any, n: Any) -> Any:
    """Enter a block's table rows that are new into ``found``; ``slots`` marks them. Return how many there are now."""
    for k in range(counts.size):
        for c in range(rows.shape[1]):
            for i in range(counts[k]):
                row = rows[k, c, i]
                if slots[row] == 0:
                    slots[row] = 1
                    found[n] = row
                    n += 1
    return n


@njit(nogil=True, cache=True, fastmath=False)
def number_rows(slots: Any, found: Any) -> None:
    """Give rows their place in ``found``, counted from one."""
    for i in range(found.size):
        slots[found[i]] = i + 1
