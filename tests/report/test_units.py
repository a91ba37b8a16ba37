"""Numbers read well at every size, and never claim more or less than they know."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel.report import _units as units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "not measured"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (22_713_216, "22.7 MB"),
        (9_995_000, "10.0 MB"),
        (2**63 - 1, "9.22 EB"),
    ],
)
def test_bytes(count: int | None, text: str) -> None:
    assert units.format_bytes(count) == text


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1))
def test_bytes_are_within_half_a_percent_of_the_truth(count: int) -> None:
    number, unit = units.format_bytes(count).split()
    assert float(number) < 1000
    assert math.isclose(float(number) * 1000 ** units.BYTE_UNITS.index(unit), count, rel_tol=0.0051)


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (3.927, "3.93 smaller"),
        (0.5, "2.00 larger"),
        (1.0, "1.00 unchanged"),
        (0.998, "1.00 unchanged"),
        (0.0, "0 larger"),
    ],
)
def test_factor_in_words(factor: float, text: str) -> None:
    assert " ".join(units.in_words(factor, "smaller", "larger")) == text


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (None, {}, "not measured"),
        (0.82034, {}, "0.8203"),
        (91.254, {}, "91.25"),
        (-0.05, {"signed": True, "scale": 91.2}, "-0.05"),
        (-0.002, {"signed": True, "scale": 91.2}, "-0.002"),
        (0.0, {"signed": True}, "+0.0000"),
        (1e9, {}, "1e+09"),
    ],
)
def test_metric(value: float | None, options: dict[str, float], text: str) -> None:
    assert units.format_metric(value, **options) == text


@settings(max_examples=50)
@given(st.floats(-1e300, 1e300, allow_subnormal=False))
def test_a_change_never_reads_as_none(value: float) -> None:
    assert (float(units.format_metric(value, signed=True)) == 0) == (value == 0)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "not measured"), (0.0, "0.0000"), (0.01234, "0.0123"), (3e-6, "3e-06")]
)
def test_relative_error(value: float | None, text: str) -> None:
    assert units.format_error(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0042, "0.0042 s"), (41.25, "41.2 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")]
)
def test_seconds(value: float, text: str) -> None:
    assert units.format_seconds(value) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(1, 4, "25.0 %"), (4, 4, "100 %"), (0, 0, "100 %"), (3, 0, "inf %"), (6, 4, "150 %")]
)
def test_percent(part: int, whole: int, text: str) -> None:
    assert units.format_percent(part, whole) == text


def test_budget_tells_fraction_from_bytes() -> None:
    assert units.format_budget({"bytes": 0.3, "drop": 0.01}) == "size at most 30 % of before, metric drop at most 0.01"
    assert units.format_budget({"bytes": 1_000_000, "latency_ms": 5}) == "size at most 1.00 MB, latency at most 5 ms"
    assert units.format_budget({"bytes": None}) == "no limit"
    assert units.format_budget({"energy": True}) == "energy yes"
