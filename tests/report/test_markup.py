"""Nothing but markup is markup."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from quernel.report._markup import Markup, breakable, join, raw, tag


@settings(max_examples=50)
@given(st.text())
def test_text_and_attributes_are_escaped(text: str) -> None:
    markup = tag("p", text, title=text)
    inside = markup.removeprefix("<p title=").removesuffix("</p>")
    assert inside.count("<") == 0
    assert inside.count('"') == 2  # the attribute's own quotes
    assert inside.count(">") == 1


def test_children_nest_and_none_vanishes() -> None:
    assert tag("p", tag("b", "a&b"), None, 3) == "<p><b>a&amp;b</b>3</p>"
    assert tag("input", type="search", hidden=True, value=None, class_="x", data_v=0.5) == (
        '<input type="search" hidden="" class="x" data-v="0.5">'
    )
    assert tag("g", x=-0.001, y=12.0, z=1.234) == '<g x="-0" y="12" z="1.23"></g>'
    assert isinstance(join("a", raw("<b>")), Markup)
    assert join("<", raw("<")) == "&lt;<"


def test_dotted_names_may_break_after_dots_only() -> None:
    assert breakable("a.<b>.c") == "a.<wbr>&lt;b&gt;.<wbr>c"
    assert breakable("plain") == "plain"
