"""Mustafar's pruning, bitmaps, schedule and attention, number by number."""

import math


def kept(row, n):
    """Return the places of the n entries of largest magnitude, of equal ones the first, in ascending order."""
    return sorted(sorted(range(len(row)), key=lambda c: (-abs(row[c]), c))[:n])


def pruned(row, n):
    places = set(kept(row, n))
    return [x if c in places else 0.0 for c, x in enumerate(row)]


def bitmaps(row, n):
    """Return a number for each 64 channels, bit c for channel c."""
    out = [0] * -(-len(row) // 64)
    for c in kept(row, n):
        out[c // 64] |= 1 << (c % 64)
    return out


def packed(tokens, window, block):
    return block * (max(0, tokens - window) // block)


def attention(query, keys, values, scale):
    """Return softmax(scale q k^T) v of one query; lists of numbers."""
    logits = [scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights)
    columns = zip(*values, strict=True)
    return [sum(w * x for w, x in zip(weights, column, strict=True)) / total for column in columns]
