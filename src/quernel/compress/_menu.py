"""What a budget search tries: every registered method's own menu first, then the best of them together.

Singles come from ``Method.menu()`` of all methods in the catalogue whose needs are met. Pairs and
triples join points of the fronts of what was measured, one method a stage, so a new method takes part
by being registered; only those that look best by their parts' numbers are run.
"""

from __future__ import annotations

import itertools
import math
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


def combinations(
    points: Sequence[Point],
    tried: Iterable[Candidate],
    whole: Point,
    *,
    drop: float | None = None,
    largest: int = 3,
    most: int = 12,
) -> list[Candidate]:
    """Return the most promising untried unions of points.

    A union uses each stage once, or by two methods of which the first reaches fewer kinds of layers and leaves the
    others to the second: linear layers by a calibrated method, then embeddings by rounding.

    Parts come from the front of each stage and reach, not of all points: a method that loses to another one alone
    may still save bytes beside it. Parts that save nothing are left out.

    The prediction is plain: shares of the bytes multiply, losses of the metric add up. Unions predicted to
    lose more than ``drop`` are left out. Of the others come first those that none is predicted to beat in both, then
    those that only these beat, and so on, each from the fewest bytes on; the last one that there is room for is
    sampled evenly.
    """
    seen = {_names(c) for c in tried}
    found: list[tuple[float, float, Candidate]] = []
    kinds = {_kind(point.candidate) for point in points}
    alike = [[p for p in points if _kind(p.candidate) == kind] for kind in sorted(kinds)]
    best = [
        point
        for group in alike
        for point in front(group)
        if point.bytes < whole.bytes and all(m.combines for m in point.candidate)
    ]
    for size in range(2, largest + 1):
        for group in itertools.combinations(best, size):
            joined = [m for point in group for m in point.candidate]
            candidate = tuple(sorted(joined, key=lambda m: (STAGES.index(m.stage), len(_plain(m)))))
            if not all(map(_leaves_work, candidate, candidate[1:])) or _names(candidate) in seen:
                continue
            seen.add(_names(candidate))
            loss = sum(_loss(point, whole) for point in group)
            if drop is None or loss <= drop:
                found.append((math.prod(point.bytes / whole.bytes for point in group), loss, candidate))
    return _by_fronts(found, most)


def _by_fronts(predicted: Sequence[tuple[float, float, Candidate]], most: int) -> list[Candidate]:
    """Choose among (share, loss, candidate): whole fronts, peeled off one after the other, while there is room."""
    chosen: list[Candidate] = []
    rest = sorted(predicted, key=lambda p: p[:2])
    while rest and len(chosen) < most:
        best: list[Candidate] = []
        beaten, least = [], math.inf
        for point in rest:
            if point[1] < least:
                least = point[1]
                best.append(point[2])
            else:
                beaten.append(point)
        room = most - len(chosen)
        if len(best) > room:
            best = [best[(len(best) - 1) * i // max(1, room - 1)] for i in range(room)]
        chosen += best
        rest = beaten
    return chosen


def _kind(candidate: Candidate) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the stage of each method and the kinds of layers it reaches."""
    return tuple((m.stage, tuple(sorted(t.__name__ for t in m.targets))) for m in candidate)


def _leaves_work(first: Method, second: Method) -> bool:
    """Whether ``second`` has layers of its own after ``first``; in one stage, methods skip each other's layers."""
    return first.stage != second.stage or _plain(first) < _plain(second)


def _plain(method: Method) -> frozenset[type]:
    """Return the kinds of torch's own layers that a method reaches; what other methods insert is a question apart."""
    return frozenset(t for t in method.targets if t.__module__.startswith("torch."))


def _loss(point: Point, whole: Point) -> float:
    # A part that gains by chance promises nothing to the others.
    return 0.0 if point.metric is None or whole.metric is None else max(0.0, whole.metric - point.metric)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both bytes and metric, smallest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -(p.metric or 0.0))):
        if not kept or (point.metric is not None and point.metric > (kept[-1].metric or float("-inf"))):
            kept.append(point)
    return kept


def _names(candidate: Candidate) -> frozenset[str]:
    return frozenset(m.label for m in candidate)
