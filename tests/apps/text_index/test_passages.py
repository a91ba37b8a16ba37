"""Passages: nothing is lost, lines are right, sizes are kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quernel._errors import DataError
from quernel.apps.text_index import passages_of
from quernel.apps.text_index.passages import LEAST_WORDS, MOST_WORDS, read_text, text_files

WORDS = st.lists(st.sampled_from(["a", "long", "word.", "end!", "\n", "\n\n", "  \n \n", "x\ty"]), max_size=600)


@given(WORDS)
def test_no_word_is_lost_or_moved(words: list[str]) -> None:
    text = " ".join(words)
    found = passages_of(text)
    assert " ".join(p.text for p in found).split() == text.split()
    assert all(0 < len(p.text.split()) <= MOST_WORDS for p in found)


@given(WORDS)
def test_only_the_last_passage_or_one_before_a_long_one_is_short(words: list[str]) -> None:
    found = passages_of(" ".join(words))
    for one, following in itertools.pairwise(found):
        sizes = len(one.text.split()), len(following.text.split())
        assert sizes[0] >= LEAST_WORDS or sum(sizes) > MOST_WORDS


def test_lines_are_those_of_the_file() -> None:
    long = "word " * LEAST_WORDS
    found = passages_of(f"\n\n{long}\n\nshort\n\n\n{long}\nmore\n")
    assert [p.line for p in found] == [3, 5]
    assert [p.line for p in passages_of("one sentence. " * 200)] == [1, 1, 1]
    assert passages_of("  \n\n") == []


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.MD", ".hidden/x.txt", "a/.x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [f.relative_to(tmp_path).as_posix() for f in text_files(tmp_path)] == ["a/c.MD", "b.txt"]
    assert text_files(tmp_path / "picture.png") == [tmp_path / "picture.png"]
    with pytest.raises(DataError, match="no such"):
        text_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text file"):
        text_files(tmp_path / "empty")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "b.txt")
