"""The list of systems: headlines that are no models, joined with the verdicts of the ledger."""

from __future__ import annotations

import pytest

import quernel
from quernel import _catalogue
from quernel._registry import catalogue


def test_every_headline_but_models_is_listed_once() -> None:
    slugs = [row["slug"] for row in quernel.list_methods()]
    assert slugs == sorted(set(slugs))
    assert set(slugs) == {e.slug for e in catalogue() if e.headline and e.contract != "model"}
    assert {"cast", "crossquant", "feature-merging", "weight-int8", "welore"} <= set(slugs)


def test_rows_carry_the_ledgers_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_catalogue, "verdict_of", lambda slug: f"verdict of {slug}")
    assert all(row["verdict"] == f"verdict of {row['slug']}" for row in quernel.list_methods())
