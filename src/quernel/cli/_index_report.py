"""The page of ``quernel index build --report``: recall and speed on near-duplicates, against the exact index.

Queries are items of the file, drawn at random and changed to the similarity asked for. The truth is the exact index's
first answer to the changed query, whichever item that is. Every setting is built, answers all queries and is timed.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np

from quernel import _random, _timing
from quernel._errors import QuernelError
from quernel._machine import processor_name

QUERIES = 500
# Candidates scored exactly in the point that shows what keeping vectors buys.
RERANK = 100


def check_page_name(path: Path | None) -> None:
    """Refuse a name that cannot be written, before any work."""
    if path is not None and (path.suffix != ".html" or not path.absolute().parent.is_dir()):
        raise QuernelError(f"--report must be a FILE.html in a folder that exists; got {str(path)!r}")


def write_report(path: Path, index: Any, items: Any, near: float, seconds: float, title: str, seed: int) -> None:
    """Measure, and write the page."""
    import torch

    from quernel import __version__
    from quernel.cli._index import facts
    from quernel.report._recall_plot import RecallPoint, recall_page
    from quernel.search import FlatIndex, FlinngIndex

    queries = near_duplicates(items, QUERIES, near, index.metric, seed)
    exact = FlatIndex(index.dim, index.metric).add(items)
    truth = exact.search(queries, 1)[1][:, 0]
    points = [_measured(RecallPoint, "exact", exact, queries, truth, exact=True)]
    if isinstance(index, FlinngIndex):
        for tables in sorted({max(1, index.n_tables // 4), max(1, index.n_tables // 2), 2 * index.n_tables}):
            other = FlinngIndex(**_arguments(index) | {"n_tables": tables}).add(items)
            points.append(_measured(RecallPoint, f"{tables} tables", other, queries, truth))
        points.append(_measured(RecallPoint, f"{index.n_tables} tables, as saved", index, queries, truth, chosen=True))
        if index.keep_vectors:
            label = f"{index.n_tables} tables, rerank={RERANK}"
            points.append(_measured(RecallPoint, label, index, queries, truth, rerank=RERANK))
    # An inner product has no scale of its own: such queries are made by the cosine.
    unit = {"l2": "distance", "ip": "cosine similarity"}.get(index.metric, f"{index.metric} similarity")
    what = (
        f"{len(queries)} queries, each an item changed to a {unit} of {near:g}. Recall is the share of them whose "
        "nearest item, by the exact index, comes first. Speed is that of one batch of all queries, hashing included."
    )
    held = facts(index)
    known = {k: v for k, v in held.items() if not isinstance(v, dict)} | held["settings"] | held.get("inside", {})
    known = {name: value for name, value in known.items() if value is not None}
    machine = {
        "quernel": __version__,
        "processor": processor_name(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "other processes busy": _timing.loaded(),
    }
    page = recall_page(title, what, points, known | {"built in (s)": round(seconds, 3)}, machine)
    path.write_text(page, encoding="utf-8")


def near_duplicates(items: Any, count: int, near: float, metric: str, seed: int) -> Any:
    """Return changed copies of random items, at similarity (l2: distance) ``near`` to their originals."""
    from quernel.cli._index import sample_of

    draw = _random.generator(np.random.SeedSequence([seed, 1]))
    chosen = sample_of(items, count, seed)
    if metric == "jaccard":
        return _edited(chosen, near, draw)
    noise = draw.standard_normal(chosen.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    if metric == "l2":
        return (chosen + near * noise).astype(np.float32)
    lengths = np.linalg.norm(chosen, axis=1, keepdims=True)
    unit = chosen / lengths
    # Across the vector, so that the cosine is exactly the one asked for.
    noise -= (noise * unit).sum(1, keepdims=True) * unit
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosine = min(near, 1.0)
    return (lengths * (cosine * unit + (1 - cosine**2) ** 0.5 * noise)).astype(np.float32)


def _edited(sets: Any, near: float, draw: np.random.Generator) -> Any:
    """Replace m of the s items of a set by others: similarity (s - m) / (s + m)."""
    from quernel.hashing import Sets

    high, changed = int(sets.items.max()) + 1, []
    for i in range(len(sets)):
        held = np.unique(sets.items[sets.offsets[i] : sets.offsets[i + 1]])
        m = min(len(held) - 1, round(len(held) * (1 - near) / (1 + near)))
        # Numbers above all items are nobody's, so that exactly m are new.
        changed.append(np.concatenate([draw.permutation(held)[m:], high + np.arange(m)]))
        high += m
    return Sets.of(changed)


def _measured(kind: Any, label: str, index: Any, queries: Any, truth: Any, **marks: Any) -> Any:
    options = {"rerank": marks.pop("rerank")} if "rerank" in marks else {}
    found = index.search(queries, 1, **options)[1][:, 0]
    taken = _timing.latency_ms(lambda: index.search(queries, 1, **options), max_seconds=10.0)
    recall = float((found == truth).mean())
    return kind(label, recall, len(queries) / taken.median_ms * 1e3, index.nbytes, **marks)


def _arguments(index: Any) -> dict[str, Any]:
    return {name: value for name, value in index.config().items() if name != "given_groups"} | {"keep_vectors": False}
