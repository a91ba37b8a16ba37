"""Slow, readable PairConnect: three loops over queries, tokens and columns, from the words of the definition."""

from __future__ import annotations

import math
from typing import Any

from tests.reference.hashing import fastrange, mix64


def rows_of(u: int, v: int, bucket: int, options: dict[str, Any]) -> list[int]:
    """Return the table row of each hash function for a pair; ``bucket`` counts only where the key holds it."""
    keyed = options["relative"] == "key" and options["buckets"] > 1
    if options["direct"]:
        number = u * options["vocab"] + v
        return [number * options["buckets"] + bucket if keyed else number]
    key = (u, v, bucket) if keyed else (u, v)
    return [fastrange(mix64(options["seed"], *key, c), options["n_rows"]) for c in range(options["n_hashes"])]


def bucket_of(distance: int, options: dict[str, Any]) -> int:
    """Return the bucket of t - j."""
    far = options["rel_buckets"] - 1
    return min(distance, far) if options["causal"] else max(-far, min(distance, far)) + far


def neighbours(t: int, length: int, options: dict[str, Any]) -> list[int]:
    """Return which tokens token t looks at."""
    window = options["window"] or length
    return [j for j in range(length) if abs(t - j) < window and (j <= t or not options["causal"])]


def mixed(ids: list[list[int]], there: list[list[bool]], row: Any, score: Any, weight: Any, options: Any) -> Any:
    """Return p as nested lists (B, T, dim).

    row: (table row, hash function, column) -> number  score: (table row, head) -> number
    weight: (head, bucket) -> gain or bias of a distance
    """
    dim, heads, hashes = options["dim"], options["n_heads"], options["n_hashes"]
    out = []
    for sequence, real in zip(ids, there, strict=True):
        out.append([[0.0] * dim for _ in sequence])
        for t, u in enumerate(sequence):
            near = [j for j in neighbours(t, len(sequence), options) if real[t] and real[j]]
            buckets = [bucket_of(t - j, options) for j in near]
            rows = [rows_of(u, sequence[j], b, options) for j, b in zip(near, buckets, strict=True)]
            for x in range(dim):
                h, c = x * heads // dim, x * hashes // dim
                if options["normalise"] == "softmax":
                    terms = [math.exp(score(r[0], h) + weight(h, b)) for r, b in zip(rows, buckets, strict=True)]
                    shares = [term / sum(terms) for term in terms]
                else:
                    z = math.sqrt(len(near)) if options["normalise"] == "sqrt" else len(near)
                    shares = [weight(0, b) / z for b in buckets]
                offset = x - c * (dim // hashes)
                for share, r in zip(shares, rows, strict=True):
                    out[-1][t][x] += share * row(r[c], c, offset)
    return out
