"""Feature merging as it is written down: everything is computed anew for every merge, with no shortcut.

A network is a dict of arrays; a group lists, for each array, along which axis its channels lie and what the
array does to them.  The merged channel goes to the end of the order, as in the authors' code.  O(n^3 d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Part:
    """An axis of an array that holds a group's channels, each in a block of equally many positions."""

    array: str
    axis: int
    role: str  # "row" makes a channel, "gain" and "shift" transform it, "column" reads it
    compared: bool = True


@dataclass
class Group:
    """Channels of one hidden space."""

    size: int
    parts: list[Part]
    members: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [[i] for i in range(self.size)]


def block(arrays: dict[str, np.ndarray], part: Part, channels: int, i: int) -> np.ndarray:
    """Return the entries of channel i in one array."""
    width = arrays[part.array].shape[part.axis] // channels
    return np.take(arrays[part.array], range(i * width, (i + 1) * width), axis=part.axis)


def vector(arrays: dict[str, np.ndarray], group: Group, i: int, normalize: bool) -> np.ndarray:
    """Return v_i: what makes channel i and what reads it, one after the other."""
    count = len(group.members)
    pieces = []
    for part in group.parts:
        if part.compared:
            share = len(group.members[i]) if normalize and part.role in ("row", "shift") else 1
            pieces.append(block(arrays, part, count, i).ravel() / share)
    return np.concatenate(pieces)


def distances(arrays: dict[str, np.ndarray], group: Group, normalize: bool) -> np.ndarray:
    """Return D_ij = ||v_i - v_j||^2 by subtraction."""
    v = np.stack([vector(arrays, group, i, normalize) for i in range(len(group.members))])
    return np.square(v[:, None] - v[None, :]).sum(axis=2)


def merge(arrays: dict[str, np.ndarray], group: Group, m: int, n: int, scale: str) -> None:
    """Merge channels m and n; the result stands at the end."""
    channels = len(group.members)
    c_m, c_n = len(group.members[m]), len(group.members[n])
    for part in group.parts:
        one, two = block(arrays, part, channels, m), block(arrays, part, channels, n)
        mean = (c_m * one + c_n * two) / (c_m + c_n)
        if part.role == "column":
            new = mean if scale == "sum" else one + two
        elif part.role == "gain":
            new = mean
        else:
            new = one + two if scale == "sum" else mean
        width = arrays[part.array].shape[part.axis] // channels
        gone = [*range(m * width, (m + 1) * width), *range(n * width, (n + 1) * width)]
        rest = np.delete(arrays[part.array], gone, axis=part.axis)
        arrays[part.array] = np.concatenate([rest, new], axis=part.axis)
    joined = group.members[m] + group.members[n]
    group.members = [g for i, g in enumerate(group.members) if i not in (m, n)] + [joined]


def run(
    arrays: dict[str, np.ndarray],
    groups: list[Group],
    *,
    beta: float,
    max_ratio: float,
    reference: str = "initial",
    scale: str = "sum",
    normalize: bool = False,
) -> None:
    """Sweep over the groups, one merge each, until a whole sweep merges nothing."""
    maxima = [distances(arrays, g, normalize).max() for g in groups]
    progressed = True
    while progressed:
        progressed = False
        for group, first_maximum in zip(groups, maxima, strict=True):
            merged = group.size - len(group.members)
            if merged >= min(math.floor(max_ratio * group.size + 1e-9), group.size - 1):
                continue
            d = distances(arrays, group, normalize)
            m, n = min(
                ((i, j) for i in range(len(d)) for j in range(i + 1, len(d))), key=lambda pair: d[pair[0], pair[1]]
            )
            if d[m, n] <= beta * (first_maximum if reference == "initial" else d.max()):
                merge(arrays, group, m, n, scale)
                progressed = True
