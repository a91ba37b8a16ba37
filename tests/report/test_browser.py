"""The page in a real browser: its buttons work, it asks the network for nothing, it fits a phone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quernel.report import LayerReport, Report
from tests.report.chromium import Chromium

pytestmark = pytest.mark.browser

DESK = {"width": 1200, "height": 900}
PHONE = {"width": 390, "height": 844}
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LAYER_NAMES = "[...document.querySelectorAll('#layers tbody tr')].map(row => row.cells[0].dataset.v)"
VISIBLE_VIEW = "[...document.querySelectorAll('[data-view]')].filter(v => !v.hidden).map(v => v.dataset.view).join()"
TIP = "document.getElementById('tip')"
TIP_IS_OPEN = f"!{TIP}.hidden"
TIP_IS_CLOSED = f"{TIP}.hidden"
PNG = b"\x89PNG"


@pytest.fixture
def page(report: Report, tmp_path: Path) -> Path:
    return report.save_html(tmp_path / "report.html")


def check_quiet(chromium: Chromium, page: Path) -> None:
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]


def tip_says(text: str) -> str:
    return f"{TIP_IS_OPEN} && {TIP}.textContent.includes({json.dumps(text)})"


@pytest.mark.parametrize("dark", [False, True])
def test_theme_button_swaps_light_and_dark(chromium: Chromium, page: Path, tmp_path: Path, dark: bool) -> None:
    chromium.open(page, **DESK, dark=dark)
    before = chromium.js(BACKGROUND)
    chromium.click("#theme")
    chromium.wait_for(f"{BACKGROUND} !== {json.dumps(before)}")
    chromium.click("#theme")
    chromium.wait_for(f"{BACKGROUND} === {json.dumps(before)}")
    picture = tmp_path / "page.png"
    chromium.screenshot(picture)
    assert picture.read_bytes().startswith(PNG)
    check_quiet(chromium, page)


def test_view_button_shows_the_front_by_latency(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    assert chromium.js(VISIBLE_VIEW) == "size"
    chromium.click("[data-show=latency]")
    chromium.wait_for(f"{VISIBLE_VIEW} === 'latency'")
    assert chromium.js("document.querySelector('[data-show=latency]').getAttribute('aria-pressed')") == "true"
    assert chromium.js("document.querySelector('[data-show=size]').getAttribute('aria-pressed')") == "false"
    check_quiet(chromium, page)


def test_header_click_sorts_and_a_second_click_turns_round(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    in_model_order = chromium.js(LAYER_NAMES)
    error_head = "document.querySelector('#layers th:nth-child(7)').getAttribute('aria-sort')"
    chromium.click("#layers th:nth-child(7) button")
    chromium.wait_for(f"{error_head} === 'descending'")
    names = chromium.js(LAYER_NAMES)
    assert names[0] == "encoder.layer.11.dense"  # largest error first
    assert names[-1] == "encoder.norm"  # not measured comes last
    chromium.click("#layers th:nth-child(7) button")
    chromium.wait_for(f"{error_head} === 'ascending'")
    names = chromium.js(LAYER_NAMES)
    assert names[0].startswith("head.")
    assert names[-1] == "encoder.norm"
    chromium.click("#layers th:nth-child(1) button")
    chromium.wait_for(f"{error_head} === null")
    assert chromium.js(LAYER_NAMES) == in_model_order  # layer.2 before layer.10
    check_quiet(chromium, page)


def test_filter_and_search_narrow_the_layers(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    shown = "document.getElementById('shown').textContent"
    chromium.click("[data-filter=untouched]")
    chromium.wait_for(f"{shown} === '2 shown'")
    chromium.click("[data-filter=changed]")
    chromium.wait_for(f"{shown} === '12 shown'")
    chromium.click("#find")
    chromium.type("layer.1")
    chromium.wait_for(f"{shown} === '3 shown'")  # 1, 10 and 11
    assert chromium.js("[...document.querySelectorAll('#layers tbody tr')].filter(r => r.offsetParent).length") == 3
    check_quiet(chromium, page)


def test_points_answer_pointer_and_keyboard(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    assert chromium.js(TIP_IS_CLOSED)
    chromium.hover("[data-view=size] .wide .chosen .dot")
    chromium.wait_for(tip_says("int8 + bf16"))
    assert "spearman 0.8196" in chromium.js(f"{TIP}.textContent")
    assert chromium.js(f"(r => r.left >= 0 && r.top >= 0 && r.right <= innerWidth)({TIP}.getBoundingClientRect())")
    chromium.hover("h1")
    chromium.wait_for(TIP_IS_CLOSED)

    chromium.js("document.querySelector('[data-view=size] .wide .mark').focus()")
    chromium.press("ArrowRight")
    chromium.wait_for(tip_says("merge"))
    assert "merge" in chromium.js("document.activeElement.getAttribute('aria-label')")
    chromium.press("Escape")
    chromium.wait_for(TIP_IS_CLOSED)

    chromium.hover(".heat .mark:nth-of-type(3)")
    chromium.wait_for(tip_says("encoder.layer.2.dense"))
    check_quiet(chromium, page)


@pytest.mark.parametrize("layers", [0, 1, 500])
def test_phone_needs_no_sideways_scrolling(chromium: Chromium, report: Report, tmp_path: Path, layers: int) -> None:
    name = "a_rather_long_block_name." + "x" * 60
    many = [LayerReport(f"{name}.{i}", "Linear", "int8", "", 9, 3, 0.1).to_dict() for i in range(layers)]
    page = Report.from_dict(report.to_dict() | {"layers": many, "title": "t" * 80}).save_html(tmp_path / "report.html")
    chromium.open(page, **PHONE)
    assert chromium.js("document.documentElement.scrollWidth") <= PHONE["width"]
    assert chromium.js("document.body.scrollWidth") <= PHONE["width"]
    assert chromium.js("document.querySelector('.narrow').offsetParent !== null")
    assert chromium.js("document.querySelector('.wide').offsetParent === null")
    chromium.screenshot(tmp_path / "phone.png", whole=False)
    check_quiet(chromium, page)


def test_hostile_names_stay_text_and_foreign_scripts_are_refused(chromium: Chromium, page: Path) -> None:
    chromium.open(page, **DESK)
    assert chromium.js("document.querySelector('h1').textContent").startswith("encoder <script>")
    assert chromium.js("document.scripts.length") == 1
    foreign = "(s => { s.text = 'window.pwned = 1'; document.body.append(s) })(document.createElement('script'))"
    chromium.js(foreign)
    assert chromium.js("window.pwned === undefined")
