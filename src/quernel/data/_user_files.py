"""A user's own data file: ``from_path`` reads model inputs from npz, sentences from txt, csv, tsv, jsonl."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quernel._errors import DataError
from quernel.data._kinds import Arrays, Pairs, Sentences

_SENTENCE_COLUMNS = ("text", "sentence")
_PAIR_COLUMNS = ("sentence1", "sentence2", "score")


def from_path(path: str | os.PathLike[str]) -> Arrays | Pairs | Sentences:
    r"""Read a user's own calibration or test data.

    Parameters
    ----------
    path : str or path
        ``.npz`` with ``x`` (n, ...), what the model takes (floats go in as float32), and perhaps ``y`` (n,) classes;
        ``.txt`` with one sentence a line; ``.jsonl`` with a string or an object with ``text`` or ``sentence``
        a line; ``.csv``/``.tsv`` with columns ``sentence1, sentence2, score`` (pairs), or a column ``text`` or
        ``sentence``, or no header (first column). Text is UTF-8; blank lines are skipped.

    Returns
    -------
    Arrays, Pairs or Sentences

    Raises
    ------
    DataError
        If the file is missing, empty, of an unknown type, or cannot be parsed (with the line number).

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from quernel.data import from_path
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "mine.txt"
    >>> _ = file.write_text("One sentence.\nAnother one.\n")
    >>> from_path(file).text
    ('One sentence.', 'Another one.')
    """
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path, bytes], Arrays | Pairs | Sentences]]
    readers = {".npz": _arrays, ".txt": _lines, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data file must end in {', '.join(readers)}; got {str(path)!r}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read data file {str(path)!r}: {error.strerror}") from error
    if not content:
        raise DataError(f"data file {str(path)!r} is empty")
    found = reader(path, content)
    if not len(found):
        raise DataError(f"data file {str(path)!r} holds no example")
    return found


def _arrays(path: Path, content: bytes) -> Arrays:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files if name in ("x", "y")}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an npz file of plain arrays: {error}") from error
    x, y = arrays.get("x"), arrays.get("y")
    if x is None:
        raise DataError(f"{path} must hold an array named 'x' (and may hold 'y'); save it with numpy.savez(path, x=x)")
    if x.ndim == 0 or x.dtype.kind not in "fiub":
        raise DataError(f"{path}: x must be numeric with one example a row; got {x.dtype} of shape {x.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"{path}: x holds NaN or infinity; clean it before saving")
    if y is None:
        return Arrays(x)
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise DataError(
            f"{path}: y must be integer class indices of shape ({len(x)},); got {y.dtype} of shape {y.shape}"
        )
    return Arrays(x, y.astype(np.int64))


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text; byte {error.start} is not") from error


def _lines(path: Path, content: bytes) -> Sentences:
    return Sentences(tuple(line.strip() for line in _decode(path, content).splitlines() if line.strip()))


def _json_lines(path: Path, content: bytes) -> Sentences:
    sentences = []
    for number, line in enumerate(_decode(path, content).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from error
        if isinstance(item, dict):
            item = next((item[key] for key in _SENTENCE_COLUMNS if key in item), None)
        if not isinstance(item, str):
            raise DataError(f"{path}, line {number}: expected a string or an object with 'text' or 'sentence'")
        sentences.append(item)
    return Sentences(tuple(sentences))


def _table(path: Path, content: bytes) -> Pairs | Sentences:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_decode(path, content), newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if all(name in header for name in _PAIR_COLUMNS):
        return _scored(path, rows[1:], [header.index(name) for name in _PAIR_COLUMNS])
    column = next((header.index(name) for name in _SENTENCE_COLUMNS if name in header), None)
    body = rows if column is None else rows[1:]
    sentences = []
    for number, row in body:
        if len(row) <= (column or 0):
            raise DataError(f"{path}, line {number}: expected at least {(column or 0) + 1} columns; got {len(row)}")
        sentences.append(row[column or 0])
    return Sentences(tuple(sentences))


def _scored(path: Path, rows: list[tuple[int, list[str]]], columns: list[int]) -> Pairs:
    first, second, scores = [], [], []
    for number, row in rows:
        try:
            left, right, score = (row[column] for column in columns)
            scores.append(float(score))
        except (IndexError, ValueError) as error:
            raise DataError(f"{path}, line {number}: expected two sentences and a number; got {row!r}") from error
        first.append(left)
        second.append(right)
    values = np.array(scores, np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: column 'score' holds NaN or infinity")
    return Pairs(tuple(first), tuple(second), values)
