"""The drawings: the front is the front, points stand where they should, missing values look missing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from hypothesis import given, settings
from hypothesis import strategies as st

from quernel.report._svg import Band, Frame, Point, front, heat_map, pareto_plot, share_bar

FRAME = Frame(960, 430, "size (MB)", "accuracy", limit_x=50.0, limit_y=0.5)
points = st.builds(Point, st.floats(0, 100), st.floats(-5, 5), st.just("p"), st.just("t"))


@settings(max_examples=50)
@given(st.lists(points, min_size=1, max_size=30))
def test_front_is_exactly_what_no_point_beats(points: list[Point]) -> None:
    best = front(points)
    for p in points:
        beaten = any(q.x <= p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y) for q in points)
        assert beaten != any((b.x, b.y) == (p.x, p.y) for b in best)
    assert [b.x for b in best] == sorted({b.x for b in best})


def test_points_stand_left_to_right_and_bottom_to_top() -> None:
    drawing = pareto_plot([Point(10, 0.2, "a", "a"), Point(90, 0.9, "b", "b")], FRAME)
    dots = [dict(e.attrib) for e in ET.fromstring(drawing).iter("circle") if e.attrib["class"] == "dot"]
    assert float(dots[0]["cx"]) < float(dots[1]["cx"])
    assert float(dots[0]["cy"]) > float(dots[1]["cy"])
    assert all(58 <= float(d["cx"]) <= 946 and 34 <= float(d["cy"]) <= 382 for d in dots)


def test_one_tab_stop_and_one_hover_text_a_point() -> None:
    drawing = ET.fromstring(pareto_plot([Point(i, i / 9, f"p{i}", f"text {i}") for i in range(9)], FRAME))
    marks = [e for e in drawing.iter("g") if e.attrib.get("class", "").startswith("mark")]
    assert [m.attrib["tabindex"] for m in marks] == ["0"] + ["-1"] * 8
    assert [m.find("title").text for m in marks] == [f"text {i}" for i in range(9)]


def test_chosen_and_original_are_labelled() -> None:
    drawing = pareto_plot([Point(1, 1, "mine", "", chosen=True), Point(2, 2, "old", "", original=True)], FRAME)
    labels = {e.text for e in ET.fromstring(drawing).iter("text") if e.attrib["class"] == "label"}
    assert labels == {"mine", "old"}


def test_limits_are_drawn_only_inside_the_frame() -> None:
    near = [Point(10, 0.2, "a", ""), Point(90, 0.9, "b", "")]
    far = [Point(1, 0.8, "a", ""), Point(2, 0.9, "b", "")]
    assert pareto_plot(near, FRAME).count('class="limit"') == 2
    assert pareto_plot(far, FRAME).count('class="limit"') == 0


def test_heat_map_has_a_column_a_layer_and_marks_gaps() -> None:
    bands = [Band("Size left", (0.0, 0.5, 1.0), "size"), Band("Relative error", (None, 0.0, 1.0), "error")]
    drawing = heat_map(bands, ["a", "<b>", "c"], cell=20, row=40)
    tree = ET.fromstring(drawing)
    assert [e.find("title").text for e in tree.iter("g")] == ["a", "<b>", "c"]
    assert drawing.count("missing") == 1
    shades = [float(s) for s in re.findall(r'cell size" fill-opacity="([\d.]+)"', drawing)]
    assert shades == sorted(shades)
    assert shades[0] > 0
    assert shades[-1] == 1


def test_share_bar_never_leaves_its_box() -> None:
    assert share_bar(None) is None
    assert 'width="25"' in share_bar(0.25)
    assert 'width="200"' not in share_bar(2.0)


def test_a_known_front_is_drawn_as_it_is() -> None:
    points = [Point(10, 0.5, "a", "a"), Point(20, 0.4, "b", "b")]
    groups = ET.fromstring(pareto_plot(points, FRAME, points[1:])).iter("g")
    marks = [e.attrib.get("class", "") for e in groups]
    assert [m for m in marks if m.startswith("mark")] == ["mark behind", "mark on-front"]
