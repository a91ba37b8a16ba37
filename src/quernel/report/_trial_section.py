"""The section of the page about what a search tried: Pareto plot in two views, legend and table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quernel.report import _units as units
from quernel.report._html_table import Cell, Column, html_row, html_table
from quernel.report._markup import Markup, join, tag
from quernel.report._svg import Frame, Point, front, pareto_plot

if TYPE_CHECKING:
    from quernel.report._report import Report, TrialReport

#: Wide for desks, narrow for phones: text keeps its size in both. The style sheet shows one.
#: Beyond this, differences between values overflow.
DRAWABLE = 1e300
SIZES = (("wide", 960, 430), ("narrow", 360, 330))


def trial_section(report: Report) -> Markup:
    """Return plot and table of the trials."""
    total = len(report.trials)
    counts = [f"{sum(t.status == status for t in report.trials)} {status}" for status in ("ok", "failed", "pruned")]
    views = [view for view in (_view(report, "size"), _view(report, "latency")) if view is not None]
    if views:
        drawing = join(_switch() if len(views) > 1 else None, *views)
    else:
        drawing = tag("p", "No trial has both a size and a metric, so there is no front to draw.")
    return tag(
        "section",
        tag("h2", "What was tried", id="tried"),
        tag(
            "p",
            f"{total} configuration{'s' * (total != 1)}: {', '.join(counts)}. Up and to the left is better.",
            class_="lead",
        ),
        drawing,
        _table(report),
        aria_labelledby="tried",
    )


def _switch() -> Markup:
    return tag(
        "div",
        tag("button", "By size", type="button", data_show="size", aria_pressed="true"),
        tag("button", "By latency", type="button", data_show="latency", aria_pressed="false"),
        class_="switch script-only",
        role="group",
        aria_label="Horizontal axis of the plot",
    )


def _view(report: Report, view: str) -> Markup | None:
    if view == "size":
        unit = units.byte_unit(max((t.bytes_after or 0 for t in report.trials), default=0))
        title, scale = f"stored size ({units.BYTE_UNITS[unit]})", 1000.0**unit
    else:
        title, scale = "latency (ms)", 1.0
    points, marked = [], []
    for trial in report.trials:
        x = trial.bytes_after if view == "size" else trial.latency_ms
        if trial.status != "ok" or trial.metric is None or x is None:
            continue
        if x < DRAWABLE and abs(trial.metric) < DRAWABLE:
            points.append(_point(trial, x / scale, trial.metric, report.metric or "metric"))
            if trial.on_front:
                marked.append(points[-1])
    if not points:
        return None
    # The trials' own mark is about sizes, and the table shows it; the front by latency is another one.
    best = marked if view == "size" else front(points)
    limit_x, limit_y = _limits(report, view, scale)
    name = report.metric or "metric"
    plots = (
        tag("div", pareto_plot(points, Frame(width, height, title, name, limit_x, limit_y), best), class_=size)
        for size, width, height in SIZES
    )
    legend = _legend(points, best, limit_x is not None or limit_y is not None)
    return tag("figure", *plots, legend, data_view=view)


def _point(trial: TrialReport, x: float, y: float, metric: str) -> Point:
    lines = [
        trial.label,
        " → ".join(trial.methods) or "the untouched model",
        f"size {units.format_bytes(trial.bytes_after)}",
        f"latency {units.format_ms(trial.latency_ms)}",
        f"{metric} {units.format_metric(y)}",
    ]
    if trial.chosen:
        lines.append("chosen")
    return Point(x, y, trial.label, "\n".join(lines), trial.chosen, not trial.methods)


def _limits(report: Report, view: str, scale: float) -> tuple[float | None, float | None]:
    """Return the budget's limits in plot units; relative ones need the untouched model among the trials."""
    budget = report.budget or {}
    original = next((t for t in report.trials if not t.methods and t.status == "ok"), None)
    limit_x: float | None = None
    if view == "latency":
        limit_x = _number(budget.get("latency_ms"))
    elif isinstance(budget.get("bytes"), float):
        before = next((t.bytes_before for t in report.trials if t.bytes_before is not None), report.bytes_before)
        limit_x = float(budget["bytes"] or 0.0) * before / scale
    elif (count := _number(budget.get("bytes"))) is not None:
        limit_x = count / scale
    drop = _number(budget.get("drop"))
    limit_y = original.metric - drop if original and original.metric is not None and drop is not None else None
    return limit_x, limit_y


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _legend(points: list[Point], best: list[Point], limits: bool) -> Markup:
    entries = [
        ("chosen", "chosen", any(p.chosen for p in points)),
        ("original", "untouched model", any(p.original for p in points)),
        ("on-front", "on the front", any(not (p.chosen or p.original) for p in best)),
        ("behind", "behind the front", any(p not in best and not (p.chosen or p.original) for p in points)),
        ("limit", "limit of the budget", limits),
    ]
    return tag("figcaption", *(_legend_entry(kind, text) for kind, text, shown in entries if shown), class_="legend")


def _legend_entry(kind: str, text: str) -> Markup:
    if kind == "limit":
        shape = tag("line", x1=0, x2=16, y1=8, y2=8, class_="limit")
    elif kind == "original":
        shape = tag("rect", x=3, y=3, width=10, height=10, class_="dot")
    else:
        shape = tag("circle", cx=8, cy=8, r=6 if kind == "chosen" else 4.5, class_="dot")
    swatch = tag("svg", tag("g", shape, class_=kind), viewBox="0 0 16 16", class_="swatch", aria_hidden="true")
    return tag("span", swatch, text)


def _table(report: Report) -> Markup:
    columns = (
        Column("Trial"),
        Column("Methods"),
        Column("Size", numeric=True),
        Column("Share", numeric=True),
        Column("Latency", numeric=True),
        Column(report.metric or "Metric", numeric=True),
        Column("Outcome"),
    )
    rows = (html_row(columns, _cells(trial), class_="chosen" if trial.chosen else "") for trial in report.trials)
    return html_table("Every configuration that was tried", columns, rows, slug="trials")


def _cells(trial: TrialReport) -> list[Cell]:
    share, left = units.NOT_MEASURED, None
    if trial.bytes_after is not None and trial.bytes_before:
        share, left = (
            units.format_percent(trial.bytes_after, trial.bytes_before),
            trial.bytes_after / trial.bytes_before,
        )
    tags = [tag("span", word, class_="tag") for word, on in (("chosen", trial.chosen), ("front", trial.on_front)) if on]
    outcome = join(*tags) if trial.status == "ok" else tag("span", trial.status, class_="tag bad")
    methods = join(*(tag("code", method) for method in trial.methods)) if trial.methods else "untouched"
    return [
        Cell(trial.label, trial.label),
        Cell(methods, " ".join(trial.methods)),
        Cell(units.format_bytes(trial.bytes_after), trial.bytes_after),
        Cell(share, left),
        Cell(units.format_ms(trial.latency_ms), trial.latency_ms),
        Cell(units.format_metric(trial.metric), trial.metric),
        Cell(join(outcome, tag("span", trial.reason, class_="reason") if trial.reason else None), trial.status),
    ]
