"""``quernel reproduce [SLUG...]``: measure the claims again; ``--write`` updates ``claims.toml`` (in a checkout)."""

from __future__ import annotations

from typing import Annotated

import typer

from quernel.cli._checkout import checkout, choose, run_script
from quernel.cli._output import Json, emit, note


def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="[SLUG]...", help="Systems; all if none is named.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Update claims.toml.")] = False,
    json: Json = False,
) -> int:
    """Measure the claims of the papers again; minutes each."""
    root = checkout("reproductions")
    known = sorted(f.stem for f in (root / "reproductions").glob("[a-z]*.py"))
    claims, failed = [], []
    for slug in choose(slugs or [], known, "reproduction"):
        note(f"reproducing {slug}")
        code, result = run_script(root, [f"reproductions/{slug}.py", *(["--write"] if write else [])], as_json=json)
        claims += result if isinstance(result, list) else [result] if result is not None else []
        failed += [slug] if code else []
    if json:
        emit(claims)
    if failed:
        note(f"error: these did not finish: {', '.join(failed)}")
    return 1 if failed else 0
