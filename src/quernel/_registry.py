"""The registry: one literal decorator per class, read with ``ast`` so that listing imports nothing.

``@register("slug", pillar=..., contract=..., paper=..., status=...)`` stands above a class. The
catalogue (``quernel list``, docs, README table, benchmark and conformance lists) is what those
decorators say; the classes they name are also the only ones that ``quernel.load`` will build.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quernel._errors import FormatError, QuernelError

Registered = TypeVar("Registered", bound=type)

CONTRACTS = (
    "module", "mixer", "weight", "method", "model", "estimator", "index", "sketch", "cache", "trainer", "diagnostic",
    "application",
)  # fmt: skip
STATUSES = ("stable", "experimental")


@dataclass(frozen=True)
class Entry:
    """What one decorator says, plus where it stands."""

    slug: str
    name: str
    module: str
    pillar: str
    contract: str
    paper: str | None
    status: str
    headline: bool
    summary: str

    def resolve(self) -> type:
        """Import the module and return the class."""
        return getattr(importlib.import_module(self.module), self.name)


def register(
    slug: str,
    *,
    pillar: str,
    contract: str,
    paper: str | None,
    status: str,
    headline: bool = True,
    example: Callable[[], Any] | None = None,
) -> Callable[[Registered], Registered]:
    """Enter a class in the catalogue; everything but ``example`` must be a literal.

    Parameters
    ----------
    slug : str
        Short name with hyphens; several classes of one system share it.
    pillar : str
        Package that exports the class, e.g. ``"compress"``.
    contract : str
        Which conformance suite the class must pass; one of ``CONTRACTS``.
    paper : str or None
        arXiv number, or None for a baseline or a storage format.
    status : {"stable", "experimental"}
        Promise made to users.
    headline : bool, default=True
        Whether this class stands for the system in lists.
    example : callable, optional
        Gives what the conformance suite of ``contract`` needs (see ``quernel.testing``).
    """

    def enter(cls: Registered) -> Registered:
        cls._quernel_slug = slug  # type: ignore[attr-defined]
        cls._quernel_contract = contract  # type: ignore[attr-defined]
        cls._quernel_example = staticmethod(example) if example is not None else None  # type: ignore[attr-defined]
        return cls

    return enter


def example_of(cls: type) -> Any:
    """Call the ``example`` that the class was registered with."""
    example = cls.__dict__.get("_quernel_example")
    if example is None:
        raise QuernelError(f"{cls.__name__} is registered without example=; conformance needs one")
    return example.__func__()


@functools.cache
def catalogue() -> tuple[Entry, ...]:
    """Every registered class, sorted by slug with the headline first; imports none of them."""
    root = Path(__file__).parent
    entries = [entry for file in sorted(root.rglob("*.py")) for entry in _entries_in(file, root)]
    return tuple(sorted(entries, key=lambda e: (e.slug, not e.headline, e.name)))


def find(name: str) -> Entry:
    """Return the headline entry of a slug, or the entry of a class."""
    for entry in catalogue():
        if entry.name == name or (entry.slug == name and entry.headline):
            return entry
    known = ", ".join(sorted({e.slug for e in catalogue() if e.headline}))
    raise QuernelError(f"no system or class is called {name!r}; known systems: {known}")


def resolve_class(name: object, *, file: str, field: str) -> type:
    """Return the registered class of this name; the allow-list of everything that loads files."""
    for entry in catalogue():
        if entry.name == name:
            return entry.resolve()
    raise FormatError(f"{file}: field {field!r} names {name!r}, which is not a class of this version of Quernel")


def _entries_in(file: Path, root: Path) -> list[Entry]:
    source = file.read_text(encoding="utf-8")
    if "@register(" not in source:
        return []
    module = ".".join(("quernel", *file.relative_to(root).with_suffix("").parts))
    found: list[Entry] = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        calls = (call for call in node.decorator_list if isinstance(call, ast.Call))
        found += [_entry(call, node, module, file) for call in calls if ast.unparse(call.func) == "register"]
    return found


def _entry(call: ast.Call, node: ast.ClassDef, module: str, file: Path) -> Entry:
    try:
        fields = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg not in (None, "example")}
        slug = ast.literal_eval(call.args[0])
    except (ValueError, IndexError) as error:
        raise QuernelError(f"{file}: @register of {node.name} must be given literals") from error
    if fields.get("contract") not in CONTRACTS or fields.get("status") not in STATUSES:
        raise QuernelError(f"{file}: @register of {node.name} has an unknown contract or status: {fields}")
    if not isinstance(slug, str) or not isinstance(fields.get("pillar"), str):
        raise QuernelError(f"{file}: @register of {node.name} lacks its slug or its pillar: {fields}")
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    return Entry(
        slug=slug,
        name=node.name,
        module=module,
        pillar=fields["pillar"],
        contract=fields["contract"],
        paper=fields.get("paper"),
        status=fields["status"],
        headline=fields.get("headline", True),
        summary=summary,
    )
