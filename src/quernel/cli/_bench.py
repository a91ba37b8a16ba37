"""``quernel bench [SLUG...]``: time ours against peers in one run (in a checkout, on a quiet machine)."""

from __future__ import annotations

from typing import Annotated

import typer

from quernel.cli._checkout import checkout, choose, run_script
from quernel.cli._output import Json, emit, note


def bench(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="[SLUG]...", help="Systems; all if none is named.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Keep the results under benchmarks/results.")] = False,
    json: Json = False,
) -> int:
    """Time the kernels against their peers at their best."""
    root = checkout("benchmarks")
    known = sorted(f.stem for f in (root / "benchmarks").glob("*/[a-z]*.py"))
    results, failed = [], []
    for slug in choose(slugs or [], known, "benchmark"):
        code, result = run_script(root, ["-m", "benchmarks", slug, *(["--write"] if write else [])], as_json=json)
        results += [result] if result is not None else []
        failed += [slug] if code else []
    if json:
        emit(results)
    if failed:
        note(f"error: these failed or missed a target: {', '.join(failed)}")
    return 1 if failed else 0
