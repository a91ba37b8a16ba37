"""House rules that a reader would otherwise have to check by eye, read from the syntax trees of the package.

No assert, print, pickle, eval, Python hash or global random state in the package; jitted functions say
how they treat floating point and threads; files are short, have a docstring and export sorted names.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import quernel
from quernel._registry import catalogue

SOURCE = Path(quernel.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
BANNED_NAMES = {"utils.py", "helpers.py", "misc.py", "common.py"}
BANNED_CALLS = {
    "print": "return it, log it, or render it with rich in the command line",
    "eval": "parse it",
    "exec": "write it as code",
    "hash": "Python's hash differs between processes; use quernel.hashing",
    "breakpoint": "remove it",
}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "random"}
# What makes a generator; everything else under numpy.random is the global one.
NUMPY_RANDOM = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64", "Philox", "bit_generator"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "poisson"}
TORCH_SEEDS = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.set_rng_state"}
# Modules follow torch: their initialisation may draw from the default generator. Trainers and models too.
FOLLOWS_TORCH = {"nn", "train", "models"}
UNSAFE_MATH = {"nnan", "ninf", "fast"}
# One person's folders have no business in code that travels.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|mnt|opt|Users)/\w")
UNFINISHED = re.compile(r"\b(?:FIXME|XXX|HACK|TODO(?!\(\w[\w.-]*[<>=]=))\b")


def _python(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


PACKAGE = _python("src")
EVERYTHING = _python("src", "tests", "benchmarks", "reproductions", "docs")


def _relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _in_docstrings_too(file: Path) -> Iterator[tuple[int, str]]:
    yield from enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)


package_file = pytest.mark.parametrize("file", PACKAGE, ids=_relative)
any_file = pytest.mark.parametrize("file", EVERYTHING, ids=_relative)


@any_file
def test_file_is_short_documented_and_well_named(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, "two ideas in one file?"
    assert ast.get_docstring(ast.parse(text)), "a file begins by saying what it is"
    assert file.name not in BANNED_NAMES, "name the thing"


@any_file
def test_nothing_is_left_unfinished_or_tied_to_one_machine(file: Path) -> None:
    wrong = [
        f"{number}: {line.strip()}"
        for number, line in _in_docstrings_too(file)
        if MACHINE_PATH.search(line) or (UNFINISHED.search(line) and file != Path(__file__))
    ]
    assert not wrong


@package_file
def test_no_banned_statements(file: Path) -> None:
    wrong = []
    # The conformance suites ask whether a value can be hashed.
    banned = BANNED_CALLS.keys() - ({"hash"} if _pillar(file) == "testing" else set())
    for node in ast.walk(_tree(file)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert):
            wrong.append(f"{line}: assert; raise a quernel error that names the argument")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in banned:
            wrong.append(f"{line}: {node.func.id}(); {BANNED_CALLS[node.func.id]}")
        elif isinstance(node, ast.Import):
            wrong += [f"{line}: import {a.name}" for a in node.names if a.name.partition(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = (node.module or "").partition(".")[0]
            wrong += [f"{line}: from {module}"] if module in BANNED_MODULES else []
        elif isinstance(node, ast.ExceptHandler) and _swallows(node):
            wrong.append(f"{line}: an error is swallowed")
        elif isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            wrong.append(f"{line}: a stub; make it abstract")
    assert not wrong


def _pillar(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0]


def _swallows(node: ast.ExceptHandler) -> bool:
    if node.type is None:
        return True
    broad = ast.unparse(node.type) in {"Exception", "BaseException"}
    return broad and all(isinstance(statement, ast.Pass) for statement in node.body)


@package_file
def test_no_global_random_state(file: Path) -> None:
    pillar = _pillar(file)
    if pillar == "testing":
        return  # it watches the global generators
    wrong = []
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        first, _, rest = name.partition(".random.")
        if first in {"np", "numpy"} and rest not in NUMPY_RANDOM:
            wrong.append(f"{node.lineno}: {name}")
        if name in TORCH_SEEDS:
            wrong.append(f"{node.lineno}: {name}")
        draws = name.partition(".")[0] == "torch" and name.removeprefix("torch.") in TORCH_DRAWS
        if draws and pillar not in FOLLOWS_TORCH and not any(k.arg == "generator" for k in node.keywords):
            wrong.append(f"{node.lineno}: {name} without generator=")
    assert not wrong


@package_file
def test_foreign_files_are_read_safely(file: Path) -> None:
    # torch.load unpickles: only quernel.data may call it, on checked bytes and with weights_only.
    wrong = []
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name == "torch.load" and (_pillar(file) != "data" or given.get("weights_only") != "True"):
            wrong.append(f"{node.lineno}: torch.load")
        if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            wrong.append(f"{node.lineno}: {name} runs foreign code")
        if given.get("shell", "False") != "False":
            wrong.append(f"{node.lineno}: {name} through a shell")
    assert not wrong


@package_file
def test_jitted_functions_state_their_terms(file: Path) -> None:
    tree = _tree(file)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    jits = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_jit(n.func)]
    bare = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and any(map(_is_jit, n.decorator_list))]
    wrong = [f"{name}: @njit without terms" for name in bare]
    for call in jits:
        terms = {k.arg: k.value for k in call.keywords}
        if set(terms) >= {"fastmath", "nogil"} and "parallel" not in terms and not any(map(_is_signature, call.args)):
            math = terms["fastmath"]
            math = constants.get(math.id, math) if isinstance(math, ast.Name) else math
            flags = (
                set()
                if isinstance(math, ast.Constant) and math.value is False
                else set(re.findall(r"\w+", ast.unparse(math)))
            )
            if ast.unparse(terms["nogil"]) == "True" and "True" not in flags and not flags & UNSAFE_MATH:
                continue
        wrong.append(f"{call.lineno}: {ast.unparse(call)}")
    wrong += [f"{n.lineno}: prange" for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "prange"]
    assert not wrong


def _is_jit(node: ast.expr) -> bool:
    # Numba's; the compilers of torch and Triton have no such terms.
    owner, _, name = ast.unparse(node).rpartition(".")
    return name in {"njit", "jit"} and "torch" not in owner and owner != "triton"


def _is_signature(node: ast.expr) -> bool:
    # An eager signature compiles at import.
    return isinstance(node, ast.Constant | ast.List | ast.Tuple)


@package_file
def test_exports_are_sorted(file: Path) -> None:
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == "__all__" for t in node.targets):
            names = ast.literal_eval(node.value)
            assert list(names) == sorted(names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "attach":
            names = [ast.literal_eval(key) for key in node.args[1].keys if key is not None]  # type: ignore[attr-defined]
            assert names == sorted(names)


def _packages() -> list[str]:
    inits = [f.parent.relative_to(SOURCE) for f in PACKAGE if f.name == "__init__.py"]
    return [".".join(("quernel", *p.parts)) for p in inits]


@pytest.mark.parametrize("name", _packages())
def test_every_public_name_resolves(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        try:
            assert getattr(module, public) is not None
        except quernel._errors.MissingExtraError:
            continue  # an optional package is not installed here
        assert public in dir(module) or public.startswith("__")


def test_registered_names_are_unique() -> None:
    names = [entry.name for entry in catalogue()]
    assert sorted(names) == sorted(set(names)), "the loader's allow-list is keyed by class name"
    headlines = [entry.slug for entry in catalogue() if entry.headline]
    assert sorted(headlines) == sorted(set(headlines)), "one class stands for a system"


@pytest.mark.parametrize("entry", catalogue(), ids=lambda e: e.name)
def test_registered_class_is_public_where_it_says(entry: quernel._registry.Entry) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.slug)
    assert entry.summary, "the first docstring line is what lists show"
    assert entry.module.startswith(f"quernel.{entry.pillar}.")
    assert entry.paper is None or re.fullmatch(r"\d{4}\.\d{4,5}", entry.paper)
    pillar = importlib.import_module(f"quernel.{entry.pillar}")
    public = {entry.name} & set(pillar.__all__) or [
        sub for sub in pillar.__all__ if entry.name in getattr(getattr(pillar, sub), "__all__", ())
    ]
    assert public, f"{entry.name} is missing from the name table of quernel.{entry.pillar}"
    assert getattr(entry.resolve(), "_quernel_slug", None) == entry.slug
