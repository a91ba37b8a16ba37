"""A new method is one file and one line: the page that says so is followed to the letter, in a copy of the package."""

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


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the package in which the page's two steps were taken."""
    root = tmp_path_factory.mktemp("copy")
    package = root / "quernel"
    shutil.copytree(Path(quernel.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    name = re.search(r"`src/quernel/(compress/\w+\.py)`, whole", page)[1]
    (package / name).write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    line = re.search(r'```text\n("HalfLinear": .*?)\n```', page, re.DOTALL)[1]
    table = package / "compress" / "__init__.py"
    table.write_text(table.read_text().replace('        "LayerPlan"', f'        {line}\n        "LayerPlan"'))
    return root


def run(copy, code):
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_shows_up_in_the_command_line(copy):
    out = run(copy, "import sys; from quernel.cli import main; sys.exit(main(['list', '--json']))")
    row = next(row for row in json.loads(out) if row["slug"] == "half-linear")
    assert row["name"] == "HalfLinear" and row["summary"] == "Store the weights of linear layers in float16."


def test_it_shows_up_in_the_docs_list(copy):
    code = f"import runpy; print(runpy.run_path({str(ROOT / 'docs' / 'generate.py')!r})['systems']())"
    assert "half-linear.md" in run(copy, code)


def test_it_passes_the_conformance_suite_and_joins_the_search(copy):
    out = run(
        copy,
        "from quernel.compress import HalfLinear\n"
        "from quernel.compress._menu import default_methods\n"
        "from quernel.testing import check_method\n"
        "check_method(HalfLinear)\n"
        "print([m.label for m in default_methods(frozenset())])",
    )
    assert "HalfLinear" in out
