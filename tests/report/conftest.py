"""Fixtures of the report's tests: a report that uses everything, and a real browser.

Without a browser the ``browser`` tests skip and say so, except where ``CI`` is true: there they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from quernel.report import LayerReport, Report, TrialReport
from tests.report.chromium import Chromium

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
EVIL = "<script>window.pwned = 1</script>\"'&|`"


@pytest.fixture(scope="session")
def report() -> Report:
    """A search over an encoder, with every field filled and hostile names."""
    return Report(
        title=f"encoder {EVIL}",
        methods=("CrossQuant(bits=8, alpha=0.15)", "Cast(dtype='bfloat16')"),
        bytes_before=90_000_000,
        bytes_after=30_000_000,
        latency_ms_before=300.0,
        latency_ms_after=100.0,
        latency_speedup=3.1,
        metric="spearman",
        metric_before=0.82,
        metric_after=0.8196,
        metric_interval=(-0.0012, 0.0004),
        layers=_layers(),
        trials=_trials(),
        budget={"bytes": 0.5, "drop": 0.01},
        satisfied=True,
        warnings=(f"few pairs {EVIL}",),
        summary={"quantised layers": 30, "mean relative error": 0.0123, "rank": None},
        environment={"cpu": "a processor", "threads": 2, "versions": {"torch": "2.13.0", "numba": "0.62"}},
        seconds=83.2,
    )


def _layers() -> tuple[LayerReport, ...]:
    layers = [
        LayerReport(
            f"encoder.layer.{i}.dense", "Linear", "int8", "", 400_000, 101_000, 0.001 * (i + 1), {"alpha": 0.15}
        )
        for i in range(12)
    ]
    layers.append(LayerReport("encoder.norm", "LayerNorm", "skip", "holds no matrix", 3072, 3072))
    layers.append(
        LayerReport(f"head.{EVIL}", "Linear", "keep", f"excluded {EVIL}", 2000, 2000, 0.0, {"latency_ms": 0.2})
    )
    return tuple(layers)


def _trials() -> tuple[TrialReport, ...]:
    before = 90_000_000
    return (
        TrialReport("k0", "original", (), before, before, 300.0, 0.82, on_front=True),
        TrialReport("k1", "bf16", ("Cast()",), before, 45_000_000, 120.0, 0.8199, on_front=True),
        TrialReport("k2", "int8 + bf16", ("CrossQuant()", "Cast()"), before, 30_000_000, 100.0, 0.8196, True, True),
        TrialReport("k3", f"low-rank {EVIL}", ("WeLore()",), before, 60_000_000, 250.0, 0.77),
        TrialReport("k4", "merge", ("FeatureMerging()",), before, 40_000_000, None, 0.79),
        TrialReport("k5", "merge less", ("FeatureMerging()",), before, None, status="pruned", reason="hopeless"),
        TrialReport("k6", "rank 1", ("WeLore()",), before, 9_000_000, None, float("nan"), status="failed"),
    )


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser shared by the session's tests."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have a browser: none of {', '.join(NAMES)} is on PATH")
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    browser = Chromium(executable, tmp_path_factory.mktemp("chromium"))
    try:
        yield browser
    finally:
        browser.close()
