"""A user's own files: every accepted form, and a clear refusal of everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quernel._errors import DataError
from quernel.data import Arrays, Pairs, Sentences, from_path


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_arrays_with_and_without_labels(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "a.npz", x=x)
    np.savez(tmp_path / "b.npz", x=x, y=np.array([2, 0, 1], np.uint8), other=x)
    bare, labelled = from_path(tmp_path / "a.npz"), from_path(tmp_path / "b.npz")
    assert isinstance(bare, Arrays)
    assert isinstance(labelled, Arrays)
    np.testing.assert_array_equal(bare.x, x)
    assert bare.y is None
    assert labelled.y is not None
    assert labelled.y.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "One.\n\n  Two, too. \r\n"),
        ("a.txt", "\ufeffOne.\nTwo, too."),
        ("a.jsonl", '"One."\n\n{"text": "Two, too.", "id": 3}\n'),
        ("a.jsonl", '{"sentence": "One."}\n"Two, too."'),
        ("a.csv", 'id,text\n1,One.\n2,"Two, too."\n'),
        ("a.csv", 'One.,x\n"Two, too.",y\n'),
        ("a.tsv", "Sentence\tlabel\nOne.\t0\nTwo, too.\t1\n"),
    ],
)
def test_sentences(name: str, content: str, tmp_path: Path) -> None:
    found = from_path(_write(tmp_path, name, content))
    assert isinstance(found, Sentences)
    assert found.text == ("One.", "Two, too.")


def test_pairs_by_header(tmp_path: Path) -> None:
    found = from_path(_write(tmp_path, "p.csv", "score,sentence1,sentence2\n4.5,A,B\n0,C,D\n"))
    assert isinstance(found, Pairs)
    assert (found.first, found.second) == (("A", "C"), ("B", "D"))
    assert found.score.tolist() == [4.5, 0.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", "x", "must end in .*parquet"),
        ("a.txt", "", "is empty"),
        ("a.txt", "\n \n", "no example"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8.*byte 0"),
        ("a.npz", "not a zip", "not an npz file"),
        ("a.npz", b"PK\x03\x04 broken", "not an npz file"),
        ("a.jsonl", '{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", '{"body": "a"}\n', "line 1: expected a string"),
        ("a.jsonl", "3\n", "line 1: expected a string"),
        ("a.csv", "id,text\n1\n", "line 2: expected at least 2 columns; got 1"),
        ("a.csv", 'text\n"never closed\n', "line"),
        ("a.csv", "text\n", "no example"),
        ("a.csv", "sentence1,sentence2,score\nA,B,high\n", "line 2: expected two sentences and a number"),
        ("a.csv", "sentence1,sentence2,score\nA,B,nan\n", "NaN"),
    ],
)
def test_refusals_name_file_and_place(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        from_path(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.ones(3)}, "named 'x'"),
        ({"x": np.float32(1)}, "one example a row"),
        ({"x": np.array(["a", "b"])}, "must be numeric"),
        ({"x": np.array([1.0, np.nan])}, "NaN"),
        ({"x": np.ones((3, 2)), "y": np.array([0, 1])}, r"shape \(3,\)"),
        ({"x": np.ones((2, 2)), "y": np.array([0.0, 1.0])}, "integer class"),
        ({"x": np.ones((0, 2))}, "no example"),
    ],
)
def test_arrays_are_checked(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        from_path(tmp_path / "a.npz")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([object()], dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        from_path(tmp_path / "a.npz")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read data file .*none\.txt"):
        from_path(tmp_path / "none.txt")


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".npz", ".txt", ".jsonl", ".csv", ".tsv"]))
def test_any_bytes_give_data_or_a_data_error(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(content)
    try:
        size, message = len(from_path(path)), str(path)
    except DataError as error:
        size, message = 1, str(error)
    assert size > 0
    assert str(path) in message
