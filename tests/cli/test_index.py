"""``quernel index``: build, add, search and info over every kind of file, and every bad input in one line."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quernel._load import save_model
from quernel.cli import _index, main
from quernel.search import FlatIndex, FlinngIndex, Index

N, DIM = 400, 16


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with vectors in all formats and sets in both, as the current one."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((N, DIM)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", vectors=x, labels=np.arange(N))
    save_file({"embeddings": torch.from_numpy(x)}, str(tmp_path / "x.safetensors"))
    header = ",".join(f"c{i}" for i in range(DIM))
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header=header, comments="")
    np.save(tmp_path / "q.npy", x[:5] + 0.01)
    lines = [" ".join(map(str, draw.choice(900, 20, replace=False))) for _ in range(60)]
    (tmp_path / "sets.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "sets.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["index", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_build_add_search_and_info(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = _json(capsys, "build", "x.npy", "--out", "ix", "--bits", "8", "--keep-vectors")
    assert built["class"] == "FlinngIndex" and built["items"] == N and built["seconds"] > 0
    assert built["settings"]["metric"] == "cosine" and built["settings"]["dim"] == DIM
    found = _json(capsys, "search", "ix", "q.npy", "-k", "3", "--rerank", "20")
    assert [row[0] for row in found["ids"]] == list(range(5))
    assert all(row[0] > 0.99 for row in found["scores"])
    added = _json(capsys, "add", "ix", "x.csv")
    assert added["items"] == 2 * N
    pair = _json(capsys, "search", "ix", "q.npy", "-k", "2", "--rerank", "20")["ids"][0]
    assert sorted(pair) == [0, N]
    about = _json(capsys, "info", "ix")
    assert about["inside"]["slots"] == 2 * N
    assert about["nbytes"] == Index.load("ix").nbytes
    for words in (["info", "ix"], ["search", "ix", "q.npy", "-k", "2"]):
        assert main(["index", *words]) == 0
    assert "FlinngIndex" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.csv"])
def test_every_kind_of_vectors(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    _json(capsys, "build", name, "--out", "ix", "--kind", "flat", "--metric", "l2")
    index = Index.load("ix")
    assert isinstance(index, FlatIndex) and index.metric == "l2"
    np.testing.assert_allclose(index.vectors, np.load("x.npy"), rtol=1e-6)
    assert _json(capsys, "search", "ix", "q.npy", "-k", "1")["ids"] == [[i] for i in range(5)]


@pytest.mark.parametrize("name", ["sets.txt", "sets.txt.gz"])
def test_sets_and_suggested_settings(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    built = _json(capsys, "build", name, "--out", "ix", "--suggest", "--near", "0.8", "--rows", "2")
    assert built["settings"]["metric"] == "jaccard" and built["settings"]["n_rows"] == 2
    found = _json(capsys, "search", "ix", name, "-k", "1")
    assert found["ids"] == [[i] for i in range(60)]


def test_a_search_tells_how_far_it_got(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    @contextlib.contextmanager
    def watched() -> Iterator[Any]:
        yield lambda message, fraction: told.append(fraction)

    index = FlatIndex(DIM).add(np.load("x.npy"))
    monkeypatch.setattr(_index, "progress_bar", watched)
    monkeypatch.setattr(_index, "QUERIES", 150)
    got = _index._ask(index, np.load("x.npy"), 3, {})
    assert told == [150 / N, 300 / N, 1.0]
    for one, other in zip(got, index.search(np.load("x.npy"), 3), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [part.shape for part in _index._ask(index, np.zeros((0, DIM)), 3, {})] == [(0, 3), (0, 3)]


def test_nothing_found_is_null(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "two.txt").write_text("1 2 3\n4 5 6\n", encoding="utf-8")
    _json(capsys, "build", "two.txt", "--out", "ix")
    found = _json(capsys, "search", "ix", "two.txt", "-k", "5")
    assert found["ids"][0][-1] == -1 and found["scores"][0][-1] is None


@pytest.mark.parametrize("metric", ["cosine", "l2", "jaccard"])
def test_report_is_measured(work: Path, capsys: pytest.CaptureFixture[str], metric: str) -> None:
    sets = metric == "jaccard"
    words = ["--metric", metric, "--tables", "8", "--bits", "6", "--report", "r.html", "--keep-vectors"]
    words += ["--width", "4"] if metric == "l2" else []
    words += ["--near", "0.5"] if metric == "l2" else []
    _json(capsys, "build", "sets.txt" if sets else "x.npy", "--out", "ix", *words)
    page = (work / "r.html").read_text(encoding="utf-8")
    for text in ("exact", "2 tables", "4 tables", "8 tables, as saved", "16 tables", "rerank=100", "queries a second"):
        assert text in page
    assert "<svg" in page and "Measured on" in page


@pytest.mark.parametrize(("metric", "unit"), [("ip", "cosine similarity"), ("l2", "distance")])
def test_a_report_says_how_its_queries_were_made(
    work: Path, capsys: pytest.CaptureFixture[str], metric: str, unit: str
) -> None:
    _json(capsys, "build", "x.npy", "--out", "ix", "--kind", "flat", "--metric", metric, "--report", "r.html")
    page = (work / "r.html").read_text(encoding="utf-8")
    assert f"changed to a {unit} of 0.95" in page and f"{metric} similarity" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "x.npy", "--out", "ix", "--kind", "flat", "--bits", "8"], "leave the others out"),
        (["build", "x.npy", "--out", "ix", "--kind", "tree"], "--kind must be one of"),
        (
            ["build", "x.npy", "--out", "ix", "--metric", "dot"],
            "--metric must be one of 'cosine', 'l2', 'ip', 'jaccard'; got",
        ),
        (["build", "x.npy", "--out", "ix", "--metric", "ip"], "--kind flat"),
        (["build", "x.npy", "--out", "ix", "--metric", "jaccard"], "does not fit a file of vectors"),
        (["build", "sets.txt", "--out", "ix", "--metric", "l2"], "does not fit a file of sets"),
        (["build", "x.npy", "--out", "ix", "--metric", "l2"], "--suggest --near D chooses it"),
        (["build", "x.npy", "--out", "ix", "--report", "r.pdf"], "FILE.html"),
        (["build", "none.npy", "--out", "ix"], "no such file"),
        (["build", "x.xyz", "--out", "ix"], "must end in"),
        (["build", "nowhere/", "--out", "ix"], "there is no such file"),
        (["build", "broken.npy", "--out", "ix"], "not a whole"),
        (["build", "cube.npy", "--out", "ix"], "one a row"),
        (["build", "many.npz", "--out", "ix"], "one array"),
        (["build", "ragged.csv", "--out", "ix"], "line 3"),
        (["build", "words.csv", "--out", "ix"], "line 2"),
        (["build", "words.txt", "--out", "ix"], "line 2"),
        (["build", "empty.txt", "--out", "ix"], "no items"),
        (["search", "nowhere", "x.npy"], "missing"),
    ],
)
def test_bad_input_is_one_line(work: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (work / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(work / "cube.npy", np.zeros((2, 2, 2)))
    np.savez(work / "many.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    (work / "ragged.csv").write_text("1,2\n3,4\n5\n", encoding="utf-8")
    (work / "words.csv").write_text("a,b\nc,d\n", encoding="utf-8")
    (work / "words.txt").write_text("1 2\none two\n", encoding="utf-8")
    (work / "empty.txt").write_text("\n", encoding="utf-8")
    (work / "x.xyz").write_text("1", encoding="utf-8")
    assert main(["index", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_index_is_replaced_only_on_demand(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _json(capsys, "build", "x.npy", "--out", "ix", "--kind", "flat")
    _json(capsys, "add", "ix", "x.csv")
    assert main(["index", "build", "x.npy", "--out", "ix"]) == 2
    error = capsys.readouterr().err
    assert "holds an index already" in error and "--overwrite" in error and error.count("\n") == 1
    assert len(Index.load("ix")) == 2 * N
    assert _json(capsys, "build", "x.npy", "--out", "ix", "--overwrite")["items"] == N
    save_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), "net")
    for words in ([], ["--overwrite"]):
        assert main(["index", "build", "x.npy", "--out", "net", *words]) == 2
        assert "holds a saved model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("build", "search", "meaning"),
    [
        (["--kind", "flat", "--metric", "l2"], [], "score: minus the Euclidean distance"),
        (["--kind", "flat", "--metric", "ip"], [], "score: the inner product"),
        (["--keep-vectors"], ["--rerank", "20"], "score: the cosine similarity"),
        (["--tables", "16"], [], "score: the share of the 16 hash tables"),
    ],
)
def test_a_search_says_what_its_scores_are(
    work: Path, capsys: pytest.CaptureFixture[str], build: list[str], search: list[str], meaning: str
) -> None:
    _json(capsys, "build", "x.npy", "--out", "ix", *build)
    assert main(["index", "search", "ix", "q.npy", "-k", "2", *search]) == 0
    assert capsys.readouterr().out.startswith(meaning)


def test_rerank_needs_flinng_and_kept_vectors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FlatIndex(DIM).add(np.load("x.npy")).save("flat")
    FlinngIndex(DIM, bits=6).add(np.load("x.npy")).save("bare")
    for folder, message in (("flat", "scores are exact"), ("bare", "keep_vectors")):
        assert main(["index", "search", folder, "q.npy", "--rerank", "20"]) == 2
        assert message in capsys.readouterr().err


def test_an_empty_line_among_sets_is_refused_by_its_number(tmp_path):
    from quernel._errors import DataError
    from quernel.cli._index_files import read_items

    file = tmp_path / "sets.txt"
    file.write_text("1 2 3\n\n4 5\n")
    with pytest.raises(DataError, match="line 2 is empty"):
        read_items(file)
    file.write_text("1 2 3\n4 5\n\n")
    assert len(read_items(file)) == 2
