"""The page in a real browser: its buttons work, it asks the network for nothing, it fits a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from quernel.report import LayerReport, Report
from tests.report.chromium import Chromium

pytestmark = pytest.mark.browser

DESK = {"width": 1200, "height": 900}
PHONE = {"width": 390, "height": 844}
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
FIRST_LAYER = "document.querySelector('#layers tbody tr').cells[0].dataset.v"
VISIBLE_VIEW = "[...document.querySelectorAll('[data-view]')].filter(v => !v.hidden).map(v => v.dataset.view).join()"
PNG = b"\x89PNG"


@pytest.fixture
def page(report: Report, tmp_path: Path) -> Path:
    return report.save_html(tmp_path / "report.html")


def check_quiet(chromium: Chromium, page: Path) -> None:
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]


@pytest.mark.parametrize("dark", [False, True])
def test_theme_button_swaps_light_and_dark(chromium: Chromium, page: Path, tmp_path: Path, dark: bool) -> None:
    chromium.open(page, **DESK, dark=dark)
    before = chromium.js(BACKGROUND)
    chromium.click("#theme")
    after = chromium.js(BACKGROUND)
    chromium.click("#theme")
    assert before != after
    assert chromium.js(BACKGROUND) == before
    picture = tmp_path / "page.png"
    chromium.screenshot(picture)
    assert picture.read_bytes().startswith(PNG)
    check_quiet(chromium, page)


def test_view_button_shows_the_front_by_latency(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    assert chromium.js(VISIBLE_VIEW) == "size"
    chromium.click("[data-show=latency]")
    assert chromium.js(VISIBLE_VIEW) == "latency"
    assert chromium.js("document.querySelector('[data-show=latency]').getAttribute('aria-pressed')") == "true"
    check_quiet(chromium, page)


def test_header_click_sorts_and_a_second_click_turns_round(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    error_head = "#layers th:nth-child(7) button"
    chromium.click(error_head)
    assert chromium.js(FIRST_LAYER) == "encoder.layer.11.dense"  # largest error first
    last = chromium.js("[...document.querySelectorAll('#layers tbody tr')].at(-1).cells[0].dataset.v")
    assert last == "encoder.norm"  # not measured comes last
    chromium.click(error_head)
    assert chromium.js(FIRST_LAYER).startswith("head.")
    assert chromium.js("document.querySelector('#layers th:nth-child(7)').getAttribute('aria-sort')") == "ascending"
    chromium.click("#layers th:nth-child(1) button")
    names = chromium.js(
        "[...document.querySelectorAll('#layers tbody tr')].slice(0, 12).map(r => r.cells[0].dataset.v)"
    )
    assert names == [f"encoder.layer.{i}.dense" for i in range(12)]  # 2 before 10
    check_quiet(chromium, page)


def test_filter_and_search_narrow_the_layers(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    chromium.click("[data-filter=untouched]")
    assert chromium.js("document.getElementById('shown').textContent") == "2 shown"
    chromium.click("[data-filter=changed]")
    chromium.click("#find")
    chromium.type("layer.1")
    visible = "[...document.querySelectorAll('#layers tbody tr')].filter(r => r.offsetParent).length"
    assert chromium.js(visible) == 3  # 1, 10, 11
    check_quiet(chromium, page)


def test_points_answer_pointer_and_keyboard(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    tip = "document.getElementById('tip')"
    assert chromium.js(f"{tip}.hidden")
    chromium.hover("[data-view=size] .wide .chosen .dot")
    assert not chromium.js(f"{tip}.hidden")
    text = chromium.js(f"{tip}.textContent")
    assert "int8 + bf16" in text
    assert "spearman 0.8196" in text
    inside = f"(r => r.left >= 0 && r.top >= 0 && r.right <= innerWidth)({tip}.getBoundingClientRect())"
    assert chromium.js(inside)
    chromium.hover("h1")
    assert chromium.js(f"{tip}.hidden")

    chromium.js("document.querySelector('[data-view=size] .wide .mark').focus()")
    chromium.press("ArrowRight")
    assert "merge" in chromium.js(f"{tip}.textContent")
    assert "merge" in chromium.js("document.activeElement.getAttribute('aria-label')")
    chromium.press("Escape")
    assert chromium.js(f"{tip}.hidden")

    chromium.hover(".heat .mark:nth-of-type(3)")
    assert "encoder.layer.2.dense" in chromium.js(f"{tip}.textContent")
    check_quiet(chromium, page)


@pytest.mark.parametrize("layers", [0, 1, 500])
def test_phone_needs_no_sideways_scrolling(chromium: Chromium, report: Report, tmp_path: Path, layers: int) -> None:
    many = tuple(
        LayerReport(f"a_rather_long_block_name.{i}." + "x" * 60, "Linear", "int8", "", 9, 3) for i in range(layers)
    )
    content = report.to_dict() | {"layers": [layer.to_dict() for layer in many], "title": "t" * 80}
    page = Report.from_dict(content).save_html(tmp_path / "report.html")
    chromium.open(page, **PHONE)
    assert chromium.js("document.documentElement.scrollWidth") <= PHONE["width"]
    assert chromium.js("document.body.scrollWidth") <= PHONE["width"]
    assert chromium.js("document.querySelector('.narrow').offsetParent !== null")
    chromium.screenshot(tmp_path / "phone.png", whole=False)
    check_quiet(chromium, page)


def test_hostile_names_stay_text_and_foreign_scripts_are_refused(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    assert chromium.js("document.querySelector('h1').textContent").startswith("encoder <script>")
    assert chromium.js("document.scripts.length") == 1
    chromium.js(
        "(() => { const s = document.createElement('script'); s.text = 'window.pwned = 1'; document.body.append(s); })()"
    )
    assert chromium.js("window.pwned === undefined")
