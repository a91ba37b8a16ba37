"""The page of an index: every point drawn twice, framed by its axes, and nothing that could be markup."""

from __future__ import annotations

import re

import pytest

from quernel.report._axis import by_powers
from quernel.report._recall_plot import RecallPoint, recall_page

POINTS = [
    RecallPoint("exact", 1.0, 250.0, 80_000_000, exact=True),
    RecallPoint("20 tables <b>", 0.998, 50_000.0, 40_000_000, chosen=True),
    RecallPoint("5 tables", 0.7, 120_000.0, 12_000_000),
]


def test_page_shows_every_point_twice_and_in_the_table() -> None:
    page = recall_page("vectors.npy", "What was measured.", POINTS, {"items": 3}, {"threads": 1})
    assert page.count('class="plot"') == 2
    assert len(re.findall(r'class="mark (?:chosen|original|behind)"', page)) == 2 * len(POINTS)
    for text in ("50,000", "0.9980", "80.0 MB", "What was measured.", "Measured on", "20 tables &lt;b&gt;"):
        assert text in page
    assert "20 tables <b>" not in page


def test_one_point_can_be_drawn() -> None:
    assert 'class="plot"' in recall_page("x", "y", POINTS[:1], {}, {})


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([250.0, 120_000.0], ["1,000", "10,000", "100,000"]),
        ([100.0, 300.0], ["100", "200"]),
        ([0.02, 0.09], ["0.02", "0.05", "0.1"]),
    ],
)
def test_logarithmic_axis_frames_its_values_with_round_ticks(values: list[float], labels: list[str]) -> None:
    axis = by_powers(values, 400.0, 30.0)
    assert all(30 < axis.at(v) < 400 for v in values)
    assert axis.at(axis.low) == pytest.approx(400) and axis.at(axis.high) == pytest.approx(30)
    assert axis.at((values[0] * values[1]) ** 0.5) == pytest.approx((axis.at(values[0]) + axis.at(values[1])) / 2)
    texts = [text for _, text in axis.ticks(5)]
    assert set(labels) <= set(texts)
    assert len(texts) <= 12
