"""``list_methods``: every system of the library in one table, read without importing any of them.

Joins what the registry says (name, pillar, paper, status) with the verdict of the claims ledger. The
models of ``quernel.models`` are registered too, for loading; they are no systems and not listed.
"""

from __future__ import annotations

from quernel._claims import verdict_of
from quernel._registry import Entry, catalogue


def list_methods() -> list[dict[str, str | None]]:
    """List the systems of the library.

    Returns
    -------
    rows : list of dict
        One row a system, sorted by slug, with ``slug``, ``name`` (of the class that stands for it), ``pillar``,
        ``paper`` (arXiv number, or None for a baseline), ``status``, ``verdict`` (``"reproduced"``,
        ``"partly"``, ``"not reproduced"``, or ``""`` where nothing is claimed) and ``summary``.

    Examples
    --------
    >>> import quernel
    >>> "crossquant" in [row["slug"] for row in quernel.list_methods()]
    True
    """
    return [row(entry) for entry in catalogue() if entry.headline and entry.contract != "model"]


def row(entry: Entry) -> dict[str, str | None]:
    """Return what lists say about one entry."""
    return {
        "slug": entry.slug,
        "name": entry.name,
        "pillar": entry.pillar,
        "paper": entry.paper,
        "status": entry.status,
        "verdict": verdict_of(entry.slug),
        "summary": entry.summary,
    }
