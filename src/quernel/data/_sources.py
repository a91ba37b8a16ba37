"""Where data comes from: sets list sources, a source lists files with their sha256, the first present wins.

Folders are looked through in this order: ``QUERNEL_DATA`` (may be read-only), then ``data`` in the user
cache folder (``QUERNEL_CACHE`` or the platform's default). A source without files is bundled with a
dependency. The bytes that a parser gets are hashed first, each time: one of them may open a pickle.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quernel._errors import DataError, MissingExtraError

Parse = Callable[..., Any]


@dataclass(frozen=True)
class File:
    """One file: path below a data folder, checksum, and a public address where one is known."""

    path: str
    sha256: str
    url: str = ""


@dataclass(frozen=True)
class Source:
    """One way to get a set: files of each split and ``parse(split, *contents)``; ``needs`` is a package to import."""

    parse: Parse
    files: Mapping[str, tuple[File, ...]]
    needs: str = ""

    @property
    def usable(self) -> bool:
        """Whether the package that the parser needs is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


@dataclass(frozen=True)
class DataSet:
    """A named set with its splits and sources, best source first."""

    name: str
    summary: str
    licence: str
    origin: str
    splits: tuple[str, ...]
    sources: tuple[Source, ...] = field(repr=False)


def cache_folder() -> Path:
    """Return the folder for everything Quernel keeps between runs: ``QUERNEL_CACHE`` or the platform's default.

    The folder need not exist; whoever writes creates it.

    Examples
    --------
    >>> from quernel.data import cache_folder
    >>> cache_folder().is_absolute()
    True
    """
    own = os.environ.get("QUERNEL_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "quernel" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quernel"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quernel"


def folders() -> list[Path]:
    """Return the folders that are searched, first one first."""
    named = os.environ.get("QUERNEL_DATA")
    cached = cache_folder() / "data"
    if not named:
        return [cached]
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"QUERNEL_DATA must name a folder; got {named!r}, which is none. Correct it or unset it")
    return [folder, cached]


def locate(file: File) -> Path | None:
    """Return the first place that holds the file, or None."""
    return next((path for folder in folders() if (path := folder / file.path).is_file()), None)


def present(source: Source, split: str) -> bool:
    """Tell whether a source can give a split now."""
    return split in source.files and source.usable and all(locate(file) for file in source.files[split])


def read(file: File) -> bytes:
    """Return the bytes of a file after its sha256 matched.

    Raises
    ------
    DataError
        If the file is absent, unreadable, or its bytes are not the promised ones.
    """
    path = locate(file)
    if path is None:
        raise DataError(f"file {file.path} is missing; looked in {_looked_in()}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{path} is damaged or another version: expected sha256 {file.sha256}, got {digest}. "
            "Replace the file by the original"
        )
    return content


def read_split(dataset: DataSet, split: str) -> Any:
    """Parse a split from the first source that is present."""
    for source in dataset.sources:
        if present(source, split):
            return source.parse(split, *map(read, source.files[split]))
    for source in dataset.sources:
        if split in source.files and not source.usable and all(locate(file) for file in source.files[split]):
            raise MissingExtraError(f"data set {dataset.name!r}, split {split!r} ({source.needs})", "data")
    wanted = [source.files[split] for source in dataset.sources if split in source.files]
    names = " or ".join(", ".join(file.path for file in files) for files in wanted)
    raise DataError(
        f"data set {dataset.name!r}, split {split!r}, needs {names}; looked in {_looked_in()}. {_remedy(dataset)}"
    )


def downloads(dataset: DataSet) -> tuple[File, ...]:
    """Return the files of the first source that is public from end to end; empty if there is none."""
    for source in dataset.sources:
        files = tuple(dict.fromkeys(file for split in source.files.values() for file in split))
        if files and all(file.url for file in files):
            return files
    return ()


def _looked_in() -> str:
    named = os.environ.get("QUERNEL_DATA")
    places = [str(folder) for folder in folders()]
    if named:
        places[0] += " (QUERNEL_DATA)"
    else:
        places.insert(0, "QUERNEL_DATA (not set)")
    return ", ".join(places)


def _remedy(dataset: DataSet) -> str:
    place = "Set QUERNEL_DATA to a folder that holds it"
    if downloads(dataset):
        return f"{place}, or run quernel.data.download({dataset.name!r})"
    return f"{place}; it has no public download here ({dataset.origin})"
