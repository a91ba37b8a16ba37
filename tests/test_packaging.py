"""The frame agrees with itself: bounds, pins, versions, the files that the front door promises."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import quernel

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {
    "cli",
    "hf",
    "onnx",
    "viz",
    "data",
    "gpu",
    "fed",
    "ray",
    "dp",
    "quantum",
    "robotics",
    "serve",
    "peers",
    "dev",
    "all",
}
REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?(.*)$")


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return _pins("constraints.txt")


def _requirements(project: dict, *extras: str) -> list[tuple[str, str]]:
    asked = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    found = [REQUIREMENT.match(requirement) for requirement in asked]
    return [(match[1], match[2]) for match in found if match]


def test_extras(project: dict) -> None:
    assert set(project["optional-dependencies"]) == EXTRAS


def test_lower_bounds_only(project: dict) -> None:
    for name, bound in _requirements(project, *EXTRAS):
        assert name == "quernel" or re.fullmatch(r">=\d[\d.]*", bound), f"{name}{bound}"


def test_development_environment_is_pinned_and_within_bounds(project: dict, pins: dict[str, str]) -> None:
    normalised = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for name, bound in _requirements(project, "cli", "hf", "dev"):
        if name != "quernel":
            pinned = tuple(map(int, re.findall(r"\d+", normalised[name.lower()])))
            assert pinned >= tuple(map(int, re.findall(r"\d+", bound))), name


def test_pins_travel(pins: dict[str, str]) -> None:
    assert pins["torch"] == "2.13.0"
    assert "quernel" not in pins
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    # A local version (+cpu) or an address exists on some machines only.
    assert not re.search(r"\+|://|@", text)


def test_the_oldest_transformers_that_is_allowed_is_the_one_tested(project: dict, pins: dict[str, str]) -> None:
    oldest = _pins("constraints-oldest.txt")
    assert dict(_requirements(project, "hf"))["transformers"] == f">={oldest['transformers']}"
    assert oldest["transformers"] != pins["transformers"]
    # Without it nothing would run the caches with the second version.
    assert "make --no-print-directory oldest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_versions_agree() -> None:
    assert importlib.metadata.version("quernel") == quernel.__version__
    assert f"version: {quernel.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {quernel.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_types_are_published() -> None:
    assert (Path(quernel.__file__).parent / "py.typed").is_file()


def test_ci_script_is_runnable() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    # What CI asks make for exists, and the suite's summary is the last thing it prints.
    asked = re.findall(r"^make --no-print-directory (\w+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    offered = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(asked) <= set(offered)
    assert asked[-1] == "test"
    assert script.read_text(encoding="utf-8").rstrip().endswith("make --no-print-directory test")
