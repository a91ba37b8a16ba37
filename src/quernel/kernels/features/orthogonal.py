"""Random directions: independent Gaussian rows, or rows that are orthogonal within blocks.

Block-orthogonal rows (arXiv 1610.09072) have the length of an independent Gaussian vector each, so a single one
is distributed exactly as a Gaussian row; that they are orthogonal lowers the variance of kernel estimates.
Cost: n dim draws, and for the orthogonal ones a QR decomposition of dim^3 a block of dim rows.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quernel._random import Seed, generator
from quernel._validate import check_int

Floats = NDArray[np.float64]
#: How random directions are drawn: the two kinds here, or those of ``hadamard.py``.
Projection = Literal["orthogonal", "gaussian", "hadamard"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


def gaussian_directions(n: int, dim: int, seed: Seed) -> Floats:
    """Return independent standard normal rows, shape (n, dim), float64.

    Examples
    --------
    >>> gaussian_directions(3, 5, seed=0).shape
    (3, 5)
    """
    _check(n, dim)
    return generator(seed).standard_normal((n, dim))


def orthogonal_directions(n: int, dim: int, seed: Seed) -> Floats:
    """Return rows that are orthogonal within blocks of ``dim`` and as long as independent Gaussian ones.

    Parameters
    ----------
    n : int
        Number of rows; every ``dim`` of them form a block of their own.
    dim : int
        Length of a row.
    seed : int, SeedSequence, Generator or None
        What decides the draw.

    Returns
    -------
    directions : array, shape (n, dim), float64
        Each row alone is distributed as N(0, I).

    Examples
    --------
    >>> g = orthogonal_directions(3, 5, seed=0)
    >>> bool(abs(g @ g.T - np.diag((g**2).sum(1))).max() < 1e-12)
    True
    """
    _check(n, dim)
    draw = generator(seed)
    blocks = []
    for start in range(0, n, dim):
        q, r = np.linalg.qr(draw.standard_normal((dim, dim)))
        # The signs make q uniform over all orthogonal matrices instead of whatever the decomposition prefers.
        blocks.append((q * np.sign(np.diagonal(r)))[: n - start])
    lengths = np.sqrt(draw.chisquare(dim, n))
    return np.concatenate(blocks) * lengths[:, None]


def _check(n: int, dim: int) -> None:
    check_int("n", n, low=1)
    check_int("dim", dim, low=1)
