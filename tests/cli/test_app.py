"""The frame of the command line: exit codes, one-line errors, JSON alone on standard output."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import quernel
from quernel._errors import QuernelError
from quernel.cli import _app, _list, main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quernel {quernel.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for command in ("demo", "compress", "list", "info", "data", "doctor", "warmup", "reproduce", "bench"):
        assert f"  {command} " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "No such command"),
        (["list", "--nosuch"], "No such option"),
        (["info"], "Missing argument"),
        (["info", "nosuch"], "no system or class is called 'nosuch'; known systems: cast"),
        (["data", "nosuch"], "data set must be one of"),
        (["data", "--download"], "--download needs the name of one data set"),
        (["reproduce", "nosuch"], "there is no reproduction of nosuch"),
        (["bench", "nosuch"], "there is no benchmark of nosuch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == _app.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (QuernelError("x must\nbe 1; got 2"), _app.BAD_INPUT, "error: x must be 1; got 2\n"),
        (
            FileNotFoundError(2, "No such file or directory", "w.npz"),
            _app.BAD_INPUT,
            "error: w.npz: No such file or directory\n",
        ),
        (RuntimeError("odd"), _app.FAILED, "error: RuntimeError: odd (run again with --debug for the traceback)\n"),
        (KeyboardInterrupt(), _app.INTERRUPTED, "error: interrupted\n"),
    ],
)
def test_errors_become_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(_list, "list_methods", fail)
    assert main(["list"]) == code
    # The shell's ^C leaves its own line behind.
    assert capsys.readouterr().err.lstrip("\n") == message


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(_list, "list_methods", fail)
    with pytest.raises(RuntimeError, match="odd"):
        main(["list", "--debug"])


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    def warn() -> list[dict[str, str]]:
        warnings.warn("first line\nsecond", UserWarning, stacklevel=1)
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        return []

    monkeypatch.setattr(_list, "list_methods", warn)
    assert main(["list", "--json"]) == 0
    assert capsys.readouterr() == ("[]\n", "warning: first line second\n")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_how_to_get_it(missing: str) -> None:
    code = (
        f"import sys; sys.modules['{missing}'] = None\nfrom quernel.cli import main\nraise SystemExit(main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f'error: the command line needs {missing}. Install it with: pip install "quernel[cli]"\n'


def test_a_closed_pipe_is_no_error() -> None:
    code = "from quernel.cli import main; raise SystemExit(main(['list', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("arguments", [["list"], ["info", "cast"], ["data"], ["data", "digits"], ["doctor"]])
def test_json_stands_alone(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err == ""
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()
