"""Axes keep their values inside the frame and label them with round numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel.report._axis import Axis, around, from_zero

values = st.lists(st.floats(-1e100, 1e100, allow_subnormal=False), min_size=1, max_size=20)
PIXEL = 1e-6  # of the frame; rounding in double precision


@settings(max_examples=50)
@given(values)
def test_metric_axis_frames_every_value(values: list[float]) -> None:
    axis = around(values, 400.0, 30.0)
    assert all(30 - PIXEL <= axis.at(v) <= 400 + PIXEL for v in values)
    assert axis.at(axis.low) == 400
    assert len(axis.ticks(5)) <= 12


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e18, allow_subnormal=False), max_size=20))
def test_size_axis_starts_at_zero(values: list[float]) -> None:
    axis = from_zero(values, 50.0, 900.0)
    assert axis.low == 0
    assert all(50 <= axis.at(v) < 900 for v in values)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 96.0, ["0", "20", "40", "60", "80"]),
        (0.735, 0.83, ["0.74", "0.76", "0.78", "0.80", "0.82"]),
        (-0.5, 0.5, ["-0.4", "-0.2", "0.0", "0.2", "0.4"]),
        (0.0, 4e9, ["0", "1e+09", "2e+09", "3e+09", "4e+09"]),
    ],
)
def test_ticks_are_round_and_equally_precise(low: float, high: float, labels: list[str]) -> None:
    assert [text for _, text in Axis(low, high, 0.0, 1.0).ticks(5)] == labels
