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

import pytest

from quernel.cli import main

TEXTS = {
    "cats.txt": "Cats sleep for most of the day and hunt mice at night.",
    "cooking/soup.md": "Boil the vegetables in salted water, then blend them into a smooth soup.",
    "space.txt": "The probe left the solar system and keeps sending data to the antennas on Earth.",
}

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
