"""Commands that need the repository: where it is, and how its scripts are run.

``reproductions/`` and ``benchmarks/`` are not part of the installed package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quernel._claims import claims_path
from quernel._errors import QuernelError


def checkout(folder: str) -> Path:
    """Return the root of the checkout that holds ``folder``."""
    root = claims_path().parent
    if not (root / "pyproject.toml").is_file() or not (root / folder).is_dir():
        raise QuernelError(
            f"{folder}/ is part of the repository, not of the installed package; clone it and run "
            '`pip install -e ".[dev]"` there'
        )
    return root


def run_script(root: Path, arguments: Sequence[str], *, as_json: bool) -> tuple[int, Any]:
    """Run Python with ``arguments`` in ``root``; return its exit code and the JSON of its last line, if asked for.

    Without ``as_json`` the output goes straight to the terminal.
    """
    command = [sys.executable, *arguments, *(["--json"] if as_json else [])]
    # Ctrl-C reaches the child from the terminal; run() waits for it and raises here as well.
    done = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE if as_json else None, env=os.environ)
    if not as_json:
        return done.returncode, None
    lines = (done.stdout or "").strip().splitlines()
    try:
        return done.returncode, json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as error:
        if done.returncode:
            return done.returncode, None
        raise QuernelError(f"{' '.join(arguments)} did not end with a line of JSON") from error


def choose(wanted: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Return the wanted slugs, all of them if none was named."""
    unknown = [slug for slug in wanted if slug not in known]
    if unknown:
        raise QuernelError(f"there is no {what} of {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    return list(wanted) or list(known)
