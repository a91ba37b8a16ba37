"""``quernel data [NAME]``: data sets, which of them are present, under which terms; ``--download`` fetches one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quernel._errors import QuernelError
from quernel.cli._output import Json, emit, note, table


def data(
    name: Annotated[str | None, typer.Argument(help="One data set; all if left out.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch it from its public origin.")] = False,
    json: Json = False,
) -> None:
    """List data sets, describe one, or download one."""
    from quernel.data import download as fetch
    from quernel.data import info, names

    if download:
        if name is None:
            raise QuernelError("--download needs the name of one data set; `quernel data` lists them")
        note(f"downloading {name}")
        fetch(name)
    sets = [asdict(info(each)) for each in ([name] if name else names())]
    if json:
        emit(sets[0] if name else sets)
    elif name:
        table(("field", "value"), [(key, _text(value)) for key, value in sets[0].items()])
    else:
        rows = [(s["name"], "yes" if s["present"] else "absent", s["summary"]) for s in sets]
        table(("name", "present", "summary"), rows)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return str(value)
