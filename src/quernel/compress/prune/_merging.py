"""Merging of channels on plain arrays: the algorithm of feature merging, with incremental Gram matrices.

G_ij = sum over tensors <v_i, v_j>;  D_ij = G_ii + G_jj - 2 G_ij.  A merge replaces v_m by a v_m + b v_n, so its row
of G is the same combination of two rows: O(n) instead of O(n d).  What a merge changes in *other* groups (its rows
are their columns) is a correction of G of rank 2k, O(n_other^2 k), k the kernel size.  All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quernel.compress.graph import ChannelGroup, Slot
from quernel.compress.prune._kernels import add_symmetric, nearest

Array = NDArray[np.float64]
Reference = Literal["initial", "current"]
# Gram round-off leaves exact duplicates slightly apart, on either side of zero.
ZERO_SHARE = 1e-10


@dataclass(frozen=True)
class Rule:
    """How channels are compared and joined; see ``FeatureMerging`` for the meaning of the fields."""

    reference: Reference = "initial"
    scale: Literal["sum", "mean"] = "sum"
    normalize: bool = False
    distance: Literal["both", "producers"] = "both"

    def adds(self, slot: Slot) -> bool:
        """Say whether two channels' entries of a slot are added; the others are averaged by multiplicity.

        What makes a channel and what reads it must go opposite ways. A depthwise weight only scales what
        comes in, so it is always averaged.
        """
        if slot.role == "column":
            return self.scale == "mean"
        return self.scale == "sum" and slot.role != "gain"

    def compares(self, group: ChannelGroup) -> tuple[Slot, ...]:
        """Return the slots that enter the distance.

        The paper leaves biases out. Where only producers count, two features with one weight and different
        biases would look equal, so there the bias takes part.
        """
        if self.distance == "both":
            return (*group.producers, *group.consumers)
        return (*group.producers, *(s for s in group.vectors if s.role != "folded"))


class Space:
    """One channel group while its channels are merged.

    ``members[i]`` lists the original channels that row i now stands for; dead rows have none.
    """

    def __init__(self, group: ChannelGroup, rule: Rule, tensors: Mapping[str, Array]) -> None:
        self.group, self.rule = group, rule
        self.slots = tuple(s for s in group.slots if s.role != "folded")
        self.compared = rule.compares(group)
        n = group.size
        self.members: list[list[int]] = [[i] for i in range(n)]
        self.count = np.ones(n)
        self.alive = np.ones(n, dtype=bool)
        # Gram matrices of the entries that add and of those that average, which merge with other weights.
        self.grams = {adds: np.zeros((n, n)) for adds in (True, False)}
        for slot in self.compared:
            lines = _lines(tensors[slot.tensor], slot)
            self.grams[rule.adds(slot)] += lines @ lines.T
        self.zero = 0.0
        self.first_maximum = float(self._distances().max())
        self.zero = ZERO_SHARE * self.first_maximum
        self.near = np.zeros(n, dtype=np.int64)
        self.gap = np.full(n, np.inf)
        self.stale = True

    @property
    def live(self) -> NDArray[np.int64]:
        """The channels that are left."""
        return np.flatnonzero(self.alive)

    @property
    def merged(self) -> int:
        """How many channels have gone."""
        return self.group.size - int(self.alive.sum())

    def closest(self) -> tuple[float, int, int]:
        """Return the smallest distance and its pair (m, n), m < n."""
        if self.stale:
            self._find_nearest(self.live)
            self.stale = False
        i = int(self.gap.argmin())
        j = int(self.near[i])
        return float(self.gap[i]), min(i, j), max(i, j)

    def limit(self) -> float:
        """Return the maximum distance that thresholds refer to."""
        if self.rule.reference == "initial":
            return self.first_maximum
        return float(self._distances()[np.ix_(self.alive, self.alive)].max())

    def join(self, m: int, n: int, adds: bool) -> None:
        """Merge the rows and columns m, n of one Gram matrix."""
        a, b = self.weights(m, n, adds)
        gram = self.grams[adds]
        row = a * gram[m] + b * gram[n]
        row[m] = a * row[m] + b * row[n]
        row[n] = 0.0
        gram[m], gram[:, m] = row, row
        gram[n], gram[:, n] = 0.0, 0.0

    def weights(self, m: int, n: int, adds: bool) -> tuple[float, float]:
        """Return a, b of the new entry a v_m + b v_n."""
        if adds:
            return 1.0, 1.0
        total = float(self.count[m] + self.count[n])
        return float(self.count[m]) / total, float(self.count[n]) / total

    def close(self, m: int, n: int) -> None:
        """Finish a merge: n is gone, m has its multiplicity, nearest neighbours are brought up to date."""
        self.count[m] += self.count[n]
        self.alive[n] = False
        self.members[m] += self.members[n]
        self.members[n] = []
        self.gap[n] = np.inf
        if self.stale:
            return
        moved = self.alive & ((self.near == m) | (self.near == n))
        moved[m] = True
        self._find_nearest(np.flatnonzero(moved))
        row = self._row(m)
        nearer = self.alive & (row < self.gap)
        self.near[nearer], self.gap[nearer] = m, row[nearer]

    def _find_nearest(self, rows: NDArray[np.int64]) -> None:
        share = 1 / self.count if self.rule.normalize else np.ones_like(self.count)
        nearest(self.grams[True], self.grams[False], share, rows, self.live, self.zero, self.near, self.gap)

    def _row(self, i: int) -> Array:
        """Return the distances of channel i from the others; infinite from itself and the dead."""
        share = self.count if self.rule.normalize else np.ones_like(self.count)
        adding, averaging = self.grams[True], self.grams[False]
        diagonal = adding.diagonal() / share**2 + averaging.diagonal()
        row = _cleared(diagonal + diagonal[i] - 2 * (adding[i] / (share * share[i]) + averaging[i]), self.zero)
        row[i] = np.inf
        row[~self.alive] = np.inf
        return row

    def _distances(self) -> Array:
        share = self.count if self.rule.normalize else np.ones_like(self.count)
        total = self.grams[True] / np.outer(share, share) + self.grams[False]
        diagonal = total.diagonal()
        return _cleared(diagonal[:, None] + diagonal[None, :] - 2 * total, self.zero)


class Merger:
    """Merges the channels of several groups that share tensors.

    Parameters
    ----------
    tensors : mapping of str to array
        Every tensor of every slot as (rows, columns, kernel), float64; changed in place.
    groups : sequence of ChannelGroup
        Each with at least two channels.
    rule : Rule
        How channels are compared and joined.
    """

    def __init__(self, tensors: dict[str, Array], groups: Sequence[ChannelGroup], rule: Rule) -> None:
        self.tensors, self.rule = tensors, rule
        self.spaces = [Space(g, rule, tensors) for g in groups]
        self._readers: dict[str, list[tuple[Space, Slot]]] = {}
        for space in self.spaces:
            for slot in space.compared:
                self._readers.setdefault(slot.tensor, []).append((space, slot))

    def run(
        self,
        beta: float,
        max_ratio: float = 1.0,
        order: Literal["sweep", "global"] = "sweep",
        tell: Callable[[float], None] | None = None,
    ) -> None:
        """Merge until no pair of any group is within ``beta`` times its maximum distance.

        A group that fails the test is not finished: its distances change when a neighbour merges, so it is
        tested again in every later sweep. Calling again with a larger ``beta`` goes on from here.
        """
        caps = [min(math.floor(max_ratio * s.group.size + 1e-9), s.group.size - 1) for s in self.spaces]
        while True:
            candidates = list(zip(self.spaces, caps, strict=True))
            if order == "global":
                ratios = [_ratio(s) if s.merged < cap else math.inf for s, cap in candidates]
                best = min(range(len(ratios)), key=ratios.__getitem__, default=None)
                candidates = [] if best is None else [candidates[best]]
            progressed = False
            for space, cap in candidates:
                if space.merged < cap and _ratio(space) <= beta:
                    _, m, n = space.closest()
                    self.merge(space, m, n)
                    progressed = True
            if not progressed:
                return
            if tell is not None:
                tell(sum(s.merged for s in self.spaces) / max(1, sum(caps)))

    def merge(self, space: Space, m: int, n: int) -> None:
        """Merge channel n of a group into channel m, in all its tensors and all affected Gram matrices."""
        for adds in (True, False):
            a, b = space.weights(m, n, adds)
            for slot in space.slots:
                if self.rule.adds(slot) == adds:
                    self._join_lines(slot, m, n, a, b)
            space.join(m, n, adds)
        space.close(m, n)

    def _join_lines(self, slot: Slot, m: int, n: int, a: float, b: float) -> None:
        tensor = self.tensors[slot.tensor]
        at_m, at_n = slot.index[m], slot.index[n]
        first, second = np.take(tensor, at_m, axis=slot.axis), np.take(tensor, at_n, axis=slot.axis)
        for other, reader in self._readers.get(slot.tensor, ()):
            if reader.axis != slot.axis:
                # x, y: the part of both lines that each channel of the other group owns, (n_other, lines * k).
                live = other.live
                x, y = (_lines(lines, reader)[live] for lines in (first, second))
                add_symmetric(other.grams[self.rule.adds(reader)], _half_change(x, y, a, b), live)
                other.stale = True
        joined = a * first + b * second
        if slot.axis == 0:
            tensor[at_m], tensor[at_n] = joined, 0.0
        else:
            tensor[:, at_m], tensor[:, at_n] = joined, 0.0


def _ratio(space: Space) -> float:
    gap = space.closest()[0]
    if gap == 0.0:
        return 0.0
    limit = space.limit()
    return gap / limit if limit > 0 else math.inf


def _lines(tensor: Array, slot: Slot) -> Array:
    """Return each channel's entries of a tensor, or of lines cut from it, shape (size, d)."""
    moved = tensor if slot.axis == 0 else tensor.swapaxes(0, 1)
    return moved[slot.index].reshape(len(slot.index), -1)


def _half_change(x: Array, y: Array, a: float, b: float) -> Array:
    """Return h with h + h^T = z z^T - x x^T - y y^T for z = a x + b y."""
    left, right = x, a * b * y + (a * a - 1) / 2 * x
    if b != 1.0:
        left, right = np.hstack([left, y]), np.hstack([right, (b * b - 1) / 2 * y])
    half: Array = left @ right.T
    return half


def _cleared(distances: Array, zero: float) -> Array:
    distances[distances < zero] = 0.0
    return distances
