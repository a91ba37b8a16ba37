"""Ctrl-C and kill -9 in the middle of ``quernel compress``: nothing half-written loads, and a search goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import quernel
from quernel._errors import FormatError

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
"""
# Runs the command, and sends itself the signal just before the file of that name would be put in place.
DRIVER = """
import os, pathlib, signal, sys
from quernel.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored

folder, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
replace = pathlib.Path.replace

def interrupted(self, target):
    target = pathlib.Path(target).absolute()
    if number and str(target.parent).startswith(folder) and target.match(name):
        os.kill(os.getpid(), number)
        sum(range(1000))  # the interpreter delivers Ctrl-C between two steps
    return replace(self, target)

pathlib.Path.replace = interrupted
sys.exit(main(sys.argv[4:]))
"""
SEARCH = ["compress", "toy_net:build", "--data", "x.npz", "--budget", "bytes=0.6", "-m", "weight-int8,cast"]
MOMENTS = {
    "first trial": ("trials", "*.json"),
    "tensors": ("small", "model*.safetensors"),
    "commit": ("small", "config.json"),
}


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def _run(work: Path, moment: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder, name = MOMENTS[moment]
    command = [sys.executable, "-c", DRIVER, str(work / folder), name, str(number), *arguments]
    environment = os.environ | {"PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "toy_net.py").write_text(FACTORY, encoding="utf-8")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_search_is_interrupted_and_resumes(work: Path, moment: str, number: int) -> None:
    arguments = [*SEARCH, "--resume", "trials", "--out", "small"]
    broken = _run(work, moment, number, *arguments)
    assert broken.returncode == (130 if number == signal.SIGINT else -number), broken.stderr
    assert "Traceback" not in broken.stderr
    with pytest.raises(FormatError):
        quernel.load(work / "small", model=_build)
    kept = {file: file.stat().st_mtime_ns for file in work.glob("trials/**/*.json")}
    assert bool(kept) == (moment != "first trial")
    again = _run(work, moment, 0, *arguments)
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "finished trials were run again"
    assert quernel.load(work / "small", model=_build) is not None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_an_older_model_survives(work: Path, number: int) -> None:
    assert _run(work, "commit", 0, "compress", "toy_net:build", "-m", "cast", "--out", "small").returncode == 0
    before = quernel.load(work / "small", model=_build).state_dict()
    for moment in ("tensors", "commit"):
        broken = _run(work, moment, number, "compress", "toy_net:build", "-m", "weight-int8", "--out", "small")
        assert broken.returncode != 0
        after = quernel.load(work / "small", model=_build).state_dict()
        assert after.keys() == before.keys()
        assert all(bool((after[name] == before[name]).all()) for name in before)
