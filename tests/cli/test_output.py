"""What commands print with: tables that fit the screen, docstrings filled again, progress without a terminal."""

from __future__ import annotations

import pytest

from quernel.cli import _output, main


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


ROWS = [("one", "first", "a long text of many words that does not fit beside the others " * 2), ("two", None, "short")]


def test_a_last_column_without_room_stands_below(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    wide = "n" * 50
    _output.table(("name", wide, "text"), ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", wide, "(text", "below)"]
    assert lines[1].split() == ["one", "first"]
    assert lines[2].startswith("    a long text of many words")
    assert [line.split() for line in lines[-2:]] == [["two", "-"], ["short"]]
    assert max(map(len, lines)) <= 80


def test_several_columns_below_carry_their_names(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    _output.table(("name", "m" * 90, "text"), [("one", "[bold]x", "y")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == ["one", f"    {'m' * 76}", f"    {'m' * 14}: [bold]x", "    text: y"]


def test_a_table_that_fits_has_its_columns_beside_each_other(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    _output.table(("name", "kind", "text"), ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "kind", "text"]
    assert lines[1].startswith("one   first  a long text")


@pytest.mark.parametrize("words", [["list"], ["info", "crossquant"], ["info", "shiftaddvit"], ["data"]])
def test_80_columns_break_no_word(words: list[str], narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = set(capsys.readouterr().out.split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        assert main(words) == 0
    # Of columns that stand below, the heads may be left out.
    assert set(capsys.readouterr().out.split()) - shown <= {"summary", "metric", "claim"}


def test_docstrings_are_filled_again_but_not_their_examples(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 30
    example = f">>> call({'x' * 90})"
    _output.prose(f"{long}\nends.\n\nNotes\n-----\n    {long}\n    here [b].\n\nshort\nlines\n\n{example}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["word"] * 14 + ["ends."] and lines[3:5] == ["Notes", "-----"]
    assert all(line.startswith("    word") for line in lines[5:7]) and lines[7] == "    here [b]."
    assert lines[-4:] == ["short", "lines", "", example]


def test_steps_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with _output.progress_bar(steps=True) as progress:
        progress("Cast", 0.0)
        progress("CrossQuant + [x]", 0.5)
    assert capsys.readouterr() == ("", "1: Cast\n2: CrossQuant + [x]\n")
    with _output.progress_bar() as progress:
        progress("epoch 1", 0.0)
    assert capsys.readouterr() == ("", "")
