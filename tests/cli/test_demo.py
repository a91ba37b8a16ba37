"""``quernel demo``: the whole main job on a model and data that are always there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quernel.cli import main
from quernel.report import Report


@pytest.mark.slow
def test_demo_meets_its_budget_and_writes_its_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--folder", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["satisfied"] is True
    assert found["bytes_after"] < 0.5 * found["bytes_before"]
    assert found["metric_before"] - found["metric_after"] <= 0.01
    assert sum(trial["chosen"] for trial in found["trials"]) == 1
    assert Report.load_json(tmp_path / "report.json").to_dict() == found
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
