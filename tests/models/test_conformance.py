"""Bundled models keep the promises of modules: determinism, threads, forks, copies, saving, compiling, exporting.

Left out is only what a model does not promise: bfloat16 inputs for float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quernel.models import DigitsCNN, MiniLM, ResNet20, SentenceEncoder, TinyLM
from quernel.testing import checks_for

CHECKS = {name: check for name, check in checks_for("module").items() if name != "low_precision"}


@pytest.mark.parametrize("cls", [DigitsCNN, ResNet20, TinyLM, SentenceEncoder, MiniLM], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_model_conforms(check: Callable[[type], None], cls: type) -> None:
    if issubclass(cls, SentenceEncoder):
        pytest.importorskip("transformers")
    check(cls)
