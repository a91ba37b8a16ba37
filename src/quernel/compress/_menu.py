"""What a budget search tries: every registered method's own menu first, then the best of them together.

Singles come from ``Method.menu()`` of all methods in the catalogue whose needs are met. Pairs and
triples join points of the front of what was measured, one method a stage, so a new method takes part
by being registered.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quernel._registry import catalogue
from quernel.compress._compress import ordered
from quernel.compress._method import STAGES, Method

Candidate = tuple[Method, ...]


@dataclass(frozen=True)
class Point:
    """A measured candidate: file bytes and metric (None where not measured)."""

    candidate: Candidate
    bytes: int
    metric: float | None


def default_methods(have: frozenset[str]) -> list[Method]:
    """Return the menus of all registered methods whose needs are in ``have``."""
    entries = [e for e in catalogue() if e.contract == "method" and e.headline]
    menus = [m for e in entries if issubclass(cls := e.resolve(), Method) for m in cls.menu()]
    return [m for m in menus if m.needs <= have]


def singles(methods: Iterable[Method | Sequence[Method]]) -> list[Candidate]:
    """Return each method, or each ready-made list of methods, as a candidate in natural order."""
    return [tuple(ordered(m)) for m in methods]


def combinations(points: Sequence[Point], tried: Iterable[Candidate], largest: int = 3) -> list[Candidate]:
    """Return unions of front points that use each stage once and have not been tried."""
    seen = {_names(c) for c in tried}
    found = []
    for size in range(2, largest + 1):
        for group in itertools.combinations(front(points), size):
            joined = [m for point in group for m in point.candidate]
            stages = [m.stage for m in joined]
            candidate = tuple(sorted(joined, key=lambda m: STAGES.index(m.stage)))
            if len(set(stages)) == len(stages) and _names(candidate) not in seen:
                seen.add(_names(candidate))
                found.append(candidate)
    return found


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both bytes and metric, smallest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -(p.metric or 0.0))):
        if not kept or (point.metric is not None and point.metric > (kept[-1].metric or float("-inf"))):
            kept.append(point)
    return kept


def _names(candidate: Candidate) -> frozenset[str]:
    return frozenset(m.label for m in candidate)
