"""``quernel index`` over folders of texts: build, add, search, remove, and serve a page to search from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quernel._errors import QuernelError
from quernel._validate import check_choice
from quernel.cli._output import console, emit, note, progress_bar, table

if TYPE_CHECKING:
    from quernel.apps.text_index import TextIndex

# Letters of a passage that a line of the table shows.
SHOWN = 240


def is_text_index(folder: Path) -> bool:
    """Say whether a folder holds a saved text index."""
    from quernel._io import is_quernel_folder, read_folder

    return is_quernel_folder(folder) and read_folder(folder, check_tensors=False).content.get("kind") == "text-index"


def build_texts(path: Path, out: Path, kind: str | None, *, as_json: bool) -> None:
    """Build an index of a folder of texts, saving as it goes; the first save replaces an index that ``out`` holds."""
    from quernel._io import check_target
    from quernel.apps.text_index import KINDS, TextIndex

    check_choice("--kind", kind or "flat", tuple(KINDS))
    index = TextIndex(kind or "flat")
    # Before anything is encoded; an index that is there stays until the first batch of the new one replaces it.
    check_target(out, TextIndex.kind)
    _fill(index, path, out)
    note(f"index: {out}")
    show_texts(index, as_json=as_json)


def add_texts(folder: Path, path: Path, *, as_json: bool) -> None:
    """Add texts to an index, saving as it goes."""
    from quernel.apps.text_index import TextIndex

    index = TextIndex.load(folder)
    _fill(index, path, folder)
    show_texts(index, as_json=as_json)


def search_texts(folder: Path, query: str, k: int, *, as_json: bool) -> None:
    """Search an index for a text."""
    from quernel.apps.text_index import TextIndex

    hits = TextIndex.load(folder, mmap=True).search(query, k)
    if as_json:
        emit({"query": query, "hits": [asdict(hit) for hit in hits]})
        return
    if not hits:
        console().print("nothing found")
        return
    table(
        ("place", "score", "passage"),
        [(f"{h.file}:{h.line}", f"{h.score:.3f}", " ".join(h.text.split())[:SHOWN]) for h in hits],
    )


def remove_text(folder: Path, name: str, *, as_json: bool) -> None:
    """Delete a file's passages from an index."""
    from quernel.apps.text_index import TextIndex

    _check_texts(folder)
    index = TextIndex.load(folder)
    removed = index.remove(name)
    index.save(folder)
    note(f"removed: {removed} passages of {name}")
    show_texts(index, as_json=as_json)


def serve_texts(folder: Path, host: str, port: int, shards: int, address: str | None) -> None:
    """Serve an index until interrupted."""
    from quernel.apps import text_index

    _check_texts(folder)
    note(f"searching {folder} at http://{host}:{port} (stop with Ctrl-C)")

    def prepare(index: TextIndex) -> TextIndex:
        return index.spread(shards, workers="ray", address=address) if shards > 1 else index

    text_index.serve(folder, host=host, port=port, prepare=prepare)


def show_texts(index: TextIndex, *, as_json: bool) -> None:
    """Say what an index of texts holds."""
    facts: dict[str, Any] = {
        "class": type(index).__name__,
        "kind": index.index_kind,
        "files": len(index.files),
        "passages": len(index),
        "nbytes": index.nbytes,
    }
    if as_json:
        emit(facts)
        return
    table(("field", "value"), list(facts.items()))
    console().print()


def _check_texts(folder: Path) -> None:
    if not is_text_index(folder):
        raise QuernelError(
            f"{folder} holds no index of texts; build one with `quernel index build TEXTS --out {folder}`"
        )


def _fill(index: TextIndex, path: Path, folder: Path) -> None:
    with progress_bar() as progress:
        bad = index.add_path(path, save_to=folder, progress=progress)
    for reason in bad:
        note(f"left out: {reason}")
