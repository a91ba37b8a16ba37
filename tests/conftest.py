"""What every test gets: no network, a fixed torch seed, and torch's settings as they were before.

Workers of pytest-xdist run one torch thread each, so that two workers on two cores do not fight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# CI tries the same examples every time; on a developer's machine each run tries others and remembers failures.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Before anything imports a hub client: the suite must pass with the cable pulled.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed torch and put its global settings back, so that no test depends on the one before."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that a kernel which forgets to write an element is seen."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets, or skip: it is optional and never fetched by a test."""
    folder = os.environ.get("QUERNEL_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("QUERNEL_DATA names no folder of real data sets")
    return Path(folder)
