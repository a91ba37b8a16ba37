"""The page as text: self-contained, escaped, accessible, complete; what it does in a browser is in test_browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from quernel.report import LayerReport, Report, TrialReport

VOID = {"meta", "link", "input", "wbr"}
MIN_TEXT_CONTRAST = 4.5  # WCAG 2 AA, text
MIN_SHAPE_CONTRAST = 3.0  # WCAG 2 AA, graphics


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data + " "


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return report.to_html()


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_markup_is_well_formed(outline: Outline) -> None:
    assert outline.open == []
    ids = [a["id"] for _, a in outline.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in outline.seen if "aria-labelledby" in a} <= set(ids)


def test_page_is_one_file_that_asks_for_nothing(page: str, outline: Outline) -> None:
    policy = next(a["content"] for tag, a in outline.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"https?:|@import|url\(", page)
    addresses = [a[name] for _, a in outline.seen for name in ("src", "href") if name in a]
    assert addresses == ["data:,"]
    # The policy forbids both; an attribute that slipped in would be dead code.
    assert not [a for _, a in outline.seen if "style" in a or any(name.startswith("on") for name in a)]


def test_hostile_names_are_text(page: str, outline: Outline) -> None:
    assert page.count("<script>") == 1
    assert "<script>window.pwned" in outline.text


def test_headline_comes_first(outline: Outline) -> None:
    order = [
        "3.00× smaller",
        "90.0 MB → 30.0 MB",
        "3.10× faster",
        "median of paired ratios",
        "−0.0004",
        "How",
        "CrossQuant",
    ]
    text = " ".join(outline.text.split())
    positions = [text.index(piece) for piece in order]
    assert positions == sorted(positions)


def test_everything_reported_is_on_the_page(report: Report, outline: Outline) -> None:
    text = " ".join(outline.text.split())
    for layer in report.layers:
        assert " ".join(layer.name.replace(".", ". ").split()) in text
    for trial in report.trials:
        assert trial.label in text
    for piece in (*report.warnings, "holds no matrix", "torch 2.13.0, numba 0.62", "mean relative error", "Budget met"):
        assert piece in text
    assert "rank not measured" in text


def test_tables_can_be_read_aloud(outline: Outline) -> None:
    roles = [a.get("role") for _, a in outline.seen]
    assert roles.count("table") == 2
    heads = [a for tag, a in outline.seen if tag == "th"]
    assert all(a.get("scope") in {"col", "row"} for a in heads)
    assert sum(tag == "caption" for tag, _ in outline.seen) == 2
    assert all(a.get("aria-label") for tag, a in outline.seen if tag == "input")


def test_latency_view_needs_latencies() -> None:
    trials = tuple(TrialReport(str(i), f"t{i}", ("A()",), 10, i + 1, None, i / 10) for i in range(3))
    page = Report("t", (), 10, 5, trials=trials).to_html()
    assert 'data-view="size"' in page
    assert 'data-view="latency"' not in page
    assert "data-show" not in page.partition("<script>")[0]


def test_budget_in_bytes_and_milliseconds_is_drawn() -> None:
    trials = tuple(TrialReport(str(i), f"t{i}", ("A()",) * i, 4000, 4000 - 1000 * i, 9.0 - i, 0.9) for i in range(3))
    budget = {"bytes": 2500, "latency_ms": 8.0, "drop": None}
    page = Report("t", (), 4000, 2000, trials=trials, budget=budget).to_html()
    assert page.count('<line x1="') > page.count('class="limit"') >= 4  # two views, two sizes


@pytest.mark.parametrize(
    "trials",
    [
        (TrialReport("a", "lonely", ("A()",), 10, 5, None, 0.5),),
        (TrialReport("a", "no metric", ("A()",), 10, 5),),
        (
            TrialReport("a", "beyond drawing", ("A()",), 10, 5, None, 1.7e308),
            TrialReport("b", "b", (), 10, 5, 1e-320, -1e-320),
        ),
        (TrialReport("a", "failed", ("A()",), 10, status="failed"),),
        (
            TrialReport("a", "nothing left", ("A()",), 0, 0, 0.0, 0.0),
            TrialReport("b", "same", ("A()",), 0, 0, 0.0, 0.0),
        ),
    ],
)
def test_degenerate_searches_still_make_a_page(trials: tuple[TrialReport, ...]) -> None:
    page = Report("t", (), 10, 5, trials=trials).to_html()
    assert Outline(page).open == []
    assert ("no front to draw" in page) == (trials[0].metric is None)
    assert "nan" not in page.partition("<script>")[0].lower().replace("nanum", "")


@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_layers(count: int) -> None:
    layers = tuple(LayerReport(f"l{i}", "Linear", "int8", "", 0, i, None) for i in range(count))
    outline = Outline(Report("t", (), 10, 5, layers=layers).to_html())
    assert sum("data-search" in a for _, a in outline.seen) == count
    assert ("No layer was reported." in outline.text) == (count == 0)


def test_layer_latency_adds_a_band() -> None:
    layers = tuple(LayerReport(f"l{i}", "Linear", "int8", "", 9, 3, 0.0, {"latency_ms": 0.5 * i}) for i in range(3))
    text = " ".join(Outline(Report("t", (), 9, 3, layers=layers).to_html()).text.split())
    assert "Latency: 0 1.00 ms" in text
    assert "latency 0.50 ms" in text


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_have_contrast_in_light_and_dark(theme: int) -> None:
    style = resources.files("quernel.report").joinpath("page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([a-z]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    palette = {name: (light, dark)[theme] for name, light, dark in pairs}
    for name in ("ink", "soft", "warm", "good", "bad"):
        for ground in ("paper", "raised"):
            assert contrast(palette[name], palette[ground]) >= MIN_TEXT_CONTRAST, (name, ground)
    for name in ("size", "warm", "time", "axis"):
        assert contrast(palette[name], palette["paper"]) >= MIN_SHAPE_CONTRAST, name
    light = re.findall(r"--([a-z]+): (#\w{6});", style)  # for browsers without light-dark()
    assert dict(light) == {name: light for name, light, _ in pairs}
