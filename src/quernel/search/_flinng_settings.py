"""The settings of FLINNG: how many groups, which hash family, how many bytes, and what a sample of data asks for.

With p1 the probability that a near pair shares a code, p0 that a random pair does, N items and B groups: the count of a
group is about L (1 - (1 - p0)^(N / B)) by chance and L p1 more where a near item is in it. So the first must be small,
the second at least about ten, and R so large that N rho^R, the items that come up by chance, is far below one; rho is
the share of groups visited: that of the near item, and those that chance lifts above half of what it brings.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.hashing import LSHFamily, MinHash, PStable, Sets, SignProjection, pstable_probability
from quernel.search._group_tests import narrow
from quernel.search._rescore import KeptSets, KeptVectors

# Members that a group should have at most, and groups for the square root of N: the paper's default and its theory.
MEMBERS, PER_ROOT = 100, 4
# Hits that a near item should bring, members of a group that may share a code by chance, and the most tables.
HITS, CHANCE, MOST_TABLES = 10.0, 0.05, 255
# Other items that may be in a visited group of every repetition.
STRANGERS = 0.01
# What looking up one list costs, in cells counted: it is a miss of the cache.
_LOOKUP = 64.0


@dataclass(frozen=True)
class FlinngSettings:
    """What a sample suggests.

    Attributes
    ----------
    arguments : dict
        For the constructor of ``FlinngIndex``.
    near, far : float
        Probability that a near pair, and a random pair of the sample, share a code.
    near_count, far_count : float
        Tables in which the group of a near item is expected to be hit, and any other group.
    """

    arguments: dict[str, Any]
    near: float
    far: float
    near_count: float
    far_count: float


@dataclass(frozen=True)
class FlinngStats:
    """What an index looks like inside.

    Attributes
    ----------
    items, slots : int
        Items that can be found, and slots with those deleted.
    n_groups : int
        Groups of a repetition now.
    members : float
        Mean items of a group.
    entries : int
        Cells listed in all tables.
    longest_share : float
        The longest list of a table as a share of all cells. Near 1, a code says nothing: centre the data, or take more
        bits.
    waiting : int
        Items not sorted in yet.
    nbytes : int
        Bytes held.
    """

    items: int
    slots: int
    n_groups: int
    members: float
    entries: int
    longest_share: float
    waiting: int
    nbytes: int


def default_groups(n: int) -> int:
    """Return the groups of a repetition for ``n`` items: the next power of two from max(n / 100, min(n, 4 sqrt(n))).

    A function of the number of items alone, so that an index is the same however its items came; doubling only, so that
    all items change their groups a few times in its life.

    Examples
    --------
    >>> default_groups(200_000), default_groups(1000), default_groups(1)
    (2048, 128, 1)
    """
    wanted = max(n / MEMBERS, min(n, PER_ROOT * math.sqrt(n)), 1)
    return int(2 ** math.ceil(math.log2(wanted)))


def make_family(
    metric: str,
    dim: int | None,
    n_tables: int,
    bits: int,
    n_concat: int | None,
    width: float | None,
    directions: str,
    seed: int,
) -> LSHFamily | None:
    """Return the hash family of a metric, None where items are codes themselves."""
    for name, value, metrics in (("n_concat", n_concat, ("l2", "jaccard")), ("width", width, ("l2",))):
        if value is not None and metric not in metrics:
            raise QuernelError(
                f"{name} is for metric {' or '.join(map(repr, metrics))}; got {name}={value!r}, {metric!r}"
            )
    kind: Any = directions
    if metric == "cosine":
        return SignProjection(dim or 0, n_tables, bits, directions=kind, seed=seed)
    if metric == "jaccard":
        return MinHash(n_tables, 2 if n_concat is None else n_concat, 2**bits, seed=seed)
    if metric == "l2":
        if width is None:
            raise QuernelError(
                'width must be given for metric="l2": the size of a hash cell, a few times the distance of the pairs '
                "to find; FlinngIndex.suggest(sample, sim_near=distance, metric='l2') chooses one"
            )
        concat = 4 if n_concat is None else n_concat
        return PStable(dim or 0, n_tables, concat, width, 2**bits, directions=kind, seed=seed)
    return None


def index_bytes(n: int, n_rows: int, n_groups: int, n_tables: int, n_codes: int) -> int:
    """Return how many bytes an index of ``n`` items may take while it is sorted."""
    cell, group, code = narrow(n_rows * n_groups).itemsize, narrow(n_groups).itemsize, narrow(n_codes).itemsize
    an_item = n_tables * (code + n_rows * cell) + n_rows * (group + 4) + 9
    # Sorting holds the pairs of cell and item in order beside what it makes.
    sorting = n_rows * (8 + 4 + cell)
    return n * (an_item + sorting) + 8 * (n_tables * n_codes + n_rows * n_groups + 2)


def bytes_of(items: Any) -> int:
    """Return the bytes of vectors, sets or codes."""
    return items.offsets.nbytes + items.items.nbytes if isinstance(items, Sets) else int(items.nbytes)


def check_budget(
    n: int, n_rows: int, n_groups: int, n_tables: int, bits: int, kept: int, budget_bytes: int | None
) -> None:
    """Raise a ``QuernelError`` if ``n`` items and ``kept`` bytes of vectors do not fit."""
    if n >= 2**31:
        raise QuernelError(f"x would make {n} items; an index holds fewer than 2**31. Take several indexes")
    needed = index_bytes(n, n_rows, n_groups, n_tables, 2**bits) + kept
    budget = physical_memory() if budget_bytes is None else budget_bytes
    if budget is not None and needed > budget:
        what = "this machine's memory" if budget_bytes is None else "budget_bytes"
        raise QuernelError(
            f"x does not fit: {n} items with n_tables={n_tables}, bits={bits}, n_rows={n_rows} need about "
            f"{needed / 1e6:,.0f} MB, {what} is {budget / 1e6:,.0f} MB. Take fewer tables or bits, or several indexes"
        )


def physical_memory() -> int | None:
    """Return the bytes of this machine's memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def suggested(sample: Any, near: float, n: int | None, metric: str, dim: int | None, seed: int) -> FlinngSettings:
    """Return settings for ``n`` items like the sample, and queries at similarity or distance ``near``."""
    if len(sample) < 2:
        raise QuernelError(f"X_sample must hold at least 2 items; got {len(sample)}")
    n = check_int("n", len(sample) if n is None else n, low=1)
    kept: Any = KeptSets() if metric == "jaccard" else KeptVectors(dim or 0, metric)
    kept.append(sample)
    count = len(sample)
    pairs = kept.scores(sample, np.tile(np.arange(count), (count, 1)))[~np.eye(count, dtype=bool)]
    members = n / default_groups(n)
    # More codes than this, and the offsets of the lists outweigh the lists.
    most_bits = int(np.clip(math.floor(math.log2(max(n, 2) * 3 / 4)), 6, 20))
    best: tuple[tuple[bool, float], dict[str, Any], float, float, int] | None = None
    for arguments, chance, hashes in _choices(metric, near, most_bits):
        extra = 0.0 if metric == "cosine" else 2.0**-most_bits
        p1 = float(chance(np.asarray(near))) ** hashes
        p0 = float(np.mean(chance(pairs if metric != "l2" else -pairs) ** hashes)) + extra
        tables = min(MOST_TABLES, math.ceil(HITS / max(p1, 1e-9)))
        fits = members * p0 <= CHANCE and tables * p1 >= HITS - 1
        cost = tables * (_LOOKUP + 3 * n * p0) if fits else members * p0
        if best is None or (not fits, cost) < best[0]:
            best = (not fits, cost), arguments, p1, p0, tables
    if best is None:
        raise QuernelError(f"sim_near={near} leaves no setting to choose from")
    (unfit, _), arguments, p1, p0, tables = best
    if unfit:
        warnings.warn(
            f"no setting keeps random groups quiet: a group of {members:.0f} items shares a code with a query in "
            f"{members * p0:.2g} tables of one by chance. The items are too alike for sim_near={near}: (a) subtract "
            "their mean; (b) ask for closer pairs; (c) take another index",
            stacklevel=3,
        )
    lifted = 1 - (1 - min(p0, 1.0)) ** members
    # The near item's own group is visited too, and others stand in it.
    rho = float(binom.sf(math.ceil(tables * p1 / 2) - 1, tables, lifted)) + 1 / default_groups(n)
    rows = next((r for r in (2, 3) if n * rho**r <= STRANGERS), 4)
    given = {"dim": dim, "metric": metric, "n_rows": rows, "n_tables": tables, "seed": seed, **arguments}
    return FlinngSettings(given, p1, p0, tables * p1, tables * lifted)


def _choices(metric: str, near: float, bits: int) -> Iterator[tuple[dict[str, Any], Any, int]]:
    """Yield arguments, the collision probability of one hash, and how many hashes a code has."""
    if metric == "cosine":
        for k in range(4, bits + 1):
            yield {"bits": k}, lambda s: 1 - np.arccos(np.clip(s, -1, 1)) / np.pi, k
    elif metric == "jaccard":
        for k in range(1, 9):
            yield {"bits": bits, "n_concat": k}, lambda s: s, k
    else:
        for cells in (1.0, 2.0, 4.0, 8.0, 16.0):
            width = cells * near
            for k in range(1, 17):
                # A cell's width belongs to its law, hence the default argument.
                yield {"bits": bits, "n_concat": k, "width": width}, lambda d, w=width: pstable_probability(d, w), k
