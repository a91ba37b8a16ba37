"""Generated parts are not stale, every system has its page, and a new registry entry reaches every list."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quernel._catalogue import list_methods
from quernel._claims import Claim
from quernel._registry import catalogue

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = (
    "## When to use it, and when not",
    "## Cost",
    "## Example",
    "## Claims measured here",
    "## Timings",
    "## Citation",
)
LONGEST_EXAMPLE = 6


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_stale(generate: ModuleType) -> None:
    assert [str(page) for page in generate.stale()] == [], "run `make generate`"


def test_staleness_is_seen(generate: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: systems -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    fresh = generate.rendered(page)
    assert fresh.startswith("before\n")
    assert fresh.endswith("after\n")
    assert "old" not in fresh
    assert "[crossquant](crossquant.md)" in fresh


def test_what_was_not_measured_meets_no_target(generate: ModuleType) -> None:
    timed = {"name": "a", "peer": "p", "threads": 1, "ours_ms": 1.0, "peer_ms": 2.0, "ratio": 2.0, "note": ""}
    absent = {**timed, "ours_ms": None, "peer_ms": None, "ratio": None}
    rows = [
        {**timed, "target": 1.5, "ok": True},
        {**timed, "target": 3.0, "ok": False},
        {**timed, "target": None, "ok": True},
        {**absent, "target": None, "ok": True, "note": "unavailable: timm cannot be imported: No module named 'timm'"},
        {**absent, "target": 4.0, "ok": False, "note": "unavailable: local-attention is not installed"},
        {**absent, "target": None, "ok": True, "note": "unavailable: this wheel has no such kernel"},
        {**absent, "target": 4.0, "ok": False, "note": "gate failed: AssertionError: "},
    ]
    lines = generate._benchmark_table({"rows": rows}).splitlines()[2:]
    assert [tuple(cell.strip() for cell in line.split("|")[-4:-1]) for line in lines] == [
        ("2x", "1.5x", "yes"),
        ("2x", "3x", "no"),
        ("2x", "", ""),
        ("not installed", "", ""),
        ("not installed", "4x", ""),
        ("not available", "", ""),
        ("not timed", "4x", "no"),
    ]


def test_claims_show_their_spread(generate: ModuleType) -> None:
    fields = {
        "slug": "toy",
        "paper": "",
        "claim": "c",
        "scale": "s",
        "data": "d",
        "metric": "m",
        "ours": 2.0,
        "baseline": 3.0,
        "baseline_name": "dense",
        "threshold": "ours >= 1",
        "verdict": "reproduced",
        "seeds": (0, 1),
        "seconds": 1.0,
        "date": "2025-01-31",
        "command": "python reproductions/toy.py",
    }
    seen = {"ours_by_seed": (2.5, 1.5), "baseline_by_seed": (math.nan, 3.0)}
    one = {"seeds": (0,), "ours_by_seed": (2.0,), "baseline_by_seed": (3.0,)}
    lines = generate._claims_table([Claim(**fields), Claim(**fields, **seen), Claim(**{**fields, **one})]).splitlines()
    assert [tuple(cell.strip() for cell in line.split("|")[4:6]) for line in lines[2:]] == [
        ("2", "3 (dense)"),
        ("2 (1.5 to 2.5)", "3 (dense; 3 to 3, 1 of 2 seeds without a number)"),
        ("2", "3 (dense)"),
    ]


@pytest.mark.parametrize("row", list_methods(), ids=lambda row: str(row["slug"]))
def test_every_system_has_a_whole_page(row: dict[str, str | None]) -> None:
    page = ROOT / "docs" / "methods" / f"{row['slug']}.md"
    assert page.is_file(), f"{row['slug']} is registered; write {page.relative_to(ROOT)}"
    text = page.read_text(encoding="utf-8")
    assert [section for section in SECTIONS if section not in text] == []
    assert f"<!-- generated: claims {row['slug']} -->" in text
    assert f"<!-- generated: benchmarks {row['slug']} -->" in text
    if row["paper"]:
        assert f"https://arxiv.org/abs/{row['paper']}" in text
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    calls = [line for line in example.splitlines() if line and not line.startswith(("import", "from"))]
    assert 0 < len(calls) <= LONGEST_EXAMPLE


def test_no_page_outlives_its_system() -> None:
    slugs = {entry.slug for entry in catalogue()}
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages <= slugs


def test_list_is_what_scripts_rely_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from quernel.cli import main; raise SystemExit(main(['list', '--json']))"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert rows == list_methods()
    assert all(set(row) == {"slug", "name", "pillar", "paper", "status", "verdict", "summary"} for row in rows)
