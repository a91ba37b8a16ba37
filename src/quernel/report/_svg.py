"""The two drawings of the page as inline SVG: the Pareto plot of a search and the heat map over the layers.

Colours come from classes of the page's style sheet, so both follow light and dark. Every point and every column
is a ``.mark`` whose ``<title>`` is its hover text; the page's script shows the same text in a tooltip and walks the
marks with the arrow keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quernel.report._axis import Axis, around, from_zero
from quernel.report._markup import Markup, join, tag


@dataclass(frozen=True)
class Point:
    """One trial in a view; ``x`` is a size or a time (smaller is better), ``y`` the metric (larger is better)."""

    x: float
    y: float
    label: str
    text: str
    chosen: bool = False
    original: bool = False


@dataclass(frozen=True)
class Frame:
    """What surrounds the points: pixels, titles and optional limits of the budget."""

    width: int
    height: int
    x_title: str
    y_title: str
    limit_x: float | None = None
    limit_y: float | None = None


@dataclass(frozen=True)
class Band:
    """One row of the heat map: a shade in [0, 1] for every layer, None where not measured."""

    name: str
    shades: tuple[float | None, ...]
    hue: str


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in both coordinates, by rising ``x``."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def pareto_plot(points: Sequence[Point], frame: Frame, best: Sequence[Point] | None = None) -> Markup:
    """Draw points, the front as a staircase, the budget's limits and the labels that matter.

    ``best`` are the points of the front where it is known already.
    """
    left, right, top, bottom = room(frame)
    x_axis = from_zero([p.x for p in points], left, right)
    y_axis = around([p.y for p in points], bottom, top)
    best = front(points) if best is None else sorted(best, key=lambda p: (p.x, p.y))
    ordered = sorted(points, key=lambda p: (p.x, p.y))
    return tag(
        "svg",
        tag("title", f"{frame.y_title} against {frame.x_title}: {len(points)} trials, {len(best)} on the front"),
        _grid(x_axis, y_axis, frame),
        _limits(x_axis, y_axis, frame),
        _staircase(best, x_axis, y_axis),
        *(_mark(point, point in best, i == 0, x_axis, y_axis) for i, point in enumerate(ordered)),
        *(_label(point, x_axis, y_axis, frame) for point in ordered if point.chosen or point.original),
        viewBox=f"0 0 {frame.width} {frame.height}",
        class_="plot",
        role="group",
        data_walk=True,
    )


def scatter_plot(points: Sequence[Point], frame: Frame, x_axis: Axis, y_axis: Axis) -> Markup:
    """Draw points over given axes and label those that are marked; ``room`` gives the pixels that axes may take."""
    ordered = sorted(points, key=lambda p: (p.x, p.y))
    return tag(
        "svg",
        tag("title", f"{frame.y_title} against {frame.x_title}: {len(points)} points"),
        _grid(x_axis, y_axis, frame),
        *(_mark(point, False, i == 0, x_axis, y_axis) for i, point in enumerate(ordered)),
        *(_label(point, x_axis, y_axis, frame) for point in ordered if point.chosen or point.original),
        viewBox=f"0 0 {frame.width} {frame.height}",
        class_="plot",
        role="group",
        data_walk=True,
    )


def room(frame: Frame) -> tuple[int, int, int, int]:
    """Return the pixels between which the points of a frame lie: left, right, top, bottom."""
    return 58, frame.width - 14, 34, frame.height - 48


def heat_map(bands: Sequence[Band], texts: Sequence[str], *, cell: int, row: int) -> Markup:
    """Draw one column a layer, one row a band; ``texts`` are the columns' hover texts."""
    height = row * len(bands)
    columns = (
        tag(
            "g",
            tag("title", text),
            *(_cell(band, i, cell, row, y) for y, band in enumerate(bands)),
            tag("rect", x=i * cell, y=0, width=cell, height=height, class_="ring"),
            class_="mark",
            tabindex=0 if i == 0 else -1,
            role="img",
        )
        for i, text in enumerate(texts)
    )
    every = 10 if len(texts) * cell > 150 else 1
    numbers = (
        tag("text", i + 1, x=i * cell + cell / 2, y=height + 15, class_="tick", text_anchor="middle")
        for i in range(len(texts))
        if i == 0 or (i + 1) % every == 0
    )
    width = max(len(texts) * cell, cell) + 12  # air for the last number
    return tag(
        "svg",
        tag("title", f"Heat map of {len(texts)} layers: {', '.join(band.name for band in bands)}"),
        *columns,
        *numbers,
        viewBox=f"0 0 {width} {height + 20}",
        width=width,
        height=height + 20,
        class_="heat",
        role="group",
        data_walk=True,
    )


def share_bar(share: float | None) -> Markup | None:
    """Draw which part of a layer's size is left."""
    if share is None:
        return None
    return tag(
        "svg",
        tag("rect", x=0, y=0, width=100, height=8, class_="bar-before"),
        tag("rect", x=0, y=0, width=100 * min(share, 1.0), height=8, class_="bar-after"),
        viewBox="0 0 100 8",
        class_="bar",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _grid(x_axis: Axis, y_axis: Axis, frame: Frame) -> Markup:
    left, right, bottom = x_axis.start, x_axis.stop, y_axis.start
    parts = [
        join(
            tag("line", x1=left, x2=right, y1=y_axis.at(value), y2=y_axis.at(value), class_="grid"),
            tag("text", text, x=left - 8, y=y_axis.at(value) + 4, class_="tick", text_anchor="end"),
        )
        for value, text in y_axis.ticks(5)
    ]
    parts += [
        join(
            tag("line", x1=x_axis.at(value), x2=x_axis.at(value), y1=bottom, y2=bottom + 5, class_="axis"),
            tag("text", text, x=x_axis.at(value), y=bottom + 19, class_="tick", text_anchor="middle"),
        )
        for value, text in x_axis.ticks(6 if frame.width > 500 else 4)
    ]
    return tag(
        "g",
        *parts,
        tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"),
        tag("text", frame.x_title, x=right, y=bottom + 40, class_="axis-title", text_anchor="end"),
        tag("text", frame.y_title, x=8, y=16, class_="axis-title"),
        aria_hidden="true",
    )


def _limits(x_axis: Axis, y_axis: Axis, frame: Frame) -> Markup:
    """Draw the limits that fall inside the frame; one beyond it excludes nothing."""
    parts = []
    if frame.limit_x is not None and frame.limit_x <= x_axis.high:
        x = x_axis.at(frame.limit_x)
        parts.append(tag("line", x1=x, x2=x, y1=y_axis.stop, y2=y_axis.start, class_="limit"))
    if frame.limit_y is not None and y_axis.low <= frame.limit_y <= y_axis.high:
        y = y_axis.at(frame.limit_y)
        parts.append(tag("line", x1=x_axis.start, x2=x_axis.stop, y1=y, y2=y, class_="limit"))
    return tag("g", *parts, aria_hidden="true")


def _staircase(best: Sequence[Point], x_axis: Axis, y_axis: Axis) -> Markup | None:
    """Between two points of the front one still has the worse metric, hence steps, not slopes."""
    if not best:
        return None
    first = best[0]
    path = f"M{x_axis.at(first.x):.1f} {y_axis.at(first.y):.1f}"
    path += "".join(f"H{x_axis.at(p.x):.1f}V{y_axis.at(p.y):.1f}" for p in best[1:])
    return tag("path", d=path + f"H{x_axis.stop:.1f}", class_="front", aria_hidden="true")


def _mark(point: Point, on_front: bool, first: bool, x_axis: Axis, y_axis: Axis) -> Markup:
    x, y = x_axis.at(point.x), y_axis.at(point.y)
    kind = "chosen" if point.chosen else "original" if point.original else "on-front" if on_front else "behind"
    size = 7
    shape = (
        tag("rect", x=x - size / 1.3, y=y - size / 1.3, width=2 * size / 1.3, height=2 * size / 1.3, class_="dot")
        if point.original
        else tag("circle", cx=x, cy=y, r=size if point.chosen else 5, class_="dot")
    )
    return tag(
        "g",
        tag("title", point.text),
        tag("circle", cx=x, cy=y, r=12, class_="ring"),
        shape,
        class_=f"mark {kind}",
        tabindex=0 if first else -1,
        role="img",
    )


def _label(point: Point, x_axis: Axis, y_axis: Axis, frame: Frame) -> Markup:
    x, y = x_axis.at(point.x), y_axis.at(point.y)
    text = point.label if len(point.label) <= 26 else point.label[:25] + "…"
    anchor = "end" if x > 0.6 * frame.width else "start"
    return tag(
        "text",
        text,
        x=x + (-12 if anchor == "end" else 12),
        y=y + 20 if point.original else y - 11,  # the two that are labelled keep apart
        class_="label",
        text_anchor=anchor,
        aria_hidden="true",
    )


def _cell(band: Band, column: int, cell: int, row: int, y: int) -> Markup:
    shade = band.shades[column]
    return tag(
        "rect",
        x=column * cell + 0.5,
        y=y * row + 1,
        width=cell - 1,
        height=row - 4,
        class_="cell missing" if shade is None else f"cell {band.hue}",
        # The palest shade must still be seen as a cell.
        fill_opacity=None if shade is None else 0.08 + 0.92 * shade,
    )
