"""Environments for peers whose requirements clash with ours: made on first use, a layer over the running one.

``peer_python("gpytorch==1.14")`` returns the interpreter of a virtual environment that sees every package of the
running environment, plus what was asked for in its own, which comes first. Torch and NumPy are therefore shared and not
downloaded again. Give the result to ``in_fresh_process(..., python=...)`` or ``IsolatedSubject(..., python=...)``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import filelock

from benchmarks._process import ROOT

FOLDER = ROOT / "build" / "peers"


class PeerUnavailable(ImportError):
    """A peer could not be installed; the message holds what pip said last."""


def peer_python(*requirements: str) -> str:
    """Return the path of a Python that can import ``requirements`` and everything that this one can.

    Parameters
    ----------
    *requirements : str
        As pip takes them, best with a pinned version.

    Raises
    ------
    PeerUnavailable
        If they cannot be installed here.
    """
    key = hashlib.sha256("\n".join((sys.version, sys.prefix, *sorted(requirements))).encode()).hexdigest()[:12]
    folder = FOLDER / key
    python = folder / "bin" / "python"
    ready = folder / "ready"
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Two processes may ask for it at once; the second waits for what the first makes.
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not ready.exists():
            _make(folder, python, requirements)
            ready.touch()
    return str(python)


def _make(folder: Path, python: Path, requirements: tuple[str, ...]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A path file puts the running environment's packages behind the layer's own.
    (own / "running.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--prefix", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        shutil.rmtree(folder, ignore_errors=True)
        raise PeerUnavailable(f"{', '.join(requirements)} cannot be installed: {last}")
