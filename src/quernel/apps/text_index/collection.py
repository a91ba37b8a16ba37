"""``TextIndex``: a folder of texts that can be asked for what they say, kept in one folder of its own.

Every file is cut into passages, every passage encoded, the vectors stored in an index of the library.  Files that have
not changed are not encoded again; changed ones replace what was there.  A file comes in whole or not at all, and with
``save_to`` the folder on disk holds, whatever moment the process is killed at, all files of the last finished batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from quernel._array_folder import ArrayFolder, Arrays, take
from quernel._errors import DataError, FormatError, QuernelError
from quernel._progress import Progress, check_progress
from quernel._registry import register, resolve_class
from quernel._validate import check_choice, check_int
from quernel.apps.text_index.kinds import KINDS, Encoder
from quernel.apps.text_index.passages import Passage, check_text, name_of, passages_of, read_text, text_files
from quernel.search import Index

BUNDLED = "minilm"
# Passages between two saves: half a minute of encoding, and never less than a twentieth of what is there.
BATCH, GROWTH = 512, 20


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    score: float
    file: str
    line: int
    text: str


@dataclass(frozen=True)
class _Source:
    """A file that is in the index: the digest of its bytes, and the ids of its passages."""

    digest: str
    ids: tuple[int, ...]


@register("text-index", pillar="apps", contract="application", paper=None, status="experimental")
class TextIndex(ArrayFolder):
    """Search in texts by what they say.

    Parameters
    ----------
    kind : str, default="flat"
        Which index holds the vectors; one of ``quernel.apps.text_index.KINDS``.
    dim : int, default=384
        Numbers of a vector; those of the encoder.
    encoder : object, optional
        With ``encode(texts) -> Tensor (n, dim)``; default all-MiniLM-L6-v2, loaded when it is first needed.

    Examples
    --------
    >>> index = TextIndex()
    >>> index.add("notes.txt", "The cat sat on the mat.")
    1
    >>> index.search("Where is the cat?", k=1)[0].file
    'notes.txt'
    """

    kind = "text-index"

    def __init__(self, kind: str = "flat", dim: int = 384, encoder: Encoder | None = None) -> None:
        self.index_kind = check_choice("kind", kind, tuple(KINDS))
        self.dim = check_int("dim", dim, low=1)
        self._encoder = encoder
        self._index: Index = KINDS[kind].make(dim)
        self._passages: dict[int, Passage] = {}
        self._file_of: dict[int, str] = {}
        self._sources: dict[str, _Source] = {}
        self._next = 0

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments that a file can hold."""
        return {"kind": self.index_kind, "dim": self.dim}

    @property
    def index(self) -> Index:
        """The index of the passages' vectors; ids are those of the passages."""
        return self._index

    @property
    def encoder(self) -> Encoder:
        """What makes vectors of texts."""
        if self._encoder is None:
            from quernel import models

            self._encoder = models.load(BUNDLED)
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def files(self) -> list[str]:
        """Names of the files that are in, sorted."""
        return sorted(self._sources)

    def __len__(self) -> int:
        """Passages that can be found."""
        return len(self._passages)

    def add(self, name: str, text: str) -> int:
        """Add one text under a name, in place of what had this name; returns the number of its passages.

        Raises
        ------
        QuernelError
            If one of the two is no text that UTF-8 can hold, or the name is empty.
        """
        check_text("name", name)
        check_text("text", text, may_be_empty=True)
        return self._put([(name, _digest(text.encode()), passages_of(text))])

    def add_path(
        self,
        path: str | os.PathLike[str],
        *,
        save_to: str | os.PathLike[str] | None = None,
        batch: int = BATCH,
        progress: Progress | None = None,
    ) -> list[str]:
        """Add the text files of a folder, or one file; those that have not changed are left as they are.

        Parameters
        ----------
        path : path
            Files are known by their path below a folder, a single one by its name.
        save_to : path, optional
            Save there after every batch of files.
        batch : int, default=512
            Passages in a batch, at least; more when the index has grown large.
        progress : callable, optional
            ``progress(message, fraction)``.

        Returns
        -------
        list of str
            Files that cannot be read as text, or whose names are not UTF-8, with the reason; all others are in.

        Raises
        ------
        DataError
            If there is no file that can be read as text; then nothing was saved.
        """
        check_int("batch", batch, low=1)
        check_progress(progress)
        root = Path(path)
        files, bad = text_files(root), []
        held: list[tuple[str, str, list[Passage]]] = []
        for number, file in enumerate(files, 1):
            try:
                name, text = name_of(file, root), read_text(file)
            except DataError as error:
                bad.append(str(error))
                if len(bad) == len(files):
                    # A single file, or a folder of nothing else: saved, it would pass for an index of it.
                    raise
                continue
            digest = _digest(text.encode())
            if name not in self._sources or self._sources[name].digest != digest:
                held.append((name, digest, passages_of(text)))
            waiting = sum(len(passages) for _, _, passages in held)
            if waiting >= max(batch, len(self) // GROWTH):
                self._put(held)
                held = []
                if save_to is not None:
                    self.save(save_to)
            if progress is not None:
                progress(f"reading and encoding, {len(self)} passages", number / len(files))
        # The last batch, whatever the last file was; an index of nothing is saved too.
        self._put(held)
        if save_to is not None:
            self.save(save_to)
        return bad

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """Return the k passages that are closest to a text, closest first.

        Raises
        ------
        QuernelError
            If the query is empty.
        """
        if not check_text("query", query).strip():
            raise QuernelError("query must be a text that is not empty; got only white space")
        check_int("k", k, low=1)
        if not len(self):
            return []
        chosen = KINDS[self.index_kind]
        scores, ids = self._index.search(chosen.encode(self.encoder, [query], True), k, **chosen.options(k))
        return [
            Hit(float(score), self._file_of[i], self._passages[i].line, self._passages[i].text)
            for score, i in zip(scores[0].tolist(), ids[0].tolist(), strict=True)
            if i >= 0
        ]

    def remove(self, name: str) -> int:
        """Delete a file's passages and return how many.

        Raises
        ------
        QuernelError
            If no file of this name is in.
        """
        if name not in self._sources:
            raise QuernelError(f"no file {name!r} is in this index of {len(self._sources)} files")
        source = self._sources.pop(name)
        if source.ids:
            self._index.remove(list(source.ids))
        for i in source.ids:
            del self._passages[i], self._file_of[i]
        return len(source.ids)

    def spread(self, n_shards: int, *, workers: Any = "ray", address: str | None = None) -> TextIndex:
        """Return the same texts with their vectors spread over workers (``quernel.search.ShardedIndex``); not saved.

        Parameters
        ----------
        n_shards, workers, address
            As in ``ShardedIndex``.
        """
        from quernel.search import ShardedIndex

        chosen = KINDS[self.index_kind]
        sharded = ShardedIndex(chosen.make(self.dim), n_shards, workers=workers, address=address)
        held: Any = self._index
        stored = held.vectors
        sharded.add([stored[i] for i in np.flatnonzero(held.alive).tolist()], held.ids)
        twin = TextIndex(self.index_kind, self.dim, self._encoder)
        twin._index, twin._next = sharded, self._next
        twin._passages, twin._file_of, twin._sources = self._passages, self._file_of, self._sources
        return twin

    def close(self) -> None:
        """Let workers go, where there are any."""
        if hasattr(self._index, "close"):
            self._index.close()

    def _put(self, texts: Sequence[tuple[str, str, list[Passage]]]) -> int:
        """Encode texts and take them in, each in place of what had its name."""
        passages = [p for _, _, found in texts for p in found]
        if passages:
            items = KINDS[self.index_kind].encode(self.encoder, [p.text for p in passages], False)
        ids = range(self._next, self._next + len(passages))
        if passages:
            # The index may refuse them; only then is it safe to let go of what they replace.
            self._index.add(items, list(ids))
        for name in {name for name, _, _ in texts} & self._sources.keys():
            self.remove(name)
        self._next += len(passages)
        at = iter(ids)
        for name, digest, found in texts:
            own = tuple(next(at) for _ in found)
            self._sources[name] = _Source(digest, own)
            self._passages.update(zip(own, found, strict=True))
            self._file_of.update(dict.fromkeys(own, name))
        return len(passages)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder that ``load`` reads; replaces an earlier save in one step."""
        inner = {"class": type(self._index).__name__, "config": self._index.config()}
        return self._write(path, {"index": inner, "encoder": BUNDLED if self._is_bundled() else None})

    @classmethod
    def from_folder(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Any], *, path: Path | None = None, check: bool = True
    ) -> Self:
        """Rebuild what ``save`` wrote; ``quernel.load`` calls this."""
        own = {name: t for name, t in tensors.items() if not name.startswith("index.")}
        built = super().from_folder(content, own, path=path, check=check)
        inner = content["index"]
        kind: Any = resolve_class(inner["class"], file="text index", field="index.class")
        made = built._index
        if type(made) is not kind:
            raise FormatError(
                f"index.class must be {type(made).__name__} for kind {built.index_kind!r}; got {kind.__name__}"
            )
        description = {
            "kind": kind.kind,
            "class": kind.__name__,
            "version": kind.format_version,
            "config": inner["config"],
        }
        parts = {name.removeprefix("index."): t for name, t in tensors.items() if name.startswith("index.")}
        built._index = kind.from_folder(description, parts, path=path, check=check)
        if not np.array_equal(np.sort(built._index.ids), np.array(sorted(built._passages), np.int64)):
            raise FormatError("the passages are not those whose vectors are there")
        return built

    def _is_bundled(self) -> bool:
        from quernel import models

        return self._encoder is None or isinstance(self._encoder, models.MiniLM)

    def _arrays(self) -> Arrays:
        ids = sorted(self._passages)
        names = {name: i for i, name in enumerate(sorted(self._sources))}
        texts, text_ends = _packed(self._passages[i].text for i in ids)
        files, file_ends = _packed(names)
        digests, _ = _packed(self._sources[name].digest for name in names)
        return {
            "passage_ids": np.array(ids, np.int64),
            "passage_lines": np.array([self._passages[i].line for i in ids], np.int64),
            "passage_files": np.array([names[self._file_of[i]] for i in ids], np.int64),
            "texts": texts,
            "text_ends": text_ends,
            "files": files,
            "file_ends": file_ends,
            "file_digests": digests,
            "next_id": np.array([self._next], np.int64),
        }

    def _all_arrays(self) -> Arrays:
        return self._arrays() | {f"index.{name}": array for name, array in self._index._all_arrays().items()}

    def _restore(self, arrays: Arrays) -> None:
        ids = take(arrays, "passage_ids", np.int64, (None,))
        n = len(ids)
        lines, owners = (take(arrays, name, np.int64, (n,)) for name in ("passage_lines", "passage_files"))
        texts = _unpacked(arrays, "texts", "text_ends", n)
        ends = len(arrays["file_ends"]) if "file_ends" in arrays else 0
        names = _unpacked(arrays, "files", "file_ends", ends)
        digests = take(arrays, "file_digests", np.uint8, (64 * ends,)).tobytes().decode("ascii")
        self._next = int(take(arrays, "next_id", np.int64, (1,))[0])
        if n and (owners.min() < 0 or owners.max() >= ends or len(set(ids.tolist())) < n or ids.max() >= self._next):
            raise FormatError("passage_files and passage_ids must name files and passages that are there, once each")
        own: list[list[int]] = [[] for _ in names]
        for i, line, owner, text in zip(ids.tolist(), lines.tolist(), owners.tolist(), texts, strict=True):
            self._passages[i], self._file_of[i] = Passage(text, line), names[owner]
            own[owner].append(i)
        for number, name in enumerate(names):
            self._sources[name] = _Source(digests[64 * number : 64 * number + 64], tuple(own[number]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _packed(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as bytes one after another, and where each ends."""
    parts = [text.encode() for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), ends


def _unpacked(arrays: Arrays, name: str, ends_name: str, count: int) -> list[str]:
    ends = take(arrays, ends_name, np.int64, (count,))
    data = take(arrays, name, np.uint8, (int(ends[-1]) if count else 0,)).tobytes()
    if count and (ends[0] < 0 or (np.diff(ends) < 0).any()):
        raise FormatError(f"array {ends_name!r} must not fall")
    return list(_slices(data, ends.tolist()))


def _slices(data: bytes, ends: Sequence[int]) -> Iterator[str]:
    start = 0
    for end in ends:
        yield data[start:end].decode()
        start = end
