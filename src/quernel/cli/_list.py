"""``quernel list``: every system with its pillar, paper, status and the verdict of its claims."""

from __future__ import annotations

from quernel._catalogue import list_methods
from quernel.cli._output import Json, emit, table


def list_systems(json: Json = False) -> None:
    """List the systems of the library."""
    rows = list_methods()
    if json:
        emit(rows)
        return
    columns = ("slug", "pillar", "paper", "status", "verdict", "summary")
    table(columns, [[row[column] for column in columns] for row in rows])
