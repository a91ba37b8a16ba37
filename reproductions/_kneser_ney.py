"""Interpolated Kneser-Ney n-gram models over integer ids, with one discount an order; for small corpora, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class KneserNey:
    """An interpolated Kneser-Ney model.

        P(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) P(w | h'),      N(h): how many different words follow h

    The highest order counts occurrences, lower ones the different words before; below them all is uniform.

    Parameters
    ----------
    ids : int64 array, shape (n,)
        Training text.
    order : int
        Words of an n-gram.
    vocab : int
        vocab ** order must stay below 2^63.
    """

    def __init__(self, ids: Ids, order: int, vocab: int) -> None:
        self.vocab, self.order = vocab, order
        grams, counts = np.unique(self._keys(ids, order), return_counts=True)
        self.levels: list[tuple[Ids, Ids, Ids, Ids, Ids, float]] = []
        for n in range(order, 0, -1):
            # Of a gram's history: how often anything follows, and how many different words do.
            histories, places = np.unique(grams // vocab, return_inverse=True)
            totals = np.bincount(places, counts).astype(np.int64)
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            discount = once / (once + 2 * twice) if once else 0.0
            self.levels.append((grams, counts, histories, totals, np.bincount(places), discount))
            # The grams without their first word, each counted once for every word before it.
            grams, counts = np.unique(grams % vocab ** (n - 1), return_counts=True)

    def loss(self, ids: Ids) -> float:
        """Return the mean loss in nats of the words of a text that have a whole history."""
        keys = self._keys(ids, self.order)
        probability = np.full(len(keys), 1 / self.vocab)
        for n, (grams, counts, histories, totals, kinds, discount) in enumerate(reversed(self.levels), start=1):
            gram = keys % self.vocab**n
            count, total = _found(grams, counts, gram), _found(histories, totals, gram // self.vocab)
            kind = _found(histories, kinds, gram // self.vocab)
            with np.errstate(invalid="ignore", divide="ignore"):
                mixed = np.maximum(count - discount, 0) / total + discount * kind / total * probability
            probability = np.where(total > 0, mixed, probability)
        return float(-np.log(probability).mean())

    def _keys(self, ids: Ids, n: int) -> Ids:
        keys = np.zeros(len(ids) - n + 1, np.int64)
        for i in range(n):
            keys = keys * self.vocab + ids[i : len(ids) - n + 1 + i]
        return keys


def _found(known: Ids, values: Ids, keys: Ids) -> Ids:
    """Return the value of each key, 0 for one that is not known; ``known`` ascends."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)
