"""A new method is one file and one line: the documented one reaches every list and passes conformance.

The file is taken from docs/add-a-method.md and put, with its line, into a copy of the package.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quernel

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add-a-method.md"

ASK = """
import importlib.util, json, sys
import quernel
listed = [row for row in quernel.list_methods() if row["slug"] == "half-linear"]
from quernel.cli import main
assert main(["info", "half-linear", "--json"]) == 0
spec = importlib.util.spec_from_file_location("docs_generate", sys.argv[1])
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
from quernel.compress import HalfLinear
from quernel.compress._menu import default_methods
from quernel.testing import check_method
check_method(HalfLinear)
print(json.dumps({
    "listed": listed,
    "docs": [line for line in docs.systems().splitlines() if "half-linear" in line],
    "searched": HalfLinear() in default_methods(frozenset()),
}))
"""


@pytest.fixture(scope="module")
def copy_with_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a package that has the documented method."""
    folder = tmp_path_factory.mktemp("package")
    package = folder / "quernel"
    shutil.copytree(Path(quernel.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = PAGE.read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    line = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0].strip()
    (package / "compress" / "half_linear.py").write_text(source, encoding="utf-8")
    table = package / "compress" / "__init__.py"
    names = table.read_text(encoding="utf-8")
    assert '        "LayerPlan"' in names
    table.write_text(names.replace('        "LayerPlan"', f'        {line}\n        "LayerPlan"', 1), encoding="utf-8")
    return folder


def test_one_file_and_one_line_reach_everything(copy_with_method: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(copy_with_method)}
    command = [sys.executable, "-c", ASK, str(ROOT / "docs" / "generate.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["listed"] == [
        {
            "slug": "half-linear",
            "name": "HalfLinear",
            "pillar": "compress",
            "paper": None,
            "status": "experimental",
            "verdict": "",
            "summary": "Store the weights of linear layers in float16.",
        }
    ]
    assert len(found["docs"]) == 1
    assert found["searched"] is True


def test_documented_file_keeps_the_house_style(copy_with_method: Path) -> None:
    file = copy_with_method / "quernel" / "compress" / "half_linear.py"
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(file)]
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
