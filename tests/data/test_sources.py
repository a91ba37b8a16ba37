"""Where files come from: order of folders and sources, checksums, absent and damaged files, downloads."""

from __future__ import annotations

import hashlib
import os
import sys
import types
from pathlib import Path

import pytest

from quernel import data
from quernel._errors import DataError, MissingExtraError, QuernelError
from quernel.data import _catalogue, _sources
from quernel.data._sources import DataSet, File, Source

GOOD = b"some bytes"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    named, cache = tmp_path / "named", tmp_path / "cache"
    named.mkdir()
    monkeypatch.setenv("QUERNEL_DATA", str(named))
    monkeypatch.setenv("QUERNEL_CACHE", str(cache))
    return named, cache / "data"


def _write(folder: Path, name: str, content: bytes = GOOD) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def _file(name: str = "a/one.bin", content: bytes = GOOD, url: str = "") -> File:
    return File(name, hashlib.sha256(content).hexdigest(), url)


def _parse(split: str, *contents: bytes) -> tuple[str, tuple[bytes, ...]]:
    return split, contents


def _set(*sources: Source) -> DataSet:
    return DataSet("toy", "a toy", "public domain", "ask the author", ("train", "test"), sources)


def test_named_folder_comes_before_the_cache(places: tuple[Path, Path]) -> None:
    named, cache = places
    in_cache = _write(cache, "a/one.bin")
    assert _sources.locate(_file()) == in_cache
    in_named = _write(named, "a/one.bin")
    assert _sources.locate(_file()) == in_named


def test_first_present_source_wins(places: tuple[Path, Path]) -> None:
    first = Source(lambda split, content: "first", {"train": (_file("one"),)})
    second = Source(lambda split, content: "second", {"train": (_file("two"),)})
    _write(places[0], "two")
    assert _sources.read_split(_set(first, second), "train") == "second"
    _write(places[0], "one")
    assert _sources.read_split(_set(first, second), "train") == "first"


def test_parser_gets_split_and_contents_in_order(places: tuple[Path, Path]) -> None:
    other = _file("b", b"other")
    _write(places[0], "a/one.bin")
    _write(places[0], "b", b"other")
    found = _sources.read_split(_set(Source(_parse, {"test": (_file(), other)})), "test")
    assert found == ("test", (GOOD, b"other"))


def test_bundled_source_needs_no_file(places: tuple[Path, Path]) -> None:
    assert _sources.read_split(_set(Source(_parse, {"train": ()})), "train") == ("train", ())


def test_read_only_folder_is_enough(places: tuple[Path, Path]) -> None:
    _write(places[0], "a/one.bin")
    os.chmod(places[0] / "a", 0o500)
    os.chmod(places[0], 0o500)
    assert _sources.read(_file()) == GOOD
    assert not places[1].exists(), "reading must not create the cache"


def test_damaged_file_is_named_with_both_checksums(places: tuple[Path, Path]) -> None:
    path = _write(places[0], "a/one.bin", b"other bytes")
    with pytest.raises(DataError) as caught:
        _sources.read(_file())
    for part in (str(path), _file().sha256, hashlib.sha256(b"other bytes").hexdigest()):
        assert part in str(caught.value)


def test_damaged_file_does_not_fall_through_to_the_next_source(places: tuple[Path, Path]) -> None:
    _write(places[0], "a/one.bin", b"other bytes")
    _write(places[0], "two")
    with pytest.raises(DataError, match="damaged"):
        _sources.read_split(
            _set(Source(_parse, {"test": (_file(),)}), Source(_parse, {"test": (_file("two"),)})), "test"
        )


def test_every_read_is_hashed_also_where_size_and_time_repeat(places: tuple[Path, Path]) -> None:
    path = _write(places[0], "a/one.bin")
    os.utime(path, ns=(1, 1))
    assert _sources.read(_file()) == GOOD
    path.write_bytes(b"x" * len(GOOD))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="damaged"):
        _sources.read(_file())


def test_absent_file_names_file_folders_and_remedy(places: tuple[Path, Path]) -> None:
    closed = _set(Source(_parse, {"test": (_file(),)}))
    with pytest.raises(DataError) as caught:
        _sources.read_split(closed, "test")
    for part in ("'toy'", "'test'", "a/one.bin", str(places[0]), "QUERNEL_DATA", str(places[1]), "ask the author"):
        assert part in str(caught.value)
    public = _set(Source(_parse, {"test": (_file(url="https://example.org/one"),)}))
    with pytest.raises(DataError, match=r"quernel\.data\.download\('toy'\)"):
        _sources.read_split(public, "test")


def test_absent_without_the_variable_says_so(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUERNEL_DATA")
    with pytest.raises(DataError, match=r"QUERNEL_DATA \(not set\)"):
        _sources.read_split(_set(Source(_parse, {"test": (_file(),)})), "test")


def test_variable_that_names_no_folder(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERNEL_DATA", str(places[0] / "nowhere"))
    with pytest.raises(DataError, match=r"must name a folder.*nowhere"):
        data.load("tinyshakespeare", split="test")


def test_source_whose_package_is_missing_is_passed_over(places: tuple[Path, Path]) -> None:
    best = Source(lambda split, content: "best", {"test": (_file("one"),)}, needs="no_such_package")
    plain = Source(lambda split, content: "plain", {"test": (_file("two"),)})
    _write(places[0], "one")
    with pytest.raises(MissingExtraError, match=r"no_such_package.*quernel\[data\]"):
        _sources.read_split(_set(best, plain), "test")
    _write(places[0], "two")
    assert _sources.read_split(_set(best, plain), "test") == "plain"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUERNEL_CACHE", str(tmp_path))
    assert data.cache_folder() == tmp_path
    monkeypatch.delenv("QUERNEL_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder() == tmp_path / "xdg" / "quernel"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data.cache_folder().parts[-3:] == ("Library", "Caches", "quernel")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert data.cache_folder() == tmp_path / "local" / "quernel" / "Cache"


def test_download_puts_files_where_load_looks(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> None:
        asked.append((url, known_hash))
        _write(Path(path), fname)

    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    kept = Source(_parse, {"test": (_file("kept.gz"),)})
    public = Source(_parse, {"test": (_file(url="https://example.org/one"),)})
    monkeypatch.setitem(_catalogue._SETS, "toy", _set(kept, public))
    assert data.download("toy") == places[1]
    assert asked == [("https://example.org/one", f"sha256:{_file().sha256}")]
    assert data.load("toy", split="test") == ("test", (GOOD,))


def test_download_reports_what_failed(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(url: str, **_: object) -> None:
        raise ValueError("SHA256 hash of downloaded file does not match")

    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))
    public = Source(_parse, {"test": (_file(url="https://example.org/one"),)})
    monkeypatch.setitem(_catalogue._SETS, "toy", _set(public))
    with pytest.raises(DataError, match=r"https://example\.org/one.*'toy'.*does not match"):
        data.download("toy")


def test_download_without_origin_or_pooch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no public download.*scikit-learn"):
        data.download("digits")
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=r"quernel\[data\]"):
        data.download("fashion-mnist")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(QuernelError, match=r"'digits'.*got 'digit'"):
        data.load("digit")
    with pytest.raises(QuernelError, match="'train', 'validation', 'test'; got None"):
        data.load("digits")
    with pytest.raises(QuernelError, match="got 'dev'"):
        data.load("digits", split="dev")
