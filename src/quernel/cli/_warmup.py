"""``quernel warmup``: compile the kernels now, into Numba's cache, so that the first request does not wait.

A kernel file offers a function ``_warmup()`` that calls its kernels once on tiny inputs; the files that
have one are found in their syntax trees, like the registry.
"""

from __future__ import annotations

import ast
import importlib
import time
from pathlib import Path

import quernel
from quernel.cli._output import Json, emit, note, table


def warmup(json: Json = False) -> None:
    """Compile all kernels into the cache."""
    rows = []
    for module in _kernel_modules():
        note(f"compiling {module}")
        start = time.perf_counter()
        importlib.import_module(module)._warmup()
        rows.append({"module": module, "seconds": time.perf_counter() - start})
    if json:
        emit(rows)
    else:
        table(("seconds", "module"), [(f"{row['seconds']:.2f}", row["module"]) for row in rows])


def _kernel_modules() -> list[str]:
    root = Path(quernel.__file__).parent
    return [
        ".".join(("quernel", *file.relative_to(root).with_suffix("").parts))
        for file in sorted(root.rglob("*.py"))
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "_warmup"
            for node in ast.parse(file.read_text(encoding="utf-8")).body
        )
    ]
