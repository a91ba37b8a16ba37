"""The frame of all commands: how they are found, and how their errors become one line and an exit code.

Commands raise quernel errors; only here are they turned into text. ``--debug`` lets them through.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from quernel import __version__
from quernel._errors import QuernelError
from quernel.cli import _advise, _bench, _compress, _data, _demo, _doctor, _index, _info, _list, _reproduce, _warmup

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# What they say on import concerns their developers.
CHATTY = ("torchao", "torch.utils._pytree", "transformers")

app = typer.Typer(
    name="quernel",
    help="Make trained PyTorch models smaller and faster, and show the proof.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(_demo.demo)
app.command("compress")(_compress.compress)
app.command("list")(_list.list_systems)
app.command("info")(_info.info)
app.command("data")(_data.data)
app.command("doctor")(_doctor.doctor)
app.command("warmup")(_warmup.warmup)
app.add_typer(_index.app, name="index")
app.command("advise")(_advise.advise)
app.command("reproduce")(_reproduce.reproduce)
app.command("bench")(_bench.bench)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"quernel {__version__}\n")
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see ``quernel.cli.main``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Wherever it stands on the line: one adds it after a failure.
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _one_line_warning
            for library in CHATTY:
                logging.getLogger(library).setLevel(logging.ERROR)
        try:
            code = app(args=given or ["--help"], prog_name="quernel", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            return _say("interrupted", INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            return _explain(error)
    if code == INTERRUPTED:
        return _say("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return _say(usage(), BAD_INPUT)
    if isinstance(error, QuernelError):
        return _say(str(error), BAD_INPUT)
    if isinstance(error, OSError) and error.filename is not None:
        return _say(f"{error.filename}: {error.strerror}", BAD_INPUT)
    return _say(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", FAILED)


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    # Only what the user can change; the deprecations of other libraries are not for them.
    if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
        sys.stderr.write(f"warning: {' '.join(str(message).split())}\n")
