"""``InvertedLists``: which texts have a vector near which of K centres, the centres from k-means over stored vectors.

They only pick candidates, so they hold no vectors: four bytes for each text that a list names, each once. K is the
power of two next to 2 sqrt(vectors); the centres come from a sample of 64 vectors a list, drawn with a fixed seed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quernel import _random
from quernel._array_folder import Arrays, readable, take
from quernel._errors import FormatError
from quernel._threads import parallel_ranges
from quernel.kernels.clustering import cluster_means, kmeans, nearest
from quernel.search._multi_vector_kernels import pairs_of
from quernel.search._ragged import RaggedVectors

_TRAINING, _ITERATIONS = 64, 10
# Vectors assigned at a time.
_BLOCK = 2**12


class InvertedLists(NamedTuple):
    """Texts by list: list c names ``texts[offsets[c] : offsets[c + 1]]``, in ascending order."""

    centers: NDArray[np.float32]  # (K, width)
    offsets: NDArray[np.int64]  # (K + 1,)
    texts: NDArray[np.int32]

    def extended(self, store: RaggedVectors, first: int) -> InvertedLists:
        """Return lists that name the texts from number ``first`` on too, by the same centres."""
        if first == len(store):
            return self
        start = int(store.offsets[first])
        lists = np.empty(len(store.rows) - start, np.int32)
        centers = readable(self.centers)[None]

        def assign(a: int, b: int) -> None:
            for i in range(a * _BLOCK, min(b * _BLOCK, len(lists)), _BLOCK):
                rows = store.values(start + i, min(start + i + _BLOCK, len(store.rows)))
                lists[i : i + len(rows)] = nearest(readable(rows[:, : self.centers.shape[1]])[None], centers)[0].numpy()

        parallel_ranges(assign, -(-len(lists) // _BLOCK))
        listed, texts = pairs_of(lists, store.offsets[first:] - start, first)
        sizes = np.diff(self.offsets)
        listed = np.concatenate([np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), listed])
        # Stable: earlier texts stay in front.
        order = np.argsort(listed, kind="stable")
        counts = np.bincount(listed, minlength=len(sizes))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return InvertedLists(self.centers, offsets, np.concatenate([self.texts, texts])[order])

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        return {"centers": self.centers, "list_offsets": self.offsets, "list_texts": self.texts}


def suitable(vectors: int) -> int:
    """Return how many lists suit a number of vectors."""
    return int(min(vectors, 2 ** round(np.log2(2 * np.sqrt(max(vectors, 1))))))


def build_lists(store: RaggedVectors, width: int) -> InvertedLists:
    """Return lists of all texts, by the first ``width`` coordinates of their vectors."""
    total = len(store.rows)
    count = suitable(total)
    chosen = np.sort(_random.generator(0).choice(total, min(total, _TRAINING * count), replace=False))
    sample = np.empty((len(chosen), width), np.float32)
    # Block by block: no second copy of a large store, and int8 vectors get their scales.
    for i in range(0, total, _BLOCK):
        a, b = np.searchsorted(chosen, (i, i + _BLOCK))
        sample[a:b] = store.values(i, min(i + _BLOCK, total))[chosen[a:b] - i, :width]
    points = torch.from_numpy(sample)[None]
    found = kmeans(points, count, iterations=_ITERATIONS)
    centers = cluster_means(points, found.assignment, count)[0][found.counts[0] > 0].numpy()
    empty = InvertedLists(centers, np.zeros(len(centers) + 1, np.int64), np.zeros(0, np.int32))
    return empty.extended(store, 0)


def restored_lists(arrays: Arrays, texts: int, width: int) -> InvertedLists | None:
    """Take the lists over ``texts`` texts out of the arrays of a file, if it has any.

    Raises
    ------
    FormatError
        If they do not fit each other or name a text that is not there.
    """
    if not {"centers", "list_offsets", "list_texts"} & set(arrays):
        return None
    centers = take(arrays, "centers", np.float32, (None, width))
    offsets = take(arrays, "list_offsets", np.int64, (len(centers) + 1,))
    named = take(arrays, "list_texts", np.int32, (None,))
    # A bad number would be read as an address.
    if not len(centers) or offsets[0] != 0 or offsets[-1] != len(named) or (np.diff(offsets) < 0).any():
        raise FormatError("array 'list_offsets' does not divide array 'list_texts' into lists")
    if named.size and (named.min() < 0 or named.max() >= texts):
        raise FormatError("array 'list_texts' names texts that are not there")
    return InvertedLists(centers, offsets, named)
