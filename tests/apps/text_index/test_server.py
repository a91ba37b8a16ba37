"""The server: JSON answers, refused requests, newer saves, and the page in a real browser."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from quernel._errors import FormatError, QuernelError
from quernel.apps.text_index import TextIndex, make_app
from quernel.apps.text_index.server import _Served
from tests.apps.text_index.conftest import DIM, WordCounter
from tests.report.chromium import Chromium

EVIL = "<img src=x onerror=alert(1)> said the bear."


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def ask(url: str, path: str, **headers: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else body.decode()


@pytest.fixture
def index(texts: Path, encoder: WordCounter) -> TextIndex:
    made = TextIndex("flat", DIM, encoder)
    made.add_path(texts)
    made.add("evil.txt", EVIL)
    return made


def test_search_and_info(index: TextIndex) -> None:
    with running(make_app(index)) as url:
        status, found = ask(url, "/api/search?" + urllib.parse.urlencode({"q": "dogs bark at strangers", "k": 2}))
        assert status == 200 and found["query"] == "dogs bark at strangers" and found["seconds"] >= 0
        assert [set(hit) for hit in found["hits"]] == [{"score", "file", "line", "text"}] * 2
        assert found["hits"][0]["file"] == "animals/dogs.md"
        status, facts = ask(url, "/api/info")
        assert facts == {"passages": len(index), "files": 4, "kind": "flat", "nbytes": index.nbytes}
        with urllib.request.urlopen(url, timeout=20) as reply:
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
            assert b"<title>" in reply.read()


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("q=", "query"),
        ("q=x&k=0", "k must"),
        ("q=x&k=many", "many"),
        ("q=x&k=1000", "k must"),
        ("q=" + "x" * 2001, "q must"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(index: TextIndex, query: str, word: str) -> None:
    with running(make_app(index)) as url:
        status, found = ask(url, f"/api/search?{query}")
        assert status == 400 and word in found["error"]
        assert ask(url, "/api/info", Host="elsewhere.example")[0] == 400
        assert ask(url, "/nothing")[0] == 404


def test_a_newer_save_is_served(index: TextIndex, tmp_path: Path) -> None:
    folder = index.save(tmp_path / "index")
    prepared: list[TextIndex] = []

    def prepare(loaded: TextIndex) -> TextIndex:
        loaded.encoder = index.encoder
        prepared.append(loaded)
        return loaded

    with running(make_app(folder, prepare=prepare)) as url:
        assert ask(url, "/api/info")[1]["files"] == 4
        index.remove("animals/dogs.md")
        index.add("new.txt", "Whales sing under water.")
        index.save(folder)
        found = ask(url, "/api/search?q=whales+sing&k=10")[1]
        assert found["hits"][0]["file"] == "new.txt"
        assert all(hit["file"] != "animals/dogs.md" for hit in found["hits"])
        ask(url, "/api/info")
    assert len(prepared) == 2, "loaded once, and again after the save"


def test_answers_under_way_outlive_the_next_save(index: TextIndex, tmp_path: Path) -> None:
    folder = index.save(tmp_path / "index")
    served = _Served(folder, lambda loaded: loaded.spread(2, workers="threads"))
    first = served.get()
    first.encoder = index.encoder
    index.add("new.txt", "Whales sing under water.")
    index.save(folder)
    second = served.get()
    assert second is not first and len(second) == len(first) + 1
    assert first.search("dogs bark", 1)[0].file == second.search("dogs bark", 1)[0].file == "animals/dogs.md"
    index.remove("new.txt")
    index.save(folder)
    served.get()
    with pytest.raises(QuernelError):
        first.search("dogs bark", 1)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        make_app(tmp_path)


@pytest.mark.browser
def test_the_page_searches(index: TextIndex, chromium: Chromium) -> None:
    with running(make_app(index)) as url:
        chromium.open(url, width=1000, height=800)
        chromium.wait_for("document.getElementById('status').textContent.includes('4 files')")
        chromium.click("#query")
        chromium.type("Do dogs bark?")
        chromium.click("button")
        chromium.wait_for("document.querySelectorAll('#hits li').length > 0")
        first = "document.querySelector('#hits li').textContent"
        assert "animals/dogs.md, line 1" in chromium.js(first)
        assert chromium.js("location.search") == "?q=Do+dogs+bark%3F"
        # Texts are shown as they are.
        chromium.js("document.getElementById('query').value = 'said the bear'")
        chromium.click("button")
        chromium.wait_for(f"{first}.includes('bear')")
        assert "<img src=x" in chromium.js(first) and chromium.js("document.querySelectorAll('img').length") == 0
        chromium.js("history.back()")
        chromium.wait_for(f"{first}.includes('animals/dogs.md')")
        assert chromium.complaints() == []
        assert all(address.startswith(url) for address in chromium.requests())
        chromium.open(f"{url}/?q=snow+falls", width=390, height=800, dark=True)
        chromium.wait_for(f"document.querySelector('#hits li') && {first}.includes('weather.txt')")
        assert chromium.js("document.documentElement.scrollWidth <= innerWidth")
