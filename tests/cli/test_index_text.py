"""``quernel index`` over folders of texts, with the real encoder: build, add, search, remove, info, serve, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quernel import models
from quernel._errors import DataError
from quernel.cli import _index, _index_lock, _index_text, main
from quernel.search import FlatIndex

TEXTS = {
    "cats.txt": "Cats sleep for most of the day and hunt mice at night.",
    "cooking/soup.md": "Boil the vegetables in salted water, then blend them into a smooth soup.",
    "space.txt": "The probe left the solar system and keeps sending data to the antennas on Earth.",
}

HOLDER = """
import sys, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""

START = "import sys; from quernel.cli import main; sys.exit(main())"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["index", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["index", *words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_from_a_folder_to_an_answer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = _json(capsys, "build", "texts", "--out", "ix")
    assert built == {"class": "TextIndex", "kind": "flat", "files": 3, "passages": 3, "nbytes": built["nbytes"]}
    found = _json(capsys, "search", "ix", "spacecraft beyond the planets", "-k", "2")
    assert found["hits"][0]["file"] == "space.txt" and len(found["hits"]) == 2
    (work / "more.txt").write_text("Violins are tuned in fifths.", encoding="utf-8")
    assert _json(capsys, "add", "ix", "more.txt")["files"] == 4
    assert _json(capsys, "add", "ix", "texts")["passages"] == 4, "what has not changed is left alone"
    assert _json(capsys, "remove", "ix", "space.txt")["passages"] == 3
    again = _json(capsys, "search", "ix", "spacecraft beyond the planets")
    assert "space.txt" not in [hit["file"] for hit in again["hits"]]
    assert _json(capsys, "info", "ix")["files"] == 3
    assert main(["index", "search", "ix", "how do I tune a string instrument?", "-k", "1"]) == 0
    assert "more.txt:1" in capsys.readouterr().out
    assert main(["index", "info", "ix"]) == 0
    assert "TextIndex" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["funnel", "multi-vector"])
def test_other_kinds_answer_too(work: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert _json(capsys, "build", "texts", "--out", "ix", "--kind", kind)["kind"] == kind
    found = _json(capsys, "search", "ix", "spacecraft beyond the planets", "-k", "1")
    assert found["hits"][0]["file"] == "space.txt"


def test_what_is_wrong_is_said_and_nothing_is_lost(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _json(capsys, "build", "texts", "--out", "ix")
    before = _json(capsys, "info", "ix")
    assert "holds an index already" in _refused(capsys, "build", "texts", "--out", "ix")
    assert "--kind" in _refused(capsys, "build", "texts", "--out", "other", "--kind", "none")
    assert "folder of texts" in _refused(capsys, "build", "texts", "--out", "other", "--bits", "4")
    assert "no file" in _refused(capsys, "remove", "ix", "absent.txt")
    assert "no such file" in _refused(capsys, "add", "ix", "absent")
    assert "query" in _refused(capsys, "search", "ix", " ")
    (work / "empty").mkdir()
    assert "no text file" in _refused(capsys, "build", "empty", "--out", "other")
    assert "no index of texts" in _refused(capsys, "serve", "empty")
    assert "no index of texts" in _refused(capsys, "remove", "empty", "x")
    (work / "texts" / "bad.txt").write_bytes(b"\xff\xfe")
    assert main(["index", "add", "ix", "texts"]) == 0
    assert "bad.txt" in capsys.readouterr().err
    assert _json(capsys, "info", "ix") == before
    assert _json(capsys, "build", "texts/cooking", "--out", "ix", "--overwrite")["files"] == 1


def _state(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("fault", ["no text", "nothing readable", "no encoder", "interrupted"])
def test_a_build_that_fails_leaves_the_old_index_whole(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    _json(capsys, "build", "texts", "--out", "ix")
    before = _state(work / "ix")
    new = work / "new"
    new.mkdir()
    if fault == "nothing readable":
        for name in ("a.txt", "b.txt"):
            (new / name).write_bytes(b"\xff\xfe")
    elif fault != "no text":
        (new / "a.txt").write_text("Whales sing under water.", encoding="utf-8")

        def broken(name: str) -> Any:
            raise KeyboardInterrupt if fault == "interrupted" else DataError("the model's file is missing")

        monkeypatch.setattr(models, "load", broken)
    try:
        assert main(["index", "build", "new", "--out", "ix", "--overwrite"]) != 0
    except KeyboardInterrupt:
        assert fault == "interrupted"
    assert _state(work / "ix") == before


def test_a_folder_that_is_being_written_to_is_left_alone(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_index_lock, "SECONDS", 0.1)
    _json(capsys, "build", "texts", "--out", "ix")
    FlatIndex(2).add([[1.0, 0.0]]).save(work / "vectors")
    np.save(work / "x.npy", np.ones((1, 2), np.float32))
    (work / "more.txt").write_text("Violins are tuned in fifths.", encoding="utf-8")
    (work / "link").symlink_to(work / "ix")
    for folder, name, verbs in (
        ("ix", "ix", (("add", "ix", "more.txt"), ("remove", "ix", "cats.txt"), ("add", "link", "more.txt"))),
        ("ix", "ix", (("build", "texts", "--out", "ix/../ix", "--overwrite"),)),
        ("vectors", "vectors", (("add", "vectors", "x.npy"), ("build", "x.npy", "--out", "vectors", "--overwrite"))),
        ("new", "new", (("build", "texts", "--out", "new"), ("build", "x.npy", "--out", "new"))),
    ):
        before = _state(work / folder) if (work / folder).exists() else None
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(work / f".{name}.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdin is not None and holder.stdout is not None
        try:
            holder.stdout.readline()
            for words in verbs:
                said = _refused(capsys, *words)
                assert "waiting for another command" in said and "has been writing to it for more than 0.1 s" in said
            assert (_state(work / folder) if (work / folder).exists() else None) == before
            if folder == "ix":
                assert _json(capsys, "search", "ix", "a soup")["hits"], "reading waits for nobody"
        finally:
            # The lock of a process that is killed is free.
            holder.kill()
            holder.wait()
            holder.stdin.close()
            holder.stdout.close()
    assert _json(capsys, "add", "link", "more.txt")["files"] == 4
    assert _json(capsys, "build", "x.npy", "--out", "new")["items"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "vectors"])
def test_of_two_that_add_at_once_both_are_in(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The second starts when the first has loaded the index, and must wait until the first has saved it."""
    np.save(work / "x.npy", np.eye(2, dtype=np.float32))
    for name in ("one", "two"):
        (work / f"{name}.txt").write_text(f"This is file {name}.", encoding="utf-8")
    one, two, start = ("one.txt", "two.txt", "texts") if kind == "texts" else ("x.npy", "x.npy", "x.npy")
    _json(capsys, "build", start, "--out", "ix")
    module = _index_text if kind == "texts" else _index
    fill, second = module._fill, []

    def while_it_is_loaded(*arguments: Any) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", START, "index", "add", "ix", two],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stderr is not None
        second.append((process, process.stderr.readline()))
        return fill(*arguments)

    monkeypatch.setattr(module, "_fill", while_it_is_loaded)
    _json(capsys, "add", "ix", one)
    ((process, said),) = second
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, said + rest
    assert "waiting for another command" in said
    found = _json(capsys, "info", "ix")
    assert found["files"] == len(TEXTS) + 2 if kind == "texts" else found["items"] == 6


def test_where_no_lock_can_be_had_that_is_said(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FlatIndex(2).add([[1.0, 0.0]]).save(work / "ix")
    np.save(work / "x.npy", np.eye(2, dtype=np.float32))
    (work / ".ix.lock").mkdir()
    assert main(["index", "add", "ix", "x.npy", "--json"]) == 0
    out = capsys.readouterr()
    assert "cannot be locked" in out.err and json.loads(out.out)["items"] == 3


def test_what_cannot_be_replaced_is_refused_before_anything_is_read(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FlatIndex(2).add([[1.0, 0.0]]).save(work / "vectors")
    (work / "theirs").mkdir()
    (work / "theirs" / "weights.safetensors").write_bytes(b"whatever")
    for folder, reason in (("vectors", "holds a saved index"), ("theirs", "Quernel did not save")):
        before = _state(work / folder)
        # Had the texts been looked for first, that there are none would be the complaint.
        (work / "empty").mkdir(exist_ok=True)
        assert reason in _refused(capsys, "build", "empty", "--out", folder, "--overwrite")
        assert _state(work / folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_serve_answers_until_interrupted(work: Path, capsys: pytest.CaptureFixture[str], shards: int) -> None:
    _json(capsys, "build", "texts", "--out", "ix")
    url = "http://127.0.0.1:{}/api/search?q=soup+recipe&k=1"
    port = 18000 + os.getpid() % 2000 + shards
    process = subprocess.Popen(
        [sys.executable, "-c", START, "index", "serve", "ix", "--port", str(port), "--shards", str(shards)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 120
        found: Any = None
        while found is None:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                with urllib.request.urlopen(url.format(port), timeout=60) as reply:
                    found = json.loads(reply.read())
            except OSError:
                time.sleep(0.2)
        assert found["hits"][0]["file"] == "cooking/soup.md"
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert re.search(rf"http://127\.0\.0\.1:{port}", said)
    assert "Traceback" not in said
