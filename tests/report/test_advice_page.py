"""The page of advice: both drawings, the rates, the warnings, and nothing that could be markup."""

from __future__ import annotations

from quernel.report._advice_page import advice_page

CURVE = {"relu": [(1.0, 2.0), (2.0, 2.0), (3.0, 2.1)]}
SPREAD = {"V / (n K²)": [(1.0, 0.0), (2.0, 0.1), (3.0, 0.2)], "nu l / n": [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)]}


def test_page_shows_what_it_is_given() -> None:
    page = advice_page("a <b> net", {"C_W": "2"}, CURVE, SPREAD, [(1, 0.5, 0.25)], ["mind <i>"], {"quernel": "0"})
    assert page.count("<polyline") == 3 and page.count("<svg") == 2
    for text in ("a &lt;b&gt; net", "mind &lt;i&gt;", "1 warning", "0.25", "Made with", "nu l / n"):
        assert text in page
    assert "<b>" not in page and "<i>" not in page


def test_what_has_no_curve_is_left_out() -> None:
    page = advice_page("x", {}, {}, {"one": [(1.0, 0.0), (2.0, 1.0)]}, [], [], {})
    assert "<svg" not in page and "Learning rates" not in page and "warning" not in page.partition("<main>")[2]
