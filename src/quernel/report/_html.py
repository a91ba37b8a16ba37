"""The report as one HTML page that needs nothing else: no network, no fonts, no libraries.

Style sheet and script are the package files ``page.css`` and ``page.js``. The page's content security policy admits
exactly these two, by hash, so even a name that slipped past escaping could not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from quernel.report import _units as units
from quernel.report._layer_section import layer_section, untouched_section
from quernel.report._markup import Markup, join, raw, tag
from quernel.report._trial_section import trial_section

if TYPE_CHECKING:
    from quernel.report._report import Report


def to_html(report: Report) -> str:
    """Return the page."""
    return whole_page(f"{report.title} · Quernel report", _body(report))


def whole_page(title: str, body: Markup, *, style: str = "") -> str:
    """Return a document around what stands in its body; ``style`` adds rules to the common sheet."""
    style, script = _package_text("page.css") + style, _package_text("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", raw(style)),
    )
    whole = tag("body", body, tag("div", id="tip", role="tooltip", hidden=True), tag("script", raw(script)))
    return f"<!doctype html>\n{tag('html', head, whole, lang='en')}\n"


def _body(report: Report) -> Markup:
    return join(
        tag(
            "header",
            tag("p", "Quernel report", class_="eyebrow"),
            tag("button", "Dark", id="theme", type="button", class_="script-only"),
            tag("h1", report.title),
            _headline(report),
        ),
        tag(
            "main",
            _how(report),
            trial_section(report) if report.trials else None,
            layer_section(report),
            untouched_section(report),
            _facts("summary", "Totals of the methods", report.summary),
            _facts("environment", "Measured on", report.environment),
        ),
        tag("footer", tag("p", _closing_line(report))),
    )


def _headline(report: Report) -> Markup:
    size, size_word = units.in_words(report.ratio, "smaller", "larger")
    speed: tuple[str, str] | None = None
    if report.speedup is not None:
        speed = units.in_words(report.speedup, "faster", "slower")
    change = None
    if report.metric_change is not None:
        change = units.format_metric(report.metric_change, signed=True, scale=report.metric_before)
    return tag(
        "dl",
        _figure(
            "Stored size",
            _factor(size, size_word),
            _from_to(report.bytes_before, report.bytes_after, units.format_bytes),
        ),
        _figure(
            "Latency",
            _factor(*speed) if speed else None,
            _from_to(report.latency_ms_before, report.latency_ms_after, units.format_ms),
            "median of paired ratios" if report.latency_speedup is not None else "",
        ),
        _figure(
            report.metric or "Metric",
            tag("span", minus(change), class_="big") if change else None,
            _from_to(report.metric_before, report.metric_after, units.format_metric),
            _interval(report),
        ),
        class_="figures",
    )


def _factor(number: str, word: str) -> Markup:
    if word == "unchanged":
        return tag("span", word, class_="big")
    return join(tag("span", f"{number}×", class_="big"), " ", tag("span", word, class_="word"))


def _figure(name: str, big: Markup | None, detail: Markup | None, note: str = "") -> Markup:
    return tag(
        "div",
        tag("dt", name),
        tag("dd", big or tag("span", units.NOT_MEASURED, class_="big none")),
        tag("dd", detail, class_="detail") if detail else None,
        tag("dd", note, class_="note") if note else None,
    )


def _from_to(before: Any, after: Any, form: Any) -> Markup | None:
    if before is None and after is None:
        return None
    return join(minus(form(before)), " → ", minus(form(after)))


def _interval(report: Report) -> str:
    if report.metric_interval is None:
        return ""
    low, high = (units.format_metric(v, signed=True, scale=report.metric_before) for v in report.metric_interval)
    return f"95 % interval {minus(low)} to {minus(high)}"


def minus(text: str) -> str:
    """Use the real minus sign in front of numbers."""
    return "−" + text[1:] if text.startswith("-") else text


def _how(report: Report) -> Markup:
    methods = tag("ol", *(tag("li", tag("code", method)) for method in report.methods), class_="methods")
    parts = [
        tag("h2", "How", id="how"),
        methods if report.methods else tag("p", "No method was applied."),
    ]
    if report.budget is not None:
        word, kind = {True: ("Budget met", "good"), False: ("Budget not met", "bad"), None: ("Budget", "plain")}[
            report.satisfied
        ]
        rest = units.format_budget(report.budget) + ("; this is the best found" if report.satisfied is False else "")
        parts.append(tag("p", tag("strong", word, class_=f"verdict {kind}"), " ", rest, "."))
    if report.warnings:
        parts.append(
            tag(
                "aside",
                tag("h3", f"{len(report.warnings)} warning{'s' * (len(report.warnings) != 1)}"),
                tag("ul", *(tag("li", warning) for warning in report.warnings)),
                class_="warnings",
                aria_label="Warnings",
            )
        )
    return tag("section", *parts, aria_labelledby="how")


def _facts(slug: str, title: str, values: Mapping[str, Any]) -> Markup | None:
    if not values:
        return None
    rows = (tag("div", tag("dt", name), tag("dd", units.format_scalar(value))) for name, value in values.items())
    return tag("section", tag("h2", title, id=slug), tag("dl", *rows, class_="facts"), aria_labelledby=slug)


def _closing_line(report: Report) -> str:
    took = f"The run took {units.format_seconds(report.seconds)}. " if report.seconds is not None else ""
    return took + "Sizes are bytes stored; 1 MB is 10⁶ bytes."


def _package_text(name: str) -> str:
    return resources.files("quernel.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
