"""``quernel index build | add | search | remove | serve | info``: indexes in folders, of vectors, sets or texts."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quernel._errors import QuernelError
from quernel._validate import check_choice
from quernel.cli._index_lock import writing
from quernel.cli._index_text import (
    add_texts,
    build_texts,
    is_text_index,
    remove_text,
    search_texts,
    serve_texts,
    show_texts,
)
from quernel.cli._output import Json, console, emit, note, progress_bar, table

if TYPE_CHECKING:
    from quernel.search import Index

# Items hashed at a time: large enough to be fast, small enough that the bar moves.
CHUNK = 2**17
# Queries asked at once.
QUERIES = 1024
# Rows looked at by --suggest: all pairs of them are compared.
SAMPLE = 1000
KINDS = ("flinng", "flat")

Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]
File = Annotated[
    Path,
    typer.Argument(
        help="Vectors: .npy, .npz, .safetensors, .csv. Sets: .txt, a line of integers each. Texts: a folder of them."
    ),
]
Rerank = Annotated[int, typer.Option(help="Score so many candidates exactly (flinng, kept vectors).")]

app = typer.Typer(help="Build, fill and search indexes.", rich_markup_mode=None)


@app.command("build")
def build(
    path: File,
    out: Annotated[Path, typer.Option(help="Folder for the index.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="flinng: near-duplicates, fast (default for vectors). flat: exact (default for texts). Of texts also "
            "funnel: a prefix, then the whole vector; multi-vector: several vectors a passage."
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="cosine, l2, ip (flat only) or jaccard. Default: cosine; jaccard for sets.")
    ] = None,
    tables: Annotated[int | None, typer.Option(help="Hash tables.")] = None,
    bits: Annotated[int | None, typer.Option(help="A table has 2^bits codes.")] = None,
    rows: Annotated[int | None, typer.Option(help="Repetitions.")] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of a repetition; default follows the items.")] = None,
    width: Annotated[float | None, typer.Option(help="Width of a hash cell, for l2.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of hashes and groups.")] = 0,
    keep_vectors: Annotated[bool, typer.Option("--keep-vectors", help="Keep the items, for --rerank.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that --out holds.")] = False,
    suggest: Annotated[bool, typer.Option("--suggest", help="Choose tables, bits and rows from a sample.")] = False,
    near: Annotated[float, typer.Option(help="Similarity (l2: distance, ip: cosine) of the pairs to find.")] = 0.95,
    report: Annotated[Path | None, typer.Option(help="FILE.html: recall and speed, measured.")] = None,
    json: Json = False,
) -> None:
    """Build an index of a file of vectors or sets, or of a folder of texts, and save it."""
    from quernel.cli._index_files import read_items
    from quernel.cli._index_report import check_page_name, write_report

    chosen = {"n_tables": tables, "bits": bits, "n_rows": rows, "n_groups": groups, "width": width}
    given = {name: value for name, value in chosen.items() if value is not None}
    with writing(out, new=True):
        if not overwrite:
            _check_free(out)
        if path.is_dir():
            if given or keep_vectors or suggest or metric or report:
                raise QuernelError(
                    f"{path} is a folder of texts: --kind is all there is to choose; leave the others out"
                )
            build_texts(path, out, kind, as_json=json)
            return
        kind = check_choice("--kind", kind or "flinng", KINDS)
        check_page_name(report)
        items = read_items(path)
        index = _empty(kind, _metric(items, metric), items, given, seed, keep_vectors, near if suggest else None)
        seconds = _fill(index, items)
        index.save(out)
        note(f"index: {out}")
    if report is not None:
        write_report(report, index, items, near, seconds, path.name, seed)
        note(f"report: {report}")
    _show(index, {"seconds": round(seconds, 3)}, as_json=json)


@app.command("add")
def add(folder: Folder, path: File, json: Json = False) -> None:
    """Add a file to an index; new items get the next ids. Of texts only what is new or has changed is read."""
    from quernel.cli._index_files import read_items
    from quernel.search import Index

    with writing(folder):
        if is_text_index(folder):
            add_texts(folder, path, as_json=json)
            return
        index = Index.load(folder)
        seconds = _fill(index, read_items(path))
        index.save(folder)
    _show(index, {"seconds": round(seconds, 3)}, as_json=json)


@app.command("search")
def search(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="A file of queries; for an index of texts what you are looking for.")],
    k: Annotated[int, typer.Option("-k", help="Answers a query.")] = 10,
    rerank: Rerank = 0,
    json: Json = False,
) -> None:
    """Search an index for every item of a file, or for a text."""
    from quernel.cli._index_files import read_items
    from quernel.search import FlinngIndex, Index

    if is_text_index(folder):
        search_texts(folder, path, k, as_json=json)
        return
    index = Index.load(folder)
    queries = read_items(Path(path))
    if rerank and not isinstance(index, FlinngIndex):
        raise QuernelError(f"--rerank is for flinng; {folder} holds a {type(index).__name__}, whose scores are exact")
    options = {"rerank": rerank} if rerank else {}
    scores, ids = _ask(index, queries, k, options)
    if json:
        rounded = [[None if math.isnan(s) else s for s in row] for row in scores.tolist()]
        emit({"k": k, "ids": ids.tolist(), "scores": rounded})
        return
    rows = [(i, "  ".join(_answers(s, d)) or "nothing found") for i, (s, d) in enumerate(zip(scores, ids, strict=True))]
    console().print(f"score: {_score_of(index, rerank)}", markup=False)
    table(("query", "id (score), closest first"), rows)


@app.command("remove")
def remove(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The file's name in the index, as a search shows it.")],
    json: Json = False,
) -> None:
    """Delete a file from an index of texts."""
    with writing(folder):
        remove_text(folder, name, as_json=json)


@app.command("serve")
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    shards: Annotated[int, typer.Option(help="Spread the vectors over so many workers of Ray.", min=1)] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default starts one here.")] = None,
) -> None:
    """Open a page to search an index of texts from; it follows what is added and removed."""
    serve_texts(folder, host, port, shards, ray_address)


@app.command("info")
def info(folder: Folder, json: Json = False) -> None:
    """Say what an index holds."""
    from quernel.search import Index

    if is_text_index(folder):
        from quernel.apps.text_index import TextIndex

        show_texts(TextIndex.load(folder, mmap=True), as_json=json)
        return
    _show(Index.load(folder, mmap=True), {}, as_json=json)


def _answers(scores: Any, ids: Any) -> list[str]:
    return [f"{i} ({s:.3f})" for s, i in zip(scores, ids, strict=True) if i >= 0]


def _score_of(index: Index, rerank: int) -> str:
    """Say what the numbers beside the ids are."""
    from quernel.search import FlinngIndex

    if isinstance(index, FlinngIndex) and not rerank:
        return (
            f"the share of the {index.n_tables} hash tables that have the query's code in the item's group, of its "
            "groups the smallest. It ranks and is no similarity; --rerank gives that (--keep-vectors)"
        )
    names = {"l2": "minus the Euclidean distance", "ip": "the inner product", "jaccard": "the Jaccard similarity"}
    return names.get(index.metric, f"the {index.metric} similarity")


def _check_free(out: Path) -> None:
    """Refuse a folder that holds something of ours, before any work: what was added to it would be gone."""
    from quernel._io import is_quernel_folder, read_folder

    if is_quernel_folder(out):
        kind = read_folder(out, check_tensors=False).content.get("kind")
        if kind in ("index", "text-index"):
            raise QuernelError(
                f"--out {out} holds an index already; `quernel index add {out} FILE` adds to it, --overwrite replaces "
                "it and all that was added to it"
            )
        raise QuernelError(f"--out {out} holds a saved {kind}; choose another folder")


def _metric(items: Any, metric: str | None) -> str:
    from quernel.hashing import Sets

    sets = isinstance(items, Sets)
    if metric is None:
        return "jaccard" if sets else "cosine"
    check_choice("--metric", metric, ("cosine", "l2", "ip", "jaccard"))
    if sets != (metric == "jaccard"):
        raise QuernelError(f"--metric {metric} does not fit a file of {'sets' if sets else 'vectors'}")
    return metric


def _empty(
    kind: str, metric: str, items: Any, given: dict[str, Any], seed: int, keep: bool, near: float | None
) -> Index:
    from quernel.search import FlatIndex, FlinngIndex

    dim = None if metric == "jaccard" else int(items.shape[1])
    kind_of: Any = metric
    if kind == "flat":
        if given or keep or near is not None:
            raise QuernelError("--kind flat compares everything and has no settings; leave the others out")
        return FlatIndex(dim, kind_of)
    if metric == "ip":
        raise QuernelError("--metric ip needs --kind flat; flinng knows cosine, l2 and jaccard")
    if metric == "l2" and near is None and "width" not in given:
        raise QuernelError(
            "--metric l2 needs the width of a hash cell: --suggest --near D chooses it for pairs at distance D, or "
            "give --width W, a few times that distance"
        )
    if near is not None:
        chosen = FlinngIndex.suggest(sample_of(items, SAMPLE, seed), near, len(items), metric=kind_of, seed=seed)
        note(f"suggested: {', '.join(f'{k}={v}' for k, v in chosen.arguments.items())}")
        return FlinngIndex(**(chosen.arguments | given), keep_vectors=keep)
    return FlinngIndex(dim, kind_of, seed=seed, keep_vectors=keep, **given)


def sample_of(items: Any, count: int, seed: int) -> Any:
    """Return some items, drawn without repeats and in order."""
    import numpy as np

    from quernel import _random
    from quernel.hashing import Sets

    chosen = np.sort(_random.generator(seed).permutation(len(items))[:count])
    if isinstance(items, Sets):
        return Sets.of([items.items[items.offsets[i] : items.offsets[i + 1]] for i in chosen])
    return np.asarray(items[chosen], np.float32)


def _fill(index: Index, items: Any) -> float:
    """Add the items piece by piece, showing how far it got; returns the seconds."""
    start = time.perf_counter()
    with progress_bar() as progress:
        for first in range(0, len(items), CHUNK):
            index.add(items[first : first + CHUNK])
            progress("adding", min(1.0, (first + CHUNK) / len(items)))
    return time.perf_counter() - start


def _ask(index: Index, queries: Any, k: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """Search piece by piece, showing how far it got."""
    import numpy as np

    answers = []
    with progress_bar() as progress:
        for first in range(0, max(len(queries), 1), QUERIES):
            answers.append(index.search(queries[first : first + QUERIES], k, **options))
            progress("searching", min(1.0, (first + QUERIES) / max(len(queries), 1)))
    scores, ids = (np.concatenate(part) for part in zip(*answers, strict=True))
    return scores, ids


def facts(index: Index) -> dict[str, Any]:
    """Return what there is to know of an index, as JSON values."""
    from quernel.search import FlinngIndex

    found = {"class": type(index).__name__, "items": len(index), "nbytes": index.nbytes, "settings": index.config()}
    return found | ({"inside": dataclasses.asdict(index.stats())} if isinstance(index, FlinngIndex) else {})


def _show(index: Index, more: dict[str, Any], *, as_json: bool) -> None:
    found = facts(index) | more
    if as_json:
        emit(found)
        return
    rows = [(k, v) for k, v in found.items() if not isinstance(v, dict)]
    for nested in ("settings", "inside"):
        rows += [(k, v) for k, v in found.get(nested, {}).items() if v is not None and k not in ("items", "nbytes")]
    table(("field", "value"), rows)
    console().print()
