"""Maximum inner product as a nearest neighbour on the sphere: one map for items, another for queries.

    item y   -> [ y / R ; sqrt(1 - |y|^2 / R^2) ; 0 ],   R = max |y|
    query q  -> [ q / Q ; 0 ; sqrt(1 - |q|^2 / Q^2) ],   Q >= |q|

Both have length 1 and <q', y'> = <q, y> / (Q R), so the order of the items under one query is that of their inner
products (Neyshabur and Srebro, 2015). With Q = |q|, the default, the last coordinate of a query is 0 and the
contrast is largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float

Floats = NDArray[np.floating[Any]]


def sphere_items(items: Any, radius: float | None = None) -> Floats:
    """Map items, shape (n, d), to unit vectors (n, d + 2).

    Parameters
    ----------
    items : array, shape (n, d)
    radius : float, optional
        R, at least the longest item; default is its length.

    Examples
    --------
    >>> import numpy as np
    >>> sphere_items(np.array([[3.0, 4.0], [0.0, 0.0]])).round(2).tolist()
    [[0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    rows = _rows("items", items)
    lengths = _lengths(rows)
    longest = float(lengths.max(initial=0.0))
    r = longest if radius is None else check_float("radius", radius, low=0.0)
    if r < longest * (1 - 1e-6):
        raise QuernelError(f"radius must be at least the longest item, {longest:g}; got {radius!r}")
    r = r or 1.0  # items that are all zero
    return _on_sphere(rows, lengths, np.asarray(r), -2)


def sphere_queries(queries: Any, radius: float | None = None) -> Floats:
    """Map queries, shape (n, d), to unit vectors (n, d + 2); ``radius`` is Q, default each query's own length.

    A query of zeros maps to the last axis, at a right angle to every item.
    """
    rows = _rows("queries", queries)
    lengths = _lengths(rows)
    q = lengths if radius is None else np.full(len(rows), check_float("radius", radius, low=0.0, open_low=True))
    if (q < lengths * (1 - 1e-6)).any():
        raise QuernelError(f"radius must be at least the longest query, {lengths.max():g}; got {radius!r}")
    q = np.where(q > 0, q, 1.0)
    return _on_sphere(rows, lengths, q, -1)


def _lengths(rows: Floats) -> NDArray[np.float64]:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))


def _on_sphere(rows: Floats, lengths: Floats, radius: NDArray[np.float64], place: int) -> Floats:
    """Return rows / radius, with what is missing to length 1 in the column ``place`` of two more."""
    out = np.zeros((len(rows), rows.shape[1] + 2), rows.dtype)
    np.divide(rows, radius.reshape(-1, 1), out=out[:, :-2], casting="same_kind")
    out[:, place] = np.sqrt(np.clip(1 - (lengths / radius) ** 2, 0, None))
    return out


def _rows(name: str, value: Any) -> Floats:
    rows = np.asarray(value)
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise QuernelError(f"{name} must be floating point of shape (n, d); got {rows.dtype} of shape {rows.shape}")
    check_finite(name, rows)
    return rows
