"""Report, LayerReport, TrialReport: what they derive, what they refuse, what becomes of measures not finite."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.report import LayerReport, Report, TrialReport


def small(**changes: Any) -> Report:
    return Report(**({"title": "t", "methods": (), "bytes_before": 4000, "bytes_after": 1000} | changes))


def test_ratio_counts_how_many_times_smaller() -> None:
    assert small().ratio == 4.0
    assert small(bytes_after=8000).ratio == 0.5
    assert small(bytes_after=0).ratio == math.inf
    assert small(bytes_before=0, bytes_after=0).ratio == 1.0
    assert LayerReport("a", "Linear", "int8", "", 8, 2).ratio == 4.0
    assert TrialReport("k", "l", bytes_before=8, bytes_after=2).ratio == 4.0
    assert TrialReport("k", "l", bytes_before=8).ratio is None


def test_speedup_prefers_the_paired_ratio() -> None:
    assert small().speedup is None
    assert small(latency_ms_before=30.0).speedup is None
    assert small(latency_ms_before=30.0, latency_ms_after=10.0).speedup == 3.0
    assert small(latency_ms_before=30.0, latency_ms_after=10.0, latency_speedup=2.9).speedup == 2.9
    assert small(latency_ms_before=30.0, latency_ms_after=0.0).speedup is None


def test_metric_change_needs_both_ends() -> None:
    assert small(metric_before=0.5).metric_change is None
    assert small(metric_before=0.5, metric_after=0.25).metric_change == -0.25


def test_skipped_are_the_layers_left_as_they_were() -> None:
    layers = [LayerReport(action, "Linear", action) for action in ("int8", "skip", "keep", "low-rank")]
    assert [layer.name for layer in small(layers=layers).skipped] == ["skip", "keep"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_measures_that_are_not_finite_become_none_and_are_told(value: float) -> None:
    report = small(metric="accuracy", metric_before=0.9, metric_after=value)
    assert report.metric_after is None
    assert report.warnings == (f"metric_after came out as {float(value)} and counts as not measured",)
    assert json.loads(report.to_json())["metric_after"] is None
    assert Report.from_json(report.to_json()) == report

    trial = TrialReport("k", "l", metric=value)
    assert (trial.metric, "metric came out as" in trial.reason) == (None, True)
    layer = LayerReport("a", "Linear", "int8", "wide", relative_error=value, details={"scale": value})
    assert (layer.relative_error, layer.details) == (None, {"scale": None})
    assert layer.reason.startswith("wide; relative_error came out as")


def test_numpy_scalars_become_python_ones() -> None:
    trial = TrialReport("k", "l", bytes_after=np.int64(3), metric=np.float64(0.5), chosen=np.bool_(True))
    assert (type(trial.bytes_after), type(trial.metric), trial.chosen) == (int, float, True)
    assert small(summary={"rank": np.int32(3), "share": np.array(0.5)}).summary == {"rank": 3, "share": 0.5}
    assert small(satisfied=np.bool_(False)).satisfied is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": 3}, "title must be str; got int"),
        ({"methods": "CrossQuant()"}, "methods must be a sequence of strings; got 'CrossQuant"),
        ({"methods": [1]}, "methods must be a sequence of strings"),
        ({"bytes_before": -1}, r"bytes_before must be an integer in \[0, .*; got -1"),
        ({"bytes_after": 1.5}, "bytes_after must be an integer"),
        ({"bytes_after": 2**63}, "bytes_after must be an integer"),
        ({"latency_ms_after": -1.0}, "latency_ms_after must be a finite number"),
        ({"metric_after": "good"}, "metric_after must be a finite number; got 'good'"),
        ({"metric_after": 10**400}, "metric_after must be a finite number"),
        ({"metric_interval": (1.0, 0.0)}, "metric_interval must have low <= high"),
        ({"metric_interval": 1.0}, "metric_interval must be a pair"),
        ({"layers": [{}]}, "layers must be a sequence of LayerReport"),
        ({"trials": None}, "trials must be a sequence of TrialReport"),
        ({"trials": [TrialReport("a", "a", chosen=True), TrialReport("b", "b", chosen=True)]}, "at most one"),
        ({"budget": 0.5}, "budget must be a mapping"),
        ({"satisfied": 1}, "satisfied must be bool; got int"),
        ({"summary": {"rank": [1]}}, r"summary\['rank'\] must be a string, number, bool or None"),
        ({"summary": {3: 1}}, "summary must have strings as keys; got 3"),
        ({"environment": {"a": {"b": {}}}}, r"environment\['a'\]\['b'\] must be"),
        ({"format_version": 2}, "format_version must be 1; got 2"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        small(**changes)


def test_bad_layers_and_trials_are_named() -> None:
    with pytest.raises(QuernelError, match="kind must be str; got NoneType"):
        LayerReport("a", None, "int8")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="relative_error must be a finite number"):
        LayerReport("a", "Linear", "int8", relative_error=-0.1)
    with pytest.raises(QuernelError, match="status must be one of 'ok', 'failed', 'pruned'; got 'done'"):
        TrialReport("k", "l", status="done")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="chosen must be bool; got str"):
        TrialReport("k", "l", chosen="yes")  # type: ignore[arg-type]


def test_reports_are_plain_values(report: Report) -> None:
    assert copy.deepcopy(report) == report
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(AttributeError):
        report.title = "other"  # type: ignore[misc]


def test_the_callers_mapping_is_not_shared() -> None:
    summary = {"rank": 3}
    report = small(summary=summary)
    summary["rank"] = 4
    assert report.summary == {"rank": 3}
