"""What all commands print with: JSON alone on standard output, or rich tables; progress on standard error."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# Blanks between columns, and the narrowest last column whose text is still read with ease.
GAP, LEAST_TEXT = 2, 32
# Headings with their rules, examples, and displayed formulas keep their lines.
VERBATIM = re.compile(r"\s*(>{3}|\.\.\. |-+$|=+$|[A-Z]\w+$)")

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
    """Print a table; the last column takes the room that is left, or lines of its own where that is too little."""
    cells = [[str(cell) if cell not in (None, "") else "-" for cell in row] for row in rows]
    beside = _fitting(columns, cells, console().width)
    if beside < len(columns):
        _stacked(columns, cells, beside, title)
        return
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    # The first column is what a reader types next: it is never cut.
    widest = max((len(str(row[0])) for row in rows), default=0)
    for i, name in enumerate(columns):
        width = max(widest, len(name)) if i == 0 else None
        drawn.add_column(name, overflow="fold", no_wrap=name != columns[-1], min_width=width)
    for row in cells:
        drawn.add_row(*map(Text, row))
    console().print(drawn)


def _fitting(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> int:
    """Return how many columns can stand beside each other: all of them, or as many as need not be broken."""
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(columns)]
    if sum(widths[:-1]) + GAP * (len(columns) - 1) + min(widths[-1], LEAST_TEXT) <= width:
        return len(columns)
    fitting = 1
    while fitting < len(columns) - 1 and sum(widths[: fitting + 1]) + GAP * fitting <= width:
        fitting += 1
    return fitting


def _stacked(columns: Sequence[str], cells: Sequence[Sequence[str]], beside: int, title: str | None) -> None:
    """Print the first columns as a table, and the others of each row below it, in lines of their own."""
    screen = console()
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(beside)]

    def line(row: Sequence[str]) -> str:
        return (" " * GAP).join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip()

    if title:
        screen.print(title, style="italic", markup=False)
    head, below = line(columns), f" ({', '.join(columns[beside:])} below)"
    screen.print(head + below if len(head + below) <= screen.width else head, style="bold", markup=False)
    for row in cells:
        screen.print(line(row), markup=False)
        for name, cell in zip(columns[beside:], row[beside:], strict=True):
            text = cell if beside == len(columns) - 1 else f"{name}: {cell}"
            screen.print(Padding(Text(text), (0, 0, 0, 2 * GAP)))


def prose(text: str) -> None:
    """Print a docstring; paragraphs with lines too long for the screen are filled again."""
    screen = console()
    for indent, lines in itertools.groupby(text.splitlines(), lambda line: len(line) - len(line.lstrip())):
        for filled, part in itertools.groupby(lines, lambda line: bool(line.strip()) and not VERBATIM.match(line)):
            held = list(part)
            if filled and any(len(line) > screen.width for line in held):
                held = textwrap.wrap(
                    " ".join(line.strip() for line in held),
                    screen.width,
                    initial_indent=" " * indent,
                    subsequent_indent=" " * indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            screen.print("\n".join(held), markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(*, steps: bool = False) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on standard error; gives ``progress(message, fraction)`` as the library calls it.

    Where that is no terminal there is nothing to draw on: with ``steps`` every step then is a line, else none.
    """
    shown = Console(stderr=True)
    if steps and not shown.is_terminal:
        count = itertools.count(1)
        yield lambda message, fraction: note(f"{next(count)}: {message}")
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda message, fraction: bar.update(task, description=message[:60], completed=fraction)
