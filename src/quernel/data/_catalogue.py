"""The verbs over all sets: ``load``, ``names``, ``info``, ``download``.

A family of sets is one module with a tuple ``SETS``; adding a set means adding it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quernel._errors import DataError, MissingExtraError, QuernelError
from quernel.data import checkpoints, embeddings, images, labelled_tables, retrieval, tables, text
from quernel.data._sources import DataSet, cache_folder, downloads, present, read_split

_SETS: dict[str, DataSet] = {
    item.name: item
    for family in (checkpoints, embeddings, images, labelled_tables, retrieval, tables, text)
    for item in family.SETS
}


@dataclass(frozen=True)
class SetInfo:
    """What is known of a data set without reading it.

    Attributes
    ----------
    name, summary, licence, origin : str
        As shown by ``quernel data``.
    splits : tuple of str
        Names for ``load(name, split=)``.
    present : tuple of str
        The splits that can be loaded now.
    files : tuple of str
        All files that any source would read, relative to a data folder; empty for bundled sets.
    downloadable : bool
        Whether ``download(name)`` has a public origin to ask.
    """

    name: str
    summary: str
    licence: str
    origin: str
    splits: tuple[str, ...]
    present: tuple[str, ...]
    files: tuple[str, ...]
    downloadable: bool


def names() -> list[str]:
    """Return the names of all data sets, sorted.

    Examples
    --------
    >>> from quernel import data
    >>> "digits" in data.names()
    True
    """
    return sorted(_SETS)


def info(name: str) -> SetInfo:
    """Return what is known of a data set, and which of its splits are present.

    Raises
    ------
    QuernelError
        If no set has this name.

    Examples
    --------
    >>> from quernel import data
    >>> data.info("digits").present
    ('train', 'validation', 'test')
    """
    item = _find(name)
    files = dict.fromkeys(f.path for source in item.sources for split in source.files.values() for f in split)
    ready = tuple(split for split in item.splits if any(present(source, split) for source in item.sources))
    return SetInfo(
        item.name, item.summary, item.licence, item.origin, item.splits, ready, tuple(files), bool(downloads(item))
    )


def load(name: str, *, split: str | None = None) -> Any:
    """Load one split of a data set from disk; never touches the network.

    Parameters
    ----------
    name : str
        One of ``names()``.
    split : str, optional
        One of ``info(name).splits``; may be left out where there is only one.

    Returns
    -------
    Images, Pairs, Retrieval, Sentences, Table, Text, Tokens or Checkpoint
        A frozen dataclass; which one depends on the set.

    Raises
    ------
    QuernelError
        If the set or the split is unknown.
    DataError
        If a file is absent (named, with the folders searched and the remedy) or its sha256 differs.
    MissingExtraError
        If only sources are present whose parser needs a package that is not installed.

    Examples
    --------
    >>> from quernel import data
    >>> data.load("digits", split="test").x.shape
    (449, 8, 8)
    """
    item = _find(name)
    if split is None and len(item.splits) == 1:
        split = item.splits[0]
    if split not in item.splits:
        raise QuernelError(f"split of {name!r} must be one of {', '.join(map(repr, item.splits))}; got {split!r}")
    return read_split(item, split)


def download(name: str) -> Path:
    """Fetch the files of a set from their public origin into the user cache; the only call that uses the network.

    Parameters
    ----------
    name : str
        One of ``names()``.

    Returns
    -------
    Path
        The data folder in the user cache; ``load`` looks there by itself.

    Raises
    ------
    DataError
        If the set has no public origin, the origin cannot be reached, or what it sends has another sha256.
    MissingExtraError
        Without pooch (extra ``data``).
    """
    item = _find(name)
    files = downloads(item)
    if not files:
        raise DataError(f"data set {name!r} has no public download here; get it by hand: {item.origin}")
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise MissingExtraError("quernel.data.download", "data") from error
    folder = cache_folder() / "data"
    for file in files:
        target = folder / file.path
        try:
            # pooch writes to a temporary file, checks the hash and only then moves it into place.
            pooch.retrieve(file.url, known_hash=f"sha256:{file.sha256}", fname=target.name, path=target.parent)
        except (OSError, ValueError) as error:
            raise DataError(f"downloading {file.url} for data set {name!r} failed: {error}") from error
    return folder


def _find(name: str) -> DataSet:
    try:
        return _SETS[name]
    except (KeyError, TypeError):
        raise QuernelError(f"data set must be one of {', '.join(map(repr, names()))}; got {name!r}") from None
