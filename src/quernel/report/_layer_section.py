"""The sections of the page about layers: heat map, filterable table, and what was left as it was and why."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from quernel.report import _units as units
from quernel.report._html_table import Cell, Column, html_row, html_table
from quernel.report._markup import Markup, breakable, join, tag
from quernel.report._svg import Band, heat_map, share_bar

if TYPE_CHECKING:
    from quernel.report._report import LayerReport, Report

#: Pixels of the heat map: a finger or a pointer must hit one column, and short models should fill the line.
LINE, MIN_CELL, MAX_CELL, ROW = 960, 11, 44, 40
COLUMNS = (
    Column("Layer"),
    Column("Kind"),
    Column("Action"),
    Column("Before", numeric=True),
    Column("After", numeric=True),
    Column("Share", numeric=True),
    Column("Relative error", numeric=True),
    Column("Notes"),
)


def layer_section(report: Report) -> Markup:
    """Return heat map and table of the layers."""
    title = tag("h2", "Layer by layer", id="layers-title")
    if not report.layers:
        return tag("section", title, tag("p", "No layer was reported."), aria_labelledby="layers-title")
    rows = map(_row, report.layers)
    return tag(
        "section",
        title,
        tag("p", "Columns follow the order of the model; stronger colour is more.", class_="lead"),
        _heat(report.layers),
        _filters(report),
        html_table("What happened to each layer", COLUMNS, rows, slug="layers"),
        aria_labelledby="layers-title",
    )


def untouched_section(report: Report) -> Markup | None:
    """Return the layers left as they were, grouped by reason."""
    if not report.skipped:
        return None
    groups: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in report.skipped:
        groups[layer.reason or "no reason was recorded"].append(layer)
    items = (
        tag(
            "details",
            tag("summary", reason, " ", tag("span", len(layers), class_="count")),
            tag("ul", *(tag("li", tag("code", layer.name)) for layer in layers)),
        )
        for reason, layers in sorted(groups.items(), key=lambda item: -len(item[1]))
    )
    return tag("section", tag("h2", "Left as they were, and why", id="untouched"), *items, aria_labelledby="untouched")


def _heat(layers: tuple[LayerReport, ...]) -> Markup:
    cell = min(max(LINE // len(layers), MIN_CELL), MAX_CELL)
    left = tuple(min(1.0, layer.bytes_after / layer.bytes_before) if layer.bytes_before else None for layer in layers)
    bands, tops = [Band("Size left", left, "size")], ["100 %"]
    errors = [layer.relative_error for layer in layers]
    times = [_latency(layer) for layer in layers]
    for name, values, hue, form in (
        ("Relative error", errors, "error", units.format_error),
        ("Latency", times, "time", units.format_ms),
    ):
        top = max((value for value in values if value is not None), default=None)
        if top is not None:
            shades = tuple(None if value is None else (value / top if top else 0.0) for value in values)
            bands.append(Band(name, shades, hue))
            tops.append(form(top))
    names = tag("div", *(tag("span", band.name) for band in bands), class_="bands", aria_hidden="true")
    drawing = heat_map(bands, [_text(layer) for layer in layers], cell=cell, row=ROW)
    keys = [_key(band, top) for band, top in zip(bands, tops, strict=True)]
    if any(shade is None for band in bands for shade in band.shades):
        hatch = tag(
            "svg", tag("rect", width=16, height=16, class_="cell missing"), viewBox="0 0 16 16", class_="swatch"
        )
        keys.append(tag("span", hatch, units.NOT_MEASURED))
    return tag(
        "figure",
        tag("div", names, tag("div", drawing, class_="strip", tabindex=-1), class_="heat-grid"),
        tag("figcaption", *keys, class_="legend"),
    )


def _key(band: Band, top: str) -> Markup:
    steps = (
        tag("rect", x=12 * i, y=0, width=12, height=16, class_=f"cell {band.hue}", fill_opacity=0.08 + 0.92 * i / 4)
        for i in range(5)
    )
    ramp = tag("svg", *steps, viewBox="0 0 60 16", class_="ramp", aria_hidden="true")
    return tag("span", f"{band.name}: 0 ", ramp, f" {top}")


def _filters(report: Report) -> Markup:
    untouched = len(report.skipped)
    choices = (
        ("all", f"All {len(report.layers)}"),
        ("changed", f"Changed {len(report.layers) - untouched}"),
        ("untouched", f"Left as they were {untouched}"),
    )
    buttons = (
        tag("button", text, type="button", data_filter=name, aria_pressed="true" if name == "all" else "false")
        for name, text in choices
    )
    return tag(
        "div",
        tag("div", *buttons, class_="switch", role="group", aria_label="Which layers to list"),
        tag(
            "input",
            type="search",
            id="find",
            placeholder="Find a layer",
            aria_label="Find a layer by name, kind or action",
        ),
        tag("span", f"{len(report.layers)} shown", id="shown", role="status"),
        class_="filters script-only",
    )


def _row(layer: LayerReport) -> Markup:
    details = ", ".join(f"{name} {units.format_scalar(value)}" for name, value in layer.details.items())
    notes = join(
        tag("span", layer.reason, class_="reason") if layer.reason else None,
        tag("span", details, class_="details") if details else None,
    )
    left = layer.bytes_after / layer.bytes_before if layer.bytes_before else None
    cells = [
        Cell(breakable(layer.name), layer.name),
        Cell(layer.kind, layer.kind),
        Cell(tag("span", layer.action, class_="tag"), layer.action),
        Cell(units.format_bytes(layer.bytes_before), layer.bytes_before),
        Cell(units.format_bytes(layer.bytes_after), layer.bytes_after),
        Cell(join(units.format_percent(layer.bytes_after, layer.bytes_before), share_bar(left)), left),
        Cell(units.format_error(layer.relative_error), layer.relative_error),
        Cell(notes, f"{layer.reason} {details}".strip() or None),
    ]
    search = f"{layer.name} {layer.kind} {layer.action}".lower()
    return html_row(COLUMNS, cells, class_="untouched" if layer.untouched else "", search=search)


def _text(layer: LayerReport) -> str:
    before, after = units.format_bytes(layer.bytes_before), units.format_bytes(layer.bytes_after)
    lines = [
        layer.name,
        f"{layer.kind}: {layer.action}",
        f"{before} → {after} ({units.format_percent(layer.bytes_after, layer.bytes_before)})",
        f"relative error {units.format_error(layer.relative_error)}",
    ]
    if (latency := _latency(layer)) is not None:
        lines.append(f"latency {units.format_ms(latency)}")
    if layer.reason:
        lines.append(layer.reason)
    return "\n".join(lines)


def _latency(layer: LayerReport) -> float | None:
    value = layer.details.get("latency_ms")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
