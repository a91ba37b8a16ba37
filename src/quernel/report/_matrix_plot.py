"""A matrix of scores as an SVG drawing that stands alone: numbers on cells, darker is more, some cells framed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quernel._errors import QuernelError
from quernel.report._curves import COLOURS
from quernel.report._markup import Markup, tag

CELL, LEFT, TOP, AIR = 56, 120, 44, 12
# Wider names are cut; they stay whole in the hover text.
LETTERS = 16
FILL, FRAME = COLOURS[0], COLOURS[4]


def matrix_map(
    values: Any, names: Sequence[str], *, rows: str = "queries", columns: str = "gallery", framed: Any = None
) -> Markup:
    """Draw a square matrix of scores in [0, 1]; what is NaN stays empty.

    Parameters
    ----------
    values : array, shape (n, n)
        For example of ``quernel.search.compatibility_matrix``.
    names : sequence of str
        One a row and column.
    rows, columns : str
        What they are.
    framed : array of bool, shape (n, n), optional
        Cells to draw a frame around.

    Returns
    -------
    svg : Markup
        An ``<svg>`` to write into a file or a page; legible on white and on black.

    Raises
    ------
    QuernelError
        If shapes do not fit or a value lies outside [0, 1].

    Examples
    --------
    >>> matrix_map([[0.5, float("nan")], [0.7, 0.9]], ["old", "new"])[:4]
    '<svg'
    """
    c = np.asarray(values, dtype=np.float64)
    marked = np.zeros(c.shape, bool) if framed is None else np.asarray(framed, dtype=bool)
    if c.ndim != 2 or c.shape != (len(names), len(names)) or marked.shape != c.shape or not len(names):
        raise QuernelError(
            f"values and framed must be square with a name a row; got shapes {c.shape} and {marked.shape} for "
            f"{len(names)} names"
        )
    if not ((c >= 0) & (c <= 1) | np.isnan(c)).all():
        raise QuernelError(f"values must lie in [0, 1]; got {np.nanmin(c):g} to {np.nanmax(c):g}")
    width, height = LEFT + len(c) * CELL + AIR, TOP + len(c) * CELL + AIR
    return tag(
        "svg",
        tag("title", f"{len(c)} x {len(c)} scores, {rows} by {columns}"),
        tag("text", rows, x=4, y=TOP - 8),
        tag("text", columns, x=LEFT + len(c) * CELL, y=14, text_anchor="end"),
        *(_name(name, i) for i, name in enumerate(names)),
        *(
            _cell(float(c[i, j]), f"{rows} {names[i]}, {columns} {names[j]}", i, j, bool(marked[i, j]))
            for i, j in np.ndindex(c.shape)
            if not np.isnan(c[i, j])
        ),
        viewBox=f"0 0 {width} {height}",
        role="img",
        font_family="sans-serif",
        font_size=12,
        fill="currentColor",
    )


def _name(name: str, i: int) -> Markup:
    short = name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"
    middle = (i + 0.5) * CELL
    return tag(
        "g",
        tag("title", name),
        tag("text", short, x=LEFT - 8, y=TOP + middle + 4, text_anchor="end"),
        # Above the columns there is room for a cell's width only.
        tag("text", short[:8], x=LEFT + middle, y=TOP - 8, text_anchor="middle"),
    )


def _cell(value: float, text: str, i: int, j: int, framed: bool) -> Markup:
    x, y = LEFT + j * CELL, TOP + i * CELL
    return tag(
        "g",
        tag("title", f"{text}: {value:.4f}"),
        tag(
            "rect",
            x=x + 2,
            y=y + 2,
            width=CELL - 4,
            height=CELL - 4,
            rx=4,
            fill=FILL,
            # The palest shade must still be seen as a cell, the darkest leave the number legible.
            fill_opacity=round(0.08 + 0.52 * value, 3),
            stroke=FRAME if framed else None,
            stroke_width=3 if framed else None,
        ),
        tag("text", f"{value:.2f}", x=x + CELL / 2, y=y + CELL / 2 + 4, text_anchor="middle"),
    )
