"""HTML and SVG from nested calls: ``tag("td", name, class_="num")``.

Every child and attribute is escaped unless it is ``Markup``, which only ``tag`` and ``raw`` make, so a model or
layer name cannot become markup by being forgotten.
"""

from __future__ import annotations

import html

VOID = frozenset({"img", "input", "link", "meta", "wbr"})


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; ``class_`` is ``class``, ``data_x`` is ``data-x``, None and False attributes vanish."""
    head = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{head}>")
    return Markup(f"<{name}{head}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Concatenate children, escaping what is not markup; None is nothing."""
    return Markup(
        "".join(
            str(child) if isinstance(child, Markup) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


def breakable(name: str) -> Markup:
    """Let a dotted name break after its dots."""
    first, *rest = name.split(".")
    return join(first, *(join(".", tag("wbr"), part) for part in rest))


def raw(text: str) -> Markup:
    """Vouch for text of our own (style sheet, script)."""
    return Markup(text)


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f' {name}=""'  # so that a drawing is well-formed XML too
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {name}="{html.escape(str(value))}"'
