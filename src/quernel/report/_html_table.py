"""A sortable HTML table that becomes a stack of cards on a narrow screen.

ARIA roles are spelled out because the narrow layout changes ``display``, which would take the table semantics away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quernel.report._markup import Markup, tag


@dataclass(frozen=True)
class Column:
    """A heading; numeric columns are right-aligned and sort largest first."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the value it sorts by (None sorts last)."""

    content: object
    value: str | float | None = None


def html_table(caption: str, columns: Sequence[Column], rows: Iterable[Markup], *, slug: str) -> Markup:
    """Return the table inside its scroller."""
    heads = (
        tag(
            "th",
            tag("button", column.name, type="button"),
            scope="col",
            role="columnheader",
            class_="num" if column.numeric else None,
        )
        for column in columns
    )
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *rows, role="rowgroup"),
        role="table",
        id=slug,
        data_sort=True,
    )
    return tag("div", table, class_="scroller", tabindex=0, role="region", aria_label=caption)


def html_row(columns: Sequence[Column], cells: Sequence[Cell], *, class_: str = "", search: str = "") -> Markup:
    """Return one row; the first cell is its heading."""
    parts = []
    for i, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        parts.append(
            tag(
                "th" if i == 0 else "td",
                cell.content,
                role="rowheader" if i == 0 else "cell",
                scope="row" if i == 0 else None,
                class_="num" if column.numeric else None,
                data_label=column.name,
                data_v=repr(cell.value) if isinstance(cell.value, float) else cell.value,
            )
        )
    return tag("tr", *parts, role="row", class_=class_ or None, data_search=search or None)
