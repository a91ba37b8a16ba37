"""The drawing of a matrix: every number, empty cells, frames, escaped names, refusals."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.report import matrix_map

C = np.array([[0.5, np.nan], [0.625, 0.9]])


def parts(drawn, kind):
    return [e for e in ElementTree.fromstring(drawn).iter() if e.tag == kind]


def test_every_number_is_shown_and_nothing_where_there_is_none():
    drawn = matrix_map(C, ["v1 <old>", "v2"], rows="queries & co")
    texts = [e.text for e in parts(drawn, "text")]
    assert {"0.50", "0.62", "0.90", "v1 <old>", "v2", "queries & co", "gallery"} <= set(texts)
    cells = parts(drawn, "rect")
    assert len(cells) == 3
    shades = [float(e.get("fill-opacity")) for e in cells]
    assert shades == sorted(shades) and shades[0] < shades[-1]
    # The second row lies below the first, its second cell right of its first.
    places = [(float(e.get("x")), float(e.get("y"))) for e in cells]
    assert places[1][1] > places[0][1] and places[2][0] > places[1][0] and places[2][1] == places[1][1]
    assert any("queries & co v2, gallery v1 <old>: 0.6250" in (e.text or "") for e in parts(drawn, "title"))


def test_frames_are_where_they_are_asked_for():
    framed = np.array([[False, False], [True, False]])
    strokes = [e.get("stroke") for e in parts(matrix_map(C, ["a", "b"], framed=framed), "rect")]
    assert [s is not None for s in strokes] == [False, True, False]


@pytest.mark.parametrize(
    ("values", "names", "options", "message"),
    [
        (C, ["a"], {}, "a name a row"),
        (C[:1], ["a"], {}, "square"),
        (C, ["a", "b"], {"framed": [[True]]}, "square"),
        (100 * C, ["a", "b"], {}, r"lie in \[0, 1\]; got 50 to 90"),
        (np.zeros((0, 0)), [], {}, "square"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values, names, options, message):
    with pytest.raises(QuernelError, match=message):
        matrix_map(values, names, **options)
