"""Texts cut into passages: paragraphs joined until there is something to find in them, long ones cut at sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quernel._errors import DataError, QuernelError

ENDINGS = (".txt", ".md", ".rst", ".text")
# What an encoder of 256 tokens reads in one go, and what is long enough to stand alone.
MOST_WORDS, LEAST_WORDS = 160, 40
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Passage:
    """A piece of a text and the line of its file, counted from 1, on which it begins."""

    text: str
    line: int


def passages_of(text: str) -> list[Passage]:
    """Cut a text into passages of about 40 to 160 words; nothing but white space is lost.

    Examples
    --------
    >>> passages_of("One two. Three four.")
    [Passage(text='One two. Three four.', line=1)]
    """
    found: list[Passage] = []
    held: list[str] = []
    first, words = 0, 0
    for line, paragraph in _paragraphs(text):
        for piece in _pieces(paragraph):
            size = len(piece.split())
            if held and words + size > MOST_WORDS:
                found.append(Passage("\n\n".join(held), first))
                held, words = [], 0
            first = first if held else line
            held.append(piece)
            words += size
            if words >= LEAST_WORDS:
                found.append(Passage("\n\n".join(held), first))
                held, words = [], 0
    return [*found, Passage("\n\n".join(held), first)] if held else found


def text_files(path: Path) -> list[Path]:
    """Return the text files of a folder, in order, or the file itself; hidden ones are left out.

    Raises
    ------
    DataError
        If there is nothing, or no text file in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{_shown(path)}: there is no such file or folder")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in ENDINGS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise DataError(f"{_shown(path)} holds no text file; texts end in {', '.join(ENDINGS)}")
    return found


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises
    ------
    DataError
        If it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{_shown(file)} cannot be read as UTF-8 text: {error}") from error


def name_of(file: Path, root: Path) -> str:
    """Return the name by which a file is known: its path below the folder ``root``, or ``root``'s own name.

    Raises
    ------
    DataError
        If the name is not UTF-8, as one from another system's archive may be: it could not be kept.
    """
    name = file.name if file == root else file.relative_to(root).as_posix()
    try:
        return check_text("name", name)
    except QuernelError as error:
        raise DataError(f"{_shown(file)}: its name is not UTF-8; rename the file") from error


def check_text(argument: str, text: Any, *, may_be_empty: bool = False) -> str:
    """Return a text if there is something in it and UTF-8 can hold it."""
    if not isinstance(text, str) or not (text or may_be_empty):
        wanted = "a text" if may_be_empty else "a text that is not empty"
        raise QuernelError(f"{argument} must be {wanted}; got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QuernelError(
            f"{argument} must be Unicode; it has half a character, {text[error.start]!a}, at {error.start}. Text that "
            "was decoded with errors='surrogateescape' is not"
        ) from error
    return text


def _shown(path: Path) -> str:
    """Return a path that any stream can write: bytes that are not UTF-8 come as escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield what stands between empty lines, with its first line."""
    held: list[str] = []
    first = 1
    for number, line in enumerate((*text.splitlines(), ""), 1):
        if line.strip():
            first = first if held else number
            held.append(line.strip())
        elif held:
            yield first, "\n".join(held)
            held = []


def _pieces(paragraph: str) -> Iterator[str]:
    """Yield a paragraph, or groups of its sentences, or of its words where a sentence has too many."""
    if len(paragraph.split()) <= MOST_WORDS:
        yield paragraph
        return
    held: list[str] = []
    words = 0
    for sentence in _SENTENCE.split(paragraph):
        parts = sentence.split()
        short = [sentence] if len(parts) <= MOST_WORDS else [" ".join(p) for p in _chunks(parts)]
        for part in short:
            size = len(part.split())
            if held and words + size > MOST_WORDS:
                yield " ".join(held)
                held, words = [], 0
            held.append(part)
            words += size
    yield " ".join(held)


def _chunks(words: list[str]) -> Iterator[list[str]]:
    yield from (words[i : i + MOST_WORDS] for i in range(0, len(words), MOST_WORDS))
