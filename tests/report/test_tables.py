"""Plain text, Markdown and rich: the numbers are there, nothing is invented, long tables say what they leave out."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from quernel.report import LayerReport, Report, TrialReport


@pytest.fixture(scope="module")
def bare() -> Report:
    return Report("bare", (), 1000, 1000)


def test_text_starts_with_the_headline(report: Report) -> None:
    lines = [" ".join(line.split()) for line in report.table().splitlines()]
    assert lines[2:6] == [
        "measure before after change",
        "size 90.0 MB 30.0 MB 3.00x smaller",
        "latency 300 ms 100 ms 3.10x faster (paired)",
        "spearman 0.8200 0.8196 -0.0004 (95 % interval -0.0012 to +0.0004)",
    ]
    assert "size at most 50 % of before, metric drop at most 0.01: met" in report.table()
    assert "14 layers, 2 left as they were" in report.table()
    assert "The run took 1 min 23 s." in report.table()
    assert str(report) == report.table()


def test_columns_are_aligned(bare: Report) -> None:
    layers = [LayerReport("a" * n, "Linear", "int8", "because", 10**n, 10, 0.1) for n in (1, 5, 9)]
    report = Report.from_dict(bare.to_dict() | {"layers": [layer.to_dict() for layer in layers]})
    rows = report.table().split("Layers\n")[1].splitlines()[:4]
    assert {row.index("because") for row in rows[1:]} == {rows[0].index("reason")}
    assert len({row.rindex(" B ") for row in rows[1:]}) == 1  # the right-aligned sizes after


def test_what_was_not_measured_is_said_everywhere(bare: Report) -> None:
    for text in (bare.table(), bare.to_markdown(), bare.to_html()):
        assert text.count("not measured") >= 2
    assert "unchanged" in bare.table()
    assert "nan" not in bare.table().lower()
    assert "None" not in bare.table()


def test_growing_and_slowing_down_are_said_plainly() -> None:
    report = Report("t", (), 1000, 2000, 10.0, 30.0)
    assert "2.00x larger" in report.table()
    assert "3.00x slower" in report.table()
    assert "2.00×" in report.to_html()


def test_long_tables_say_what_they_leave_out(bare: Report) -> None:
    layers = [LayerReport(f"layer.{i}", "Linear", "int8").to_dict() for i in range(500)]
    report = Report.from_dict(bare.to_dict() | {"layers": layers})
    assert "layer.39 " in report.table()
    assert "layer.40 " not in report.table()
    assert "460 more not shown here" in report.table()
    assert "layer.499" in report.table(max_layers=None)
    assert "layer.499" in report.to_markdown()


def test_unmet_budget_is_loud() -> None:
    report = Report("t", (), 1000, 900, budget={"bytes": 0.3}, satisfied=False)
    assert "NOT met; this is the best found" in report.table()
    assert "Budget not met" in report.to_html()


def test_trials_show_choice_front_and_failures(report: Report) -> None:
    rows = [" ".join(row.split()) for row in report.table(max_layers=None).split("Tried\n")[1].splitlines()]
    assert any(row.startswith("*+ int8 + bf16 30.0 MB 33.3 % 100 ms 0.8196 ok") for row in rows)
    assert any("pruned hopeless" in row for row in rows)
    assert any("failed metric came out as nan" in row for row in rows)


def test_on_screen_trials_that_failed_alike_share_a_line(report: Report) -> None:
    def failing(i: int, label: str, reason: str) -> TrialReport:
        return TrialReport(f"f{i}", label, status="failed", reason=reason)

    more = [failing(i, f"Sparse(rate=0.{i})", f"Sparse(rate=0.{i}) changes nothing") for i in range(5)]
    more += [
        failing(8, "A(x=1) + B", "B gave up"),
        failing(9, "C + B", "B gave up"),
        failing(10, "D(y=2)", "D(y=2) fell"),
    ]
    searched = replace(report, trials=(*report.trials, *more))
    text = searched.table()
    rows = [" ".join(row.split()) for row in text.split("Tried in vain\n")[1].split("\n\n")[0].splitlines()]
    assert "failed Sparse (5) Sparse changes nothing" in rows
    assert "failed several (2) B gave up" in rows
    assert "failed D(y=2) D fell" in rows
    assert "pruned merge less hopeless" in rows
    assert "10 trials; each of them is in the JSON and HTML forms" in rows
    kept = text.split("Tried\n")[1].split("\n\n")[0]
    assert "failed" not in kept and "*+  int8 + bf16" in kept and "300 ms" in kept
    for whole in (searched.to_html(), searched.to_json(), searched.table(max_layers=None), searched.to_markdown()):
        assert all(f"rate=0.{i}" in whole for i in range(5))


def test_latency_that_was_never_measured_is_said_once() -> None:
    trials = tuple(TrialReport(str(i), f"t{i}", ("A()",), 10, i + 1, None, i / 10) for i in range(3))
    text = Report("t", (), 10, 5, trials=trials).table().split("Tried\n")[1].split("\n\n")[0]
    assert text.count("not measured") == 1 and "latency not measured" in text


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_are_not_broken_on_a_narrow_screen(report: Report, width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(report)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    layers = " ".join(out.getvalue().split("Layers\n")[1].split())
    assert "400 KB 101 KB 25.2 %" in layers


def test_markdown_tables_survive_hostile_names() -> None:
    layer = LayerReport("a|b<i>_x_\n`*[l](u)", "Linear", "int8")
    text = Report("t <script>", (), 1, 1, layers=(layer,)).to_markdown()
    row = next(line for line in text.splitlines() if "Linear" in line)
    header = next(line for line in text.splitlines() if "kind" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", header))
    assert r"a\|b&lt;i&gt;\_x\_ \`\*\[l\](u)" in row
    assert "<script>" not in text
    assert r"snake_case" in Report("snake_case", (), 1, 1).to_markdown()


def test_markdown_rows_match_their_headers(report: Report) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", report.to_markdown(), flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert report._repr_markdown_().startswith("# encoder")


def test_rich_shows_the_same_cells(report: Report) -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=200)
    console.print(report)
    shown = " ".join(console.file.getvalue().split())
    for text in ("3.00x smaller", "int8 + bf16", "encoder.layer.11.dense", "holds no matrix", "rank 1", "Budget"):
        assert text in shown


def test_rich_takes_names_literally() -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=200)
    console.print(Report("[red]x", (), 1, 1, trials=(TrialReport("k", "[/bold]"),)))
    assert "[red]x" in console.file.getvalue()
    assert "[/bold]" in console.file.getvalue()
