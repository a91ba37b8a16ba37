"""Curves over several powers of ten as an SVG drawing: one line a name, the name at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from quernel.report._axis import LogAxis, by_powers

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 200, 30, 44
# Told apart by people who see no difference between red and green, on white and on black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a6d3b", "#7f7f7f")
DASHES = ("", "6 3", "2 3")
LINE_HEIGHT = 15


def chart(curves: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Return an ``<svg>`` without blank lines; both axes are logarithmic, values that are 0 are left out."""
    points = [(x, y) for curve in curves.values() for x, y in curve if y > 0]
    x_axis = by_powers([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = by_powers([y for _, y in points], HEIGHT - BOTTOM, TOP)
    lines = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>{escape(y_title)} against {escape(x_title)}</title>",
        *_grid(x_axis, y_axis, x_title, y_title),
    ]
    places = _places({name: y_axis.at(curve[-1][1]) for name, curve in curves.items() if curve[-1][1] > 0})
    for i, (name, curve) in enumerate(curves.items()):
        shown = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in curve if y > 0)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        lines.append(
            f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        if name in places:
            lines.append(
                f'<text x="{WIDTH - RIGHT + 8}" y="{places[name] + 4:.1f}" fill="{colour}">{escape(name)}</text>'
            )
    return "\n".join([*lines, "</svg>"])


def _grid(x_axis: LogAxis, y_axis: LogAxis, x_title: str, y_title: str) -> list[str]:
    lines = []
    for value, text in y_axis.ticks(5):
        y = y_axis.at(value)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_axis.ticks(5):
        x = x_axis.at(value)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#8884"/>')
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    lines.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_title)}</text>')
    lines.append(f'<text x="4" y="16">{escape(y_title)}</text>')
    return lines


def _places(ends: Mapping[str, float]) -> dict[str, float]:
    """Return the pixel of each label, moved down where it would lie on the one above."""
    places: dict[str, float] = {}
    last = -float(LINE_HEIGHT)
    for name, y in sorted(ends.items(), key=lambda item: item[1]):
        last = max(y, last + LINE_HEIGHT)
        places[name] = last
    return places
