"""Every registered class passes the suite of its contract; a new one takes part by being registered."""

import pytest

from quernel._registry import Entry, catalogue
from quernel.testing import checks_for

CASES = [
    pytest.param(entry, name, id=f"{entry.name}-{name}") for entry in catalogue() for name in checks_for(entry.contract)
]


@pytest.mark.parametrize(("entry", "name"), CASES)
def test_conformance(entry: Entry, name: str) -> None:
    checks_for(entry.contract)[name](entry.resolve())
