"""The page of ``quernel advise``: what the theory says of a design, with K and fluctuations drawn by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quernel.report import _units as units
from quernel.report._curves import chart
from quernel.report._html import whole_page
from quernel.report._html_table import Cell, Column, html_row, html_table
from quernel.report._markup import Markup, join, raw, tag

Curves = Mapping[str, Sequence[tuple[float, float]]]


def advice_page(
    title: str,
    facts: Mapping[str, Any],
    kernels: Curves,
    fluctuations: Curves,
    rates: Sequence[tuple[int, float, float]],
    warnings: Sequence[str],
    machine: Mapping[str, Any],
) -> str:
    """Return the page; curves are points (layer, value), rates are (layer, bias, weight)."""
    body = join(
        tag(
            "header",
            tag("p", "Quernel advice", class_="eyebrow"),
            tag("button", "Dark", id="theme", type="button", class_="script-only"),
            tag("h1", title),
        ),
        tag(
            "main",
            _facts("diagnosis", "Diagnosis", facts),
            _warnings(warnings) if warnings else None,
            _figure(
                "kernel",
                "Size of signals",
                "Variance K of preactivations in each layer, at the critical initialisation.",
                kernels,
                "K",
            ),
            _figure(
                "fluctuations",
                "What seeds will differ by",
                "Variance of K over random weights, relative to its square: V / (n K²), and nu l / n beside it. "
                "Near 1 the outcome of a seed is chance.",
                fluctuations,
                "relative variance",
            ),
            _rates(rates) if rates else None,
            _facts("environment", "Made with", machine),
        ),
        tag("footer", tag("p", "Predicted from the architecture alone; nothing was trained.")),
    )
    return whole_page(f"{title} · Quernel advice", body)


def _figure(slug: str, title: str, what: str, curves: Curves, name: str) -> Markup | None:
    """Draw curves with more than one point above 0; both axes are logarithmic."""
    shown = {key: [(x, y) for x, y in curve if y > 0] for key, curve in curves.items()}
    shown = {key: curve for key, curve in shown.items() if len(curve) > 1}
    if not shown:
        return None
    return tag(
        "section",
        tag("h2", title, id=slug),
        tag("p", what, class_="lead"),
        tag("figure", raw(chart(shown, "layer", name))),
        aria_labelledby=slug,
    )


def _warnings(warnings: Sequence[str]) -> Markup:
    return tag(
        "aside",
        tag("h3", f"{len(warnings)} warning{'s' * (len(warnings) != 1)}"),
        tag("ul", *(tag("li", warning) for warning in warnings)),
        class_="warnings",
        aria_label="Warnings",
    )


def _rates(rates: Sequence[tuple[int, float, float]]) -> Markup:
    columns = (Column("Layer"), Column("Biases", numeric=True), Column("Weights, before 1 / fan-in", numeric=True))
    rows = (
        html_row(
            columns, [Cell(layer, float(layer)), Cell(f"{bias:.4g}", float(bias)), Cell(f"{weight:.4g}", float(weight))]
        )
        for layer, bias, weight in rates
    )
    return tag(
        "section",
        tag("h2", "Learning rates", id="rates"),
        tag("p", "Times eta, for gradient descent. Adam needs 1 / depth alone.", class_="lead"),
        html_table("Multiplier of the learning rate by layer", columns, rows, slug="rates-by-layer"),
        aria_labelledby="rates",
    )


def _facts(slug: str, title: str, values: Mapping[str, Any]) -> Markup:
    rows = (tag("div", tag("dt", name), tag("dd", units.format_scalar(value))) for name, value in values.items())
    return tag("section", tag("h2", title, id=slug), tag("dl", *rows, class_="facts"), aria_labelledby=slug)
