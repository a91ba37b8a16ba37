"""What all commands print with: JSON alone on standard output, or rich tables; progress on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


def emit(value: Any) -> None:
    """Write JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def console() -> Console:
    """Return a console on standard output."""
    return Console(highlight=False)


def note(message: str) -> None:
    """Say something beside the result, on standard error."""
    Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table; the last column takes the room that is left."""
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    # The first column is what a reader types next: it is never cut.
    widest = max((len(str(row[0])) for row in rows), default=0)
    for i, name in enumerate(columns):
        width = max(widest, len(name)) if i == 0 else None
        drawn.add_column(name, overflow="fold", no_wrap=name != columns[-1], min_width=width)
    for row in rows:
        drawn.add_row(*(str(cell) if cell not in (None, "") else "-" for cell in row))
    console().print(drawn)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Show a bar on standard error; gives ``progress(message, fraction)`` as the library calls it."""
    shown = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda message, fraction: bar.update(task, description=message[:60], completed=fraction)
