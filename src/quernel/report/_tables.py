"""The report as text: one list of tables, three renderers (plain, Markdown, rich).

Headline numbers first, then what was tried, then the layers, then the rest. Plain text is ASCII, so that it
survives any terminal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quernel.report import _units as units

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quernel.report._report import LayerReport, Report, TrialReport


@dataclass(frozen=True)
class Table:
    """Cells as strings; ``right`` holds the indices of right-aligned columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()
    note: str = ""


def to_text(report: Report, max_layers: int | None) -> str:
    """Render as aligned plain text."""
    blocks = [_one_line(report.title)]
    for table in tables(report, max_layers):
        cells = [tuple(map(_one_line, row)) for row in ([table.header, *table.rows] if table.rows else [])]
        lines = [table.title] if table.title else []
        lines += ["  " + line for line in _aligned(cells, table.right)]
        lines += [f"  {_one_line(table.note)}"] if table.note else []
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def to_markdown(report: Report, max_layers: int | None) -> str:
    """Render as Markdown with pipe tables."""
    blocks = [f"# {_markdown_cell(report.title)}"]
    for table in tables(report, max_layers):
        if table.title:
            blocks.append(f"## {table.title}")
        if table.rows:
            rule = tuple("---:" if i in table.right else "---" for i in range(len(table.header)))
            rows = [tuple(map(_markdown_cell, row)) for row in table.rows]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (table.header, rule, *rows)))
        if table.note:
            blocks.append(_markdown_cell(table.note))
    return "\n\n".join(blocks) + "\n"


def to_rich(report: Report, max_layers: int | None) -> RenderableType:
    """Render as rich tables."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[RenderableType] = [Text(_one_line(report.title), style="bold")]
    for table in tables(report, max_layers):
        parts.append(Text(f"\n{table.title}" if table.title else "", style="bold"))
        if table.rows:
            grid = RichTable(box=None, pad_edge=False)
            for i, name in enumerate(table.header):
                # Numbers are never broken, so that on a narrow screen names and reasons give way.
                right = i in table.right
                grid.add_column(
                    name.replace(" ", "\n") if right else name,
                    justify="right" if right else "left",
                    header_style="dim",
                    overflow="fold",
                    no_wrap=right,
                )
            for row in table.rows:
                # Text, not str: a layer called "[red]" is a name, not console markup.
                grid.add_row(*(Text(_one_line(cell)) for cell in row))
            parts.append(grid)
        if table.note:
            parts.append(Text(_one_line(table.note), style="dim"))
    return Group(*parts)


def tables(report: Report, max_layers: int | None) -> list[Table]:
    """Return every table that has something to say; with ``max_layers`` long ones are shortened, trials too."""
    found = [_headline(report), _listing("Methods, in the order applied", "method", report.methods)]
    if report.budget is not None:
        verdict = {True: "met", False: "NOT met; this is the best found", None: "not judged"}[report.satisfied]
        found.append(Table("Budget", (), (), note=f"{units.format_budget(report.budget)}: {verdict}"))
    if report.warnings:
        found.append(_listing("Warnings", "warning", report.warnings))
    if report.trials:
        found += [_trials(report)] if max_layers is None else _short_trials(report)
    found.append(_layers(report, max_layers))
    for title, values in (("Summary", report.summary), ("Environment", report.environment)):
        if values:
            rows = tuple((name, units.format_scalar(value)) for name, value in values.items())
            found.append(Table(title, ("name", "value"), rows))
    if report.seconds is not None:
        found.append(Table("", (), (), note=f"The run took {units.format_seconds(report.seconds)}."))
    return list(map(_without_empty_columns, found))


def change_of_metric(report: Report) -> str:
    """Return the difference with its interval, or "not measured"."""
    change = report.metric_change
    if change is None:
        return units.NOT_MEASURED
    text = units.format_metric(change, signed=True, scale=report.metric_before)
    if report.metric_interval is not None:
        low, high = (units.format_metric(v, signed=True, scale=report.metric_before) for v in report.metric_interval)
        text += f" (95 % interval {low} to {high})"
    return text


def _headline(report: Report) -> Table:
    size = " ".join(units.in_words(report.ratio, "smaller", "larger"))
    speed = (
        units.NOT_MEASURED if report.speedup is None else " ".join(units.in_words(report.speedup, "faster", "slower"))
    )
    if report.latency_speedup is not None:
        speed += " (paired)"  # the median of ratios taken side by side, not the ratio of the two medians
    rows = (
        ("size", units.format_bytes(report.bytes_before), units.format_bytes(report.bytes_after), _times(size)),
        ("latency", units.format_ms(report.latency_ms_before), units.format_ms(report.latency_ms_after), _times(speed)),
        (
            report.metric or "metric",
            units.format_metric(report.metric_before),
            units.format_metric(report.metric_after),
            change_of_metric(report),
        ),
    )
    return Table("", ("measure", "before", "after", "change"), rows, frozenset({1, 2}))


def _without_empty_columns(table: Table) -> Table:
    kept = [i for i in range(len(table.header)) if any(row[i] for row in table.rows)]
    return Table(
        table.title,
        tuple(table.header[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in table.rows),
        frozenset(new for new, old in enumerate(kept) if old in table.right),
        table.note,
    )


def _times(words: str) -> str:
    """``"3.93 smaller"`` -> ``"3.93x smaller"``; "unchanged" stands alone."""
    number, _, word = words.partition(" ")
    return "unchanged" if word == "unchanged" else f"{number}x {word}" if number[:1].isdigit() else words


def _listing(title: str, what: str, items: Sequence[str]) -> Table:
    rows = tuple((str(i), item) for i, item in enumerate(items, 1))
    return Table(title, ("#", what), rows, frozenset({0}), "" if rows else "none")


def _trials(report: Report) -> Table:
    header = ("", "trial", "size", "share", "latency", report.metric or "metric", "status", "reason")
    note = "* chosen, + on the front"
    return Table("Tried", header, tuple(map(_trial_row, report.trials)), frozenset({2, 3, 4, 5}), note)


def _short_trials(report: Report) -> list[Table]:
    """Return those that came to something, and one line for all that failed for one reason."""
    full = _trials(report)
    kept = [i for i, trial in enumerate(report.trials) if trial.status == "ok"]
    dropped = {full.header.index("status")}
    note = full.note
    if all(report.trials[i].latency_ms is None for i in kept):
        dropped.add(full.header.index("latency"))
        note += "; latency not measured"
    columns = [i for i in range(len(full.header)) if i not in dropped]
    rows = tuple(tuple(full.rows[k][i] for i in columns) for k in kept)
    right = frozenset(new for new, old in enumerate(columns) if old in full.right)
    tried = Table(full.title, tuple(full.header[i] for i in columns), rows, right, note)
    groups: dict[tuple[str, str], list[TrialReport]] = {}
    for trial in report.trials:
        if trial.status != "ok":
            groups.setdefault((trial.status, _without_options(trial.reason)), []).append(trial)
    if not groups:
        return [tried]
    lines = tuple((status, _family(trials), reason) for (status, reason), trials in groups.items())
    count = len(report.trials) - len(kept)
    note = f"{count} trial{'s' if count != 1 else ''}; each of them is in the JSON and HTML forms"
    return [tried, Table("Tried in vain", ("status", "trial", "reason"), lines, note=note)]


def _family(trials: Sequence[TrialReport]) -> str:
    if len(trials) == 1:
        return trials[0].label
    names = {_without_options(trial.label) for trial in trials}
    return f"{names.pop() if len(names) == 1 else 'several'} ({len(trials)})"


def _without_options(text: str) -> str:
    """Return a text without what stands in parentheses: ``"Cast(dtype=float16) fails"`` -> ``"Cast fails"``."""
    return re.sub(r"\([^()]*\)", "", text)


def _trial_row(trial: TrialReport) -> tuple[str, ...]:
    share = units.NOT_MEASURED
    if trial.bytes_after is not None and trial.bytes_before is not None:
        share = units.format_percent(trial.bytes_after, trial.bytes_before)
    return (
        ("*" if trial.chosen else "") + ("+" if trial.on_front else ""),
        trial.label,
        units.format_bytes(trial.bytes_after),
        share,
        units.format_ms(trial.latency_ms),
        units.format_metric(trial.metric),
        trial.status,
        trial.reason,
    )


def _layers(report: Report, max_layers: int | None) -> Table:
    if not report.layers:
        return Table("Layers", (), (), note="no layer was reported")
    shown = report.layers if max_layers is None else report.layers[:max_layers]
    hidden = len(report.layers) - len(shown)
    header = ("layer", "kind", "action", "before", "after", "share", "relative error", "reason")
    note = f"{len(report.layers)} layers, {len(report.skipped)} left as they were"
    if hidden:
        note += f"; {hidden} more not shown here (the JSON and HTML forms have them all)"
    return Table("Layers", header, tuple(map(_layer_row, shown)), frozenset({3, 4, 5, 6}), note)


def _layer_row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        layer.action,
        units.format_bytes(layer.bytes_before),
        units.format_bytes(layer.bytes_after),
        units.format_percent(layer.bytes_after, layer.bytes_before),
        units.format_error(layer.relative_error),
        layer.reason,
    )


def _aligned(rows: Sequence[tuple[str, ...]], right: frozenset[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_cell(text: str) -> str:
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Underscores inside words are no emphasis, and layer names are full of them.
    return re.sub(r"([\\`*|\[\]#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
