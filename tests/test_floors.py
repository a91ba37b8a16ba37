"""Imports go down the floors only, packages on one floor do not import each other, and `import quernel` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quernel

SOURCE = Path(quernel.__file__).parent

# Bottom to top. Underscore modules stand on the ground and may be used by everybody.
FLOORS = (
    {"data", "report"},
    {"hashing"},
    {"kernels"},
    {"nn", "sketch", "search"},
    {"models"},
    {"train", "compress", "cache"},
    {"apps"},
    {"cli"},
)
FLOOR_OF = {package: level for level, packages in enumerate(FLOORS) for package in packages}
# May import every floor; nothing imports it.
TESTING = "testing"
START_SECONDS = 0.3  # promised to users of the command line; measured without the interpreter's own start


def _imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Yield every module named in an import or in import_module("..."), wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def _package(module: str) -> str | None:
    """Return the part that has a floor: "nn" of "quernel.nn._stored", "_errors" of "quernel._errors.X"."""
    parts = module.split(".")
    return parts[1] if parts[0] == "quernel" and len(parts) > 1 else None


def _files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_every_package_has_a_floor() -> None:
    packages = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages <= {*FLOOR_OF, TESTING}


@pytest.mark.parametrize("file", _files(), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_down(file: Path) -> None:
    here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    wrong = []
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for module in _imports(tree, ("quernel", *file.relative_to(SOURCE).parts[:-1])):
        there = _package(module)
        if there is None or there == here or there.startswith("_") or here == TESTING:
            continue
        if there not in {*FLOOR_OF, TESTING}:
            continue  # a name of the top level itself, e.g. __version__
        if there == TESTING or FLOOR_OF.get(here, 0) <= FLOOR_OF[there]:
            wrong.append(module)
    assert not wrong, f"{here} may not import {wrong}"


def test_the_rule_sees_every_way_to_import() -> None:
    source = "from ..nn import a\ndef f():\n    from quernel.cli import main\n    import_module('quernel.apps')\n"
    found = list(_imports(ast.parse(source), ("quernel", "compress", "quant")))
    assert found == ["quernel.compress.nn.a", "quernel.cli.main", "quernel.apps"]


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import quernel; seconds = time.perf_counter() - start;"
        "quernel.__version__; dir(quernel);"
        "print(seconds, *sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numba', 'numpy', 'sklearn'}))"
    )
    seconds, *loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == []
    assert float(seconds) < START_SECONDS


def test_listing_imports_no_method() -> None:
    code = (
        "import sys; from quernel._registry import catalogue; entries = catalogue(); assert entries;"
        "print(*sorted({m for m in sys.modules if m.partition('.')[0] in {'torch', 'numba'} "
        "or m.startswith(('quernel.nn', 'quernel.compress'))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
