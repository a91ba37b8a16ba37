"""Commands of a checkout: they find it, run its scripts, gather their JSON, and say so where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quernel._errors import QuernelError
from quernel.cli import _bench, _checkout, _reproduce, main

PRINTS = "import json, sys\nprint('measuring')\nprint(json.dumps({0}))\nsys.exit({1})\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two reproductions and one benchmark runner, one of which fails."""
    (tmp_path / "pyproject.toml").touch()
    scripts = tmp_path / "reproductions"
    scripts.mkdir()
    (scripts / "_shared.py").touch()
    (scripts / "good.py").write_text(PRINTS.format("[{'slug': 'good', 'args': sys.argv[1:]}]", 0), encoding="utf-8")
    (scripts / "bad.py").write_text(PRINTS.format("{'slug': 'bad'}", 3), encoding="utf-8")
    runner = tmp_path / "benchmarks" / "nn"
    runner.mkdir(parents=True)
    (runner / "fast.py").touch()
    main_file = tmp_path / "benchmarks" / "__main__.py"
    main_file.write_text(PRINTS.format("{'slug': sys.argv[1], 'rows': []}", 0), encoding="utf-8")
    monkeypatch.setattr(_checkout, "claims_path", lambda: tmp_path / "claims.toml")
    return tmp_path


def test_reproduce_gathers_claims_and_names_failures(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == [{"slug": "bad"}, {"slug": "good", "args": ["--json"]}]
    assert "did not finish: bad" in err


def test_reproduce_one_and_write(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "good", "--write", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"slug": "good", "args": ["--write", "--json"]}]


def test_bench_gathers_results(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"slug": "fast", "rows": []}]


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkout, "claims_path", lambda: tmp_path / "claims.toml")
    for command in (_reproduce.reproduce, _bench.bench):
        with pytest.raises(QuernelError, match="is part of the repository, not of the installed package"):
            command()


def test_a_script_without_json_is_an_error(root: Path) -> None:
    (root / "silent.py").touch()
    with pytest.raises(QuernelError, match=r"silent\.py did not end with a line of JSON"):
        _checkout.run_script(root, ["silent.py"], as_json=True)
