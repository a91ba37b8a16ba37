"""JSON: exact round trips, stable names, and a named field for every way a document can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel._errors import FormatError, QuernelError
from quernel.report import LayerReport, Report, TrialReport

floats = st.none() | st.floats(0, 1e300)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
sizes = st.integers(0, 2**63 - 1)
layers = st.builds(
    LayerReport,
    name=st.text(max_size=20),
    kind=st.text(max_size=8),
    action=st.sampled_from(["int8", "keep", "skip"]),
    reason=st.text(max_size=20),
    bytes_before=sizes,
    bytes_after=sizes,
    relative_error=floats,
    details=st.dictionaries(st.text(max_size=8), scalars, max_size=3),
)
trials = st.builds(
    TrialReport,
    key=st.text(max_size=8),
    label=st.text(max_size=8),
    methods=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    bytes_before=st.none() | sizes,
    bytes_after=st.none() | sizes,
    latency_ms=floats,
    metric=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    on_front=st.booleans(),
    status=st.sampled_from(["ok", "failed", "pruned"]),
)
reports = st.builds(
    Report,
    title=st.text(max_size=20),
    methods=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    bytes_before=sizes,
    bytes_after=sizes,
    latency_ms_before=floats,
    metric=st.none() | st.text(max_size=8),
    metric_after=st.none() | st.floats(-1e300, 1e300),
    layers=st.lists(layers, max_size=3).map(tuple),
    trials=st.lists(trials, max_size=3).map(tuple),
    budget=st.none() | st.dictionaries(st.sampled_from(["bytes", "drop", "latency_ms"]), scalars),
    satisfied=st.none() | st.booleans(),
    environment=st.dictionaries(
        st.text(max_size=8), scalars | st.dictionaries(st.text(max_size=4), scalars, max_size=2)
    ),
)


@settings(max_examples=25)
@given(reports)
def test_round_trip_is_exact(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.to_json() == report.to_json()


@settings(max_examples=25)
@given(reports)
def test_every_rendering_works_on_every_report(report: Report) -> None:
    assert report.to_html().endswith("</html>\n")
    assert report.to_markdown().startswith("# ")
    assert "before" in report.table()


def test_whole_report_round_trips(report: Report) -> None:
    assert Report.from_json(report.to_json(indent=None).encode()) == report
    assert LayerReport.from_dict(report.layers[0].to_dict()) == report.layers[0]
    assert TrialReport.from_json(report.trials[2].to_json()) == report.trials[2]


def test_json_has_the_names_that_scripts_rely_on(report: Report) -> None:
    content = json.loads(report.to_json())
    promised = (
        "bytes_before bytes_after latency_ms_before latency_ms_after metric metric_before metric_after methods layers"
    )
    assert set(promised.split()) <= set(content)
    assert content["layers"][0]["name"] == "encoder.layer.0.dense"
    assert content["methods"] == list(report.methods)


def without(content: dict[str, Any], *path: Any) -> dict[str, Any]:
    content = json.loads(json.dumps(content))
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return content


def test_missing_fields_are_named(report: Report) -> None:
    content = report.to_dict()
    for name in content:
        with pytest.raises(FormatError, match=f"Report: field '{name}' is missing"):
            Report.from_dict(without(content, name))
    for name in content["layers"][0]:
        with pytest.raises(FormatError, match=rf"field 'layers\[1\]\.{name}' is missing"):
            Report.from_dict(without(content, "layers", 1, name))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("extra",), 1, "unknown field 'extra'"),
        (("trials", 2, "extra"), 1, r"unknown field 'trials\[2\]\.extra'"),
        (("layers", 3, "bytes_after"), "x", r"layers\[3\]\.bytes_after must be an integer"),
        (("layers", 3, "details"), None, r"layers\[3\]\.details must be a mapping"),
        (("layers",), {}, "Report: layers must be a sequence of LayerReport"),
        (("layers",), [3], r"layers\[0\] must be an object; got 3"),
        (("trials", 0, "status"), "lost", r"trials\[0\]\.status must be one of"),
        (("title",), None, "title must be str"),
        (("format_version",), 99, "format_version must be 1; got 99"),
        (("bytes_before",), True, "bytes_before must be an integer"),
    ],
)
def test_wrong_fields_are_named(report: Report, path: tuple[Any, ...], value: Any, message: str) -> None:
    content = json.loads(report.to_json())
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        Report.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe\x00", '{"a": 1e}'])
def test_what_is_not_json_is_said(text: str | bytes) -> None:
    with pytest.raises(FormatError, match="here: not a JSON document"):
        Report.from_json(text, source="here")


def test_what_is_not_an_object_is_said() -> None:
    with pytest.raises(FormatError, match=r"Report: the document must be an object; got \[1\]"):
        Report.from_json("[1]")


def test_files_are_written_whole_and_errors_name_them(report: Report, tmp_path: Path) -> None:
    path = report.save_json(tmp_path / "report.json")
    assert Report.load_json(path) == report
    assert json.loads(path.read_text(encoding="utf-8"))["title"] == report.title
    report.save_html(tmp_path / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]  # no scratch files

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r"report\.json: not a JSON document"):
        Report.load_json(path)
    with pytest.raises(FormatError, match=r"absent\.json: cannot be read"):
        Report.load_json(tmp_path / "absent.json")
    with pytest.raises(QuernelError, match=r"cannot write .*does its folder exist"):
        report.save_json(tmp_path / "absent" / "report.json")
