"""The command line: ``quernel demo | compress | list | info | data | doctor | warmup | index | advise | ...``.

One small file per command. Needs the extra ``cli`` (typer, rich); without it the command says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    try:
        from quernel.cli._app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "typer"):
            raise
        sys.stderr.write(f'error: the command line needs {missing}. Install it with: pip install "quernel[cli]"\n')
        return 2
    return run(arguments)
