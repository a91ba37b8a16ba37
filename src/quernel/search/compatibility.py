"""Compatibility of model versions, measured by retrieval: queries of one version in the gallery of another.

C[i, j] = metric with queries embedded by model i and a gallery embedded by model j <= i.  Row by row it says what an
upgrade gives without embedding the gallery again.  Stands with the indexes because it asks one for every entry:
any index with the common verbs will do, and nothing but the queries is ever embedded by the newer model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_int
from quernel.search._index import Index
from quernel.search.flat import FlatIndex, normalized

Matrix = NDArray[np.float64]
Metric = Literal["top1", "map"]
GalleryMode = Literal["class_mean", "items"]
Embed = Callable[[Any], Any]

# Queries asked together where whole rankings come back.
_QUERIES = 256


@dataclass(frozen=True)
class CompatibilityBySeen:
    """Compatibility matrices over parts of the queries; NaN where a part is empty.

    Attributes
    ----------
    seen : ndarray (T, T)
        Queries of classes that both models were trained on.
    partly : ndarray (T, T)
        Of classes that one of them was.
    unseen : ndarray (T, T)
        Of classes that neither was: open-set retrieval.
    """

    seen: Matrix
    partly: Matrix
    unseen: Matrix


def compatibility_matrix(
    models: Sequence[Embed],
    queries: tuple[Any, Any],
    gallery: tuple[Any, Any],
    *,
    metric: Metric = "top1",
    gallery_mode: GalleryMode = "class_mean",
    index: Callable[[int], Index] = FlatIndex,
    batch_size: int = 512,
) -> Matrix:
    """Return how well queries of each version find their class in the gallery of each version before it.

    Parameters
    ----------
    models : sequence of nn.Module or callable
        Versions, oldest first.  ``model(x)`` gives features (n, d), or a tuple whose last entry they are; modules are
        asked in eval mode and keep their own.
    queries, gallery : (x, y)
        What the models take, and integer labels; disjoint samples.  Every label of a query must be in the gallery.
    metric : {"top1", "map"}, default="top1"
        Share of queries whose closest entry has their class, or the mean average precision over the whole ranking.
    gallery_mode : {"class_mean", "items"}, default="class_mean"
        One entry a class, the mean direction of its features, or one entry a sample.
    index : callable (dim) -> Index, default=FlatIndex
        What holds a gallery; scored by cosine.
    batch_size : int, default=512
        Samples embedded together.

    Returns
    -------
    C : ndarray, shape (T, T), float64
        ``C[i, j]`` in [0, 1] for j <= i; NaN above the diagonal.

    Raises
    ------
    QuernelError
        If labels do not fit, versions have features of different sizes, or a feature is zero or not finite.

    References
    ----------
    Biondi et al., arXiv 2405.02581, 2024.  The authors' gallery is ``class_mean``.

    Examples
    --------
    >>> x, y = np.eye(3), np.arange(3)
    >>> turned = lambda x: np.roll(x, 1, axis=1)
    >>> compatibility_matrix([np.asarray, np.asarray, turned], (x, y), (x, y)).tolist()
    [[1.0, nan, nan], [1.0, 1.0, nan], [0.0, 0.0, 1.0]]
    """
    scores, _ = _scores(models, queries, gallery, metric, gallery_mode, index, batch_size)
    return _matrix(scores, lambda i, j: np.ones(scores[0, 0].shape, bool))


def compatibility_by_seen(
    models: Sequence[Embed],
    queries: tuple[Any, Any],
    gallery: tuple[Any, Any],
    seen: Sequence[Collection[int]],
    *,
    metric: Metric = "top1",
    gallery_mode: GalleryMode = "class_mean",
    index: Callable[[int], Index] = FlatIndex,
    batch_size: int = 512,
) -> CompatibilityBySeen:
    """Return ``compatibility_matrix`` for classes that both, one or none of two models were trained on.

    Parameters
    ----------
    models, queries, gallery, metric, gallery_mode, index, batch_size
        As for ``compatibility_matrix``; the gallery stays whole.
    seen : sequence of collections of int
        Labels that each model was trained on.

    Raises
    ------
    QuernelError
        If ``seen`` does not have one entry a model, or as for ``compatibility_matrix``.

    Examples
    --------
    >>> x, y = np.eye(3), np.arange(3)
    >>> parts = compatibility_by_seen([np.asarray, np.asarray], (x, y), (x, y), seen=[{0}, {0, 1}])
    >>> [float(part[1, 0]) for part in (parts.seen, parts.partly, parts.unseen)]
    [1.0, 1.0, 1.0]
    """
    if len(seen) != len(models):
        raise QuernelError(f"seen must have one collection of labels a model; got {len(seen)} for {len(models)}")
    scores, labels = _scores(models, queries, gallery, metric, gallery_mode, index, batch_size)
    known = [np.isin(labels, sorted(classes)) for classes in seen]
    return CompatibilityBySeen(
        seen=_matrix(scores, lambda i, j: known[i] & known[j]),
        partly=_matrix(scores, lambda i, j: known[i] ^ known[j]),
        unseen=_matrix(scores, lambda i, j: ~(known[i] | known[j])),
    )


def average_compatibility(matrix: Any) -> float:
    """Return the share of upgrades that are better in the old gallery than the old model was: AC.

    Pairs i > j with ``C[i, j] > C[j, j]``, strictly: an equal score is no gain from the upgrade.

    Parameters
    ----------
    matrix : array, shape (T, T), T >= 2
        Only the lower triangle is read.

    Raises
    ------
    QuernelError
        If it is not square, has one model only, or the lower triangle holds NaN.

    Examples
    --------
    >>> average_compatibility([[0.5, 0.0], [0.6, 0.9]]), average_compatibility([[0.5, 0.0], [0.5, 0.9]])
    (1.0, 0.0)
    """
    c = _lower(matrix)
    if len(c) < 2:
        raise QuernelError("matrix must hold at least two models; one has nothing to be compatible with")
    rows, columns = np.tril_indices(len(c), -1)
    return float((c[rows, columns] > c[columns, columns]).mean())


def average_accuracy(matrix: Any) -> float:
    """Return the mean of the lower triangle with the diagonal: AA.

    Raises
    ------
    QuernelError
        If the matrix is not square or the lower triangle holds NaN.

    Notes
    -----
    The authors' code leaves out entries that are exactly 0 and multiplies by 100 where the last row is below 1; here
    a 0 counts and nothing is scaled.

    Examples
    --------
    >>> average_accuracy([[0.5, np.nan], [0.0, 1.0]])
    0.5
    """
    c = _lower(matrix)
    return float(c[np.tril_indices(len(c))].mean())


def self_accuracy(matrix: Any) -> float:
    """Return the mean of the diagonal: each model with a gallery of its own.

    Raises
    ------
    QuernelError
        If the matrix is not square or the lower triangle holds NaN.

    Examples
    --------
    >>> self_accuracy([[0.5, np.nan], [0.0, 1.0]])
    0.75
    """
    return float(np.diag(_lower(matrix)).mean())


def features_of(model: Embed, x: Any, *, batch_size: int = 512) -> NDArray[np.float32]:
    """Return unit features of all samples, (n, d) float32, as they are stored in a gallery.

    Raises
    ------
    QuernelError
        If the model does not give n rows of finite features that are not all zero.

    Examples
    --------
    >>> features_of(lambda x: (None, 2 * x), torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_int("batch_size", batch_size, low=1)
    training = model.training if isinstance(model, torch.nn.Module) else False
    try:
        if training:
            model.eval()  # type: ignore[attr-defined]
        with torch.no_grad():
            parts = [_rows(model(x[i : i + batch_size])) for i in range(0, len(x), batch_size)]
    finally:
        if training:
            model.train()  # type: ignore[attr-defined]
    if not parts or any(part.ndim != 2 for part in parts) or sum(map(len, parts)) != len(x):
        shapes = [part.shape for part in parts[:3]]
        raise QuernelError(f"models must give features of shape (n, d) for {len(x)} samples; got {shapes}")
    rows = np.concatenate(parts)
    if not np.isfinite(rows).all() or not (np.abs(rows).max(axis=1) > 0).all():
        raise QuernelError("models must give finite features that are not all zero; a row has no direction")
    return normalized(rows)


def _rows(answer: Any) -> NDArray[np.float32]:
    features = answer[-1] if isinstance(answer, tuple) else answer
    if isinstance(features, torch.Tensor):
        features = features.float().cpu().numpy()
    return np.asarray(features, dtype=np.float32)


def _scores(
    models: Sequence[Embed],
    queries: tuple[Any, Any],
    gallery: tuple[Any, Any],
    metric: str,
    gallery_mode: str,
    index: Callable[[int], Index],
    batch_size: int,
) -> tuple[dict[tuple[int, int], Matrix], NDArray[np.int64]]:
    """Return the score of every query for all pairs j <= i, and the labels of the queries."""
    check_choice("metric", metric, ("top1", "map"))
    check_choice("gallery_mode", gallery_mode, ("class_mean", "items"))
    if not len(models):
        raise QuernelError("models must hold at least one model; got none")
    asked, held = _labels("queries", queries), _labels("gallery", gallery)
    absent = sorted(set(asked.tolist()) - set(held.tolist()))
    if absent:
        raise QuernelError(f"queries have labels {absent[:5]} that no entry of the gallery has; nobody could find them")
    indexes = []
    for model in models:
        rows, labels = features_of(model, gallery[0], batch_size=batch_size), held
        if gallery_mode == "class_mean":
            rows, labels = _class_means(rows, labels)
        indexes.append((index(rows.shape[1]).add(rows), labels))
    scores = {}
    for i, model in enumerate(models):
        rows = features_of(model, queries[0], batch_size=batch_size)
        for j, (entries, labels) in enumerate(indexes[: i + 1]):
            if entries.dim != rows.shape[1]:
                raise QuernelError(
                    f"models must give features of one size; model {i} gives {rows.shape[1]}, model {j} {entries.dim}. "
                    "Versions trained with different numbers of prototypes cannot be compared"
                )
            scores[i, j] = _asked(entries, labels, rows, asked, metric)
    return scores, asked


def _labels(name: str, pair: tuple[Any, Any]) -> NDArray[np.int64]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise QuernelError(f"{name} must be a pair (x, y) of samples and labels; got {type(pair).__name__}")
    y = np.asarray(pair[1].cpu() if isinstance(pair[1], torch.Tensor) else pair[1])
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(pair[0]) or not len(y):
        raise QuernelError(
            f"{name} must have one integer label a sample, at least one; got {y.dtype} of shape {y.shape} for "
            f"{len(pair[0])} samples"
        )
    return y.astype(np.int64)


def _class_means(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
    classes = np.unique(labels)
    means = np.stack([rows[labels == c].mean(axis=0, dtype=np.float64) for c in classes])
    return means.astype(np.float32), classes


def _asked(entries: Index, labels: Any, rows: Any, asked: NDArray[np.int64], metric: str) -> Matrix:
    """Return the score of each query: 0 or 1, or its average precision."""
    k = 1 if metric == "top1" else len(labels)
    parts = []
    for start in range(0, len(rows), _QUERIES):
        ids = entries.search(rows[start : start + _QUERIES], k)[1]
        # An approximate index may find fewer than k; what it did not find is no hit.
        hits = (labels[ids] == asked[start : start + _QUERIES, None]) & (ids >= 0)
        parts.append(
            hits[:, 0].astype(np.float64) if metric == "top1" else _average_precision(hits, labels, asked, start)
        )
    return np.concatenate(parts)


def _average_precision(hits: Any, labels: Any, asked: Any, start: int) -> Matrix:
    """Return the mean precision at the places of right entries; those never found count as 0."""
    classes, counts = np.unique(labels, return_counts=True)
    wanted = counts[np.searchsorted(classes, asked[start : start + len(hits)])]
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    found: Matrix = (precision * hits).sum(axis=1) / wanted
    return found


def _matrix(scores: dict[tuple[int, int], Matrix], chosen: Callable[[int, int], Any]) -> Matrix:
    size = 1 + max(i for i, _ in scores)
    matrix = np.full((size, size), np.nan)
    for (i, j), found in scores.items():
        part = found[chosen(i, j)]
        matrix[i, j] = part.mean() if len(part) else np.nan
    return matrix


def _lower(matrix: Any) -> Matrix:
    c = np.asarray(matrix, dtype=np.float64)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not len(c):
        raise QuernelError(f"matrix must be square, one row a model; got shape {c.shape}")
    if np.isnan(c[np.tril_indices(len(c))]).any():
        raise QuernelError("matrix must hold numbers on and below the diagonal; it holds NaN, an entry not measured")
    return c
