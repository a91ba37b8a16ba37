"""``quernel warmup`` finds every kernel file that says how it is compiled, and compiles it."""

from __future__ import annotations

import json

import pytest

from quernel.cli import _warmup, main


def test_kernel_files_are_found() -> None:
    found = _warmup._kernel_modules()
    assert "quernel.nn.functional.int8" in found
    assert found == sorted(found)
    assert not any(module.startswith("quernel.cli") for module in found)


def test_rows_name_modules_and_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_warmup, "_kernel_modules", list)
    assert main(["warmup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.slow
def test_everything_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["module"] for row in rows] == _warmup._kernel_modules()
    assert all(row["seconds"] > 0 for row in rows)
