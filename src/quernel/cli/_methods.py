"""How methods are written on the command line: ``--method crossquant,cast --option crossquant.alpha=0.5``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quernel._errors import QuernelError
from quernel._registry import catalogue, find

if TYPE_CHECKING:
    from quernel.compress import Method


def chosen_methods(slugs: Sequence[str], options: Sequence[str]) -> list[Method]:
    """Return the methods that ``--method`` names, built with their ``--option``s."""
    given = _options(slugs, options)
    return [_build(slug, given.get(slug, {})) for slug in slugs]


def search_menu(slugs: Sequence[str], options: Sequence[str]) -> list[Method] | None:
    """Return what a search should try: one method where options fix it, else its whole menu; None for all."""
    if not slugs:
        _options(slugs, options)
        return None
    given = _options(slugs, options)
    menu: list[Method] = []
    for slug in slugs:
        menu += [_build(slug, given[slug])] if slug in given else _class_of(slug).menu()
    return menu


def split_list(values: Sequence[str] | None) -> list[str]:
    """Return the items of a repeatable option whose values may be comma-separated."""
    return [item.strip() for value in values or () for item in value.split(",") if item.strip()]


def _options(slugs: Sequence[str], options: Sequence[str]) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {}
    for option in options:
        target, equals, text = option.partition("=")
        slug, dot, name = target.partition(".")
        if not (equals and dot and name):
            raise QuernelError(f"--option must read METHOD.NAME=VALUE, e.g. crossquant.alpha=0.5; got {option!r}")
        if slug not in slugs:
            raise QuernelError(f"--option {option!r} is for {slug!r}, which --method does not name")
        given.setdefault(slug, {})[name] = _value(text)
    return given


def _build(slug: str, options: dict[str, Any]) -> Method:
    cls = _class_of(slug)
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise QuernelError(f"{slug} has no option {', '.join(unknown)}; it has: {', '.join(names) or 'none'}")
    return cls.from_config(options)


def _class_of(slug: str) -> type[Method]:
    methods = [e.slug for e in catalogue() if e.contract == "method" and e.headline]
    if slug not in methods:
        raise QuernelError(f"--method must be one of {', '.join(methods)}; got {slug!r}")
    return find(slug).resolve()


def _value(text: str) -> Any:
    """Read numbers, true, false, null and lists as JSON; anything else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
