"""MkDocs hook: puts a page of every system into the navigation, grouped by pillar as the registry says."""

from __future__ import annotations

from typing import Any

from quernel._catalogue import list_methods


def on_config(config: Any) -> Any:
    """Fill the "Systems" section of the navigation."""
    by_pillar: dict[str, list[dict[str, str]]] = {}
    for row in list_methods():
        by_pillar.setdefault(str(row["pillar"]), []).append({str(row["slug"]): f"methods/{row['slug']}.md"})
    for section in config.nav:
        if "Systems" in section:
            section["Systems"] = ["methods/index.md", *({pillar: pages} for pillar, pages in sorted(by_pillar.items()))]
    return config
