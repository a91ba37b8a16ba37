"""Everything shown runs: Python blocks of README and docs, docstring examples, and the commands with their options."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

import quernel
from quernel._errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"`(quernel [a-z][^`]*)`|^(quernel [a-z].*)$", re.MULTILINE)
EXAMPLES = [f for f in sorted((ROOT / "src").rglob("*.py")) if ">>>" in f.read_text(encoding="utf-8")]


def _blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p, "python")], ids=_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The blocks of one page are one story: they share their names.
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for number, code in enumerate(_blocks(page, "python"), start=1):
        exec(compile(code, f"{_name(page)}, block {number}", "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("file", EXAMPLES, ids=_name)
def test_docstring_examples_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    monkeypatch.chdir(tmp_path)
    try:
        loaded = importlib.import_module(module)
    except MissingExtraError as error:
        pytest.skip(str(error))
    failed, tried = doctest.testmod(loaded, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried
    assert not failed


def _commands() -> list[tuple[str, str]]:
    return [(_name(p), a or b) for p in PAGES for a, b in COMMAND.findall(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "line"), _commands())
def test_commands_shown_exist(page: str, line: str) -> None:
    typer = pytest.importorskip("typer")
    from quernel.cli._app import app

    commands = typer.main.get_command(app).commands
    words = shlex.split(line.partition("#")[0])[1:]
    if len(words) > 1 and hasattr(commands.get(words[0]), "commands"):  # `quernel index build`
        commands, words = commands[words[0]].commands, words[1:]
    for name in [part.strip() for part in words[0].split("|")]:
        assert name in commands, f"{page} shows `{line}`"
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= options | {
            "--help",
            "--debug",
        }


def test_every_public_pillar_is_documented_somewhere() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    missing = [name for name in quernel.__all__ if name not in ("__version__",) and name not in text]
    assert not missing
