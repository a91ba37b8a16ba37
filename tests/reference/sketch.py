"""Slow and obvious sketches: counts by loops, estimates by their formula, a table read one cell at a time."""

from __future__ import annotations

import numpy as np


def count(codes: np.ndarray, weights: np.ndarray, n_codes: int) -> np.ndarray:
    """Return counts (L, R, C) of items with codes (n, L) and weights (n, C)."""
    table = np.zeros((codes.shape[1], n_codes, weights.shape[1]))
    for row, weight in zip(codes, weights, strict=True):
        for t, cell in enumerate(row):
            table[t, cell] += weight
    return table


def estimate(table: np.ndarray, codes: np.ndarray, n_cells: int | None, agg: str, groups: int) -> np.ndarray:
    """Return estimates (n, C): debiased row by row, then the mean or the median of the means of groups."""
    total, answers = table[0].sum(0), []
    for row in codes:
        found = np.array([table[t, cell] for t, cell in enumerate(row)])
        if n_cells is not None:
            found = (n_cells * found - total) / (n_cells - 1)
        if agg == "mean":
            answers.append(found.mean(0))
        else:
            answers.append(np.median([part.mean(0) for part in np.split(found, groups)], axis=0))
    return np.array(answers)


def read(table: np.ndarray, scale: np.ndarray, codes: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """Return what a rounded table answers for codes (n, L), in float64."""
    answers = [sum(scale[t] * table[t, cell].astype(float) for t, cell in enumerate(row)) for row in codes]
    return np.array(answers) + intercept
