"""Curves as SVG: every line and label is there, labels do not lie on each other, text is escaped."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

from quernel.report._curves import LINE_HEIGHT, chart


def test_every_curve_is_a_line_with_its_name() -> None:
    curves = {"a & b": [(64, 1.0), (256, 10.0)], "flat": [(64, 1.0), (256, 1.0)], "gone": [(64, 0.0), (256, 0.0)]}
    drawn = chart(curves, "tokens", "ms")
    tree = ElementTree.fromstring(drawn)
    texts = [e.text for e in tree.iter() if e.tag.endswith("text")]
    assert {"a & b", "flat", "tokens", "ms"} <= set(texts) and "gone" not in texts
    lines = [e for e in tree.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3 and "\n\n" not in drawn
    points = [tuple(map(float, p.split(","))) for p in lines[0].get("points", "").split()]
    # Ten times as much lies higher, and four times as many tokens further right.
    assert points[1][0] > points[0][0] and points[1][1] < points[0][1]


def test_labels_of_equal_ends_stand_below_each_other() -> None:
    drawn = chart({f"n{i}": [(1, 1.0), (10, 5.0)] for i in range(5)}, "x", "y")
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)" fill="#', drawn))
    assert all(b - a >= LINE_HEIGHT - 0.2 for a, b in itertools.pairwise(places))
