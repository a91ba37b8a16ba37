"""The page of an index: recall against throughput, measured, and what the index is.

Each point is one setting, answered and timed on the same queries; the exact index stands among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quernel.report import _units as units
from quernel.report._axis import around, by_powers
from quernel.report._html import whole_page
from quernel.report._html_table import Cell, Column, html_row, html_table
from quernel.report._markup import Markup, join, tag
from quernel.report._svg import Frame, Point, room, scatter_plot

# As on the other page: wide for desks, narrow for phones; the style sheet shows one.
SIZES = (("wide", 960, 430), ("narrow", 360, 330))


@dataclass(frozen=True)
class RecallPoint:
    """One setting of an index: which share of the queries it answers right, and how many a second."""

    label: str
    recall: float
    per_second: float
    nbytes: int
    exact: bool = False
    chosen: bool = False


def recall_page(
    title: str, what: str, points: Sequence[RecallPoint], facts: Mapping[str, Any], machine: Mapping[str, Any]
) -> str:
    """Return the page; ``what`` says how recall was measured."""
    body = join(
        tag(
            "header",
            tag("p", "Quernel index", class_="eyebrow"),
            tag("button", "Dark", id="theme", type="button", class_="script-only"),
            tag("h1", title),
        ),
        tag(
            "main",
            tag(
                "section",
                tag("h2", "Recall and throughput", id="recall"),
                tag("p", what, " Up and to the right is better.", class_="lead"),
                tag("figure", *(tag("div", _plot(points, w, h), class_=size) for size, w, h in SIZES)),
                _table(points),
                aria_labelledby="recall",
            ),
            _facts("index", "The index", facts),
            _facts("environment", "Measured on", machine),
        ),
    )
    return whole_page(f"{title} · Quernel index", body)


def _plot(points: Sequence[RecallPoint], width: int, height: int) -> Markup:
    frame = Frame(width, height, "recall: nearest item first", "queries a second")
    left, right, top, bottom = room(frame)
    x_axis = around([p.recall for p in points], left, right)
    y_axis = by_powers([p.per_second for p in points], bottom, top)
    marks = [Point(p.recall, p.per_second, p.label, "\n".join(_lines(p)), p.chosen, p.exact) for p in points]
    return scatter_plot(marks, frame, x_axis, y_axis)


def _lines(point: RecallPoint) -> list[str]:
    return [
        point.label,
        f"recall {units.format_metric(point.recall)}",
        f"{point.per_second:,.0f} queries a second",
        f"size {units.format_bytes(point.nbytes)}",
    ]


def _table(points: Sequence[RecallPoint]) -> Markup:
    columns = (
        Column("Setting"),
        Column("Recall", numeric=True),
        Column("Queries a second", numeric=True),
        Column("Size", numeric=True),
    )
    rows = (
        html_row(
            columns,
            [
                Cell(p.label, p.label),
                Cell(units.format_metric(p.recall), p.recall),
                Cell(f"{p.per_second:,.0f}", p.per_second),
                Cell(units.format_bytes(p.nbytes), p.nbytes),
            ],
            class_="chosen" if p.chosen else "",
        )
        for p in points
    )
    return html_table("Every setting that was measured", columns, rows, slug="settings")


def _facts(slug: str, title: str, values: Mapping[str, Any]) -> Markup:
    rows = (tag("div", tag("dt", name), tag("dd", units.format_scalar(value))) for name, value in values.items())
    return tag("section", tag("h2", title, id=slug), tag("dl", *rows, class_="facts"), aria_labelledby=slug)
