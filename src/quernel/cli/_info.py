"""``quernel info NAME``: what a system is, its arguments, its claims and their verdicts."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from quernel._catalogue import row
from quernel._claims import read_claims
from quernel._registry import find
from quernel.cli._output import Json, console, emit, prose, table


def info(
    name: Annotated[str, typer.Argument(help="A system as `quernel list` names it, or one of its classes.")],
    json: Json = False,
) -> None:
    """Describe one system, or one class of it."""
    entry = find(name)
    facts = row(entry)
    cls = entry.resolve()
    arguments = [
        {"name": p.name, "default": None if p.default is p.empty else repr(p.default), "required": p.default is p.empty}
        for p in inspect.signature(cls).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    claims = [claim.to_json() for claim in read_claims() if claim.slug == entry.slug]
    if json:
        emit({**facts, "module": entry.module, "arguments": arguments, "claims": claims})
        return
    paper = f"https://arxiv.org/abs/{entry.paper}" if entry.paper else None
    shown = {"class": f"quernel.{entry.pillar}.{entry.name}", "paper": paper} | {
        k: facts[k] for k in ("status", "verdict")
    }
    console().print(f"{entry.slug}: {entry.summary}\n", markup=False)
    table(("field", "value"), list(shown.items()))
    table(("argument", "default"), [(a["name"], a["default"] or "(required)") for a in arguments])
    if claims:
        table(
            ("verdict", "ours", "baseline", "metric", "claim"),
            [(c["verdict"], _number(c["ours"]), _number(c["baseline"]), c["metric"], c["claim"]) for c in claims],
        )
    console().print()
    prose(inspect.getdoc(cls) or "")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
