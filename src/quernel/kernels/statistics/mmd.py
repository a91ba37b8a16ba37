"""``mmd2``: how far two samples are apart in mean embedding, without bias, with a permutation test; ``median_gamma``.

    MMD^2(X, Y) = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),    k(x, y) = exp(-gamma |x - y|^2),

the first two means over different rows where it is unbiased (Gretton et al., JMLR 13, 2012). The kernel matrix is met
in blocks of rows, for all permutations at once: (n + m)^2 (d + permutations) multiply-adds, nothing square is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._validate import check_bool, check_finite, check_float, check_int
from quernel.kernels.gaussian import gaussian_kernel

# Rows of the kernel matrix formed at a time.
_ROWS = 256


@dataclass(frozen=True)
class MeanDiscrepancy:
    """What ``mmd2`` found.

    Attributes
    ----------
    value : float
        MMD^2; unbiased, it may be negative.
    p_value : float or None
        Share of permutations that are at least as far apart, the samples as they came counted in; None without them.
    gamma : float
        Of the kernel.
    """

    value: float
    p_value: float | None
    gamma: float


def mmd2(
    X: ArrayLike,
    Y: ArrayLike,
    *,
    gamma: float | Literal["median"] = "median",
    unbiased: bool = True,
    permutations: int = 0,
    random_state: Seed = None,
) -> MeanDiscrepancy:
    """Return the squared maximum mean discrepancy of two samples under a Gaussian kernel.

    Parameters
    ----------
    X, Y : array, shapes (n, d) and (m, d)
        At least two rows each.
    gamma : float or "median", default="median"
        "median" is ``median_gamma`` of all rows, which permutations leave as it is.
    unbiased : bool, default=True
        Leave the pairs of a row with itself out (a U-statistic); with them the value is never negative.
    permutations : int, default=0
        Of the rows between the samples, for a p-value; 0 for none.
    random_state : int, Generator or None, default=None
        What decides the permutations.

    Returns
    -------
    found : MeanDiscrepancy

    Raises
    ------
    QuernelError
        If shapes do not fit, a sample has fewer than two rows, or a value is not finite.

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> x, y = draw.standard_normal((100, 3)), draw.standard_normal((100, 3)) + 1
    >>> found = mmd2(x, y, permutations=199, random_state=0)
    >>> found.value > 0.1, found.p_value
    (True, 0.005)
    """
    x, y = _sample("X", X), _sample("Y", Y)
    if x.shape[1] != y.shape[1]:
        raise QuernelError(f"X and Y must have as many columns; got {x.shape[1]} and {y.shape[1]}")
    check_bool("unbiased", unbiased)
    check_int("permutations", permutations, low=0)
    draw = generator(random_state, "random_state")
    rows = np.concatenate((x, y))
    width = median_gamma(rows) if gamma == "median" else _positive(gamma)
    first = np.zeros((permutations + 1, len(rows)))
    first[:, : len(x)] = 1.0
    if permutations:
        first[1:] = draw.permuted(first[1:], axis=1)
    scaled = torch.from_numpy((rows - rows.mean(0)) * np.sqrt(2 * width))
    values = _discrepancies(scaled, torch.from_numpy(first.T.copy()), len(x), unbiased)
    if not permutations:
        return MeanDiscrepancy(float(values[0]), None, width)
    # Sums in another order differ in the last digits; equal splits must count as equal.
    far = values[1:] >= values[0] - 1e-12
    return MeanDiscrepancy(float(values[0]), float((1 + far.sum()) / (permutations + 1)), width)


def median_gamma(X: ArrayLike, *, n_rows: int = 1000, random_state: Seed = 0) -> float:
    """Return 1 / median^2 of the distances between rows: a width for a Gaussian kernel exp(-gamma |x - y|^2).

    Parameters
    ----------
    X : array, shape (n, d)
        At least two rows. For embeddings of several models take a sample that stands for all of them, and use its
        gamma for each.
    n_rows : int, default=1000
        Rows compared at most, chosen at random.
    random_state : int, Generator or None, default=0
        What decides which.

    Returns
    -------
    gamma : float
        1.0 where more than half of the distances are 0.

    Examples
    --------
    >>> median_gamma([[0.0], [2.0]])
    0.25
    """
    rows = _sample("X", X)
    most = check_int("n_rows", n_rows, low=2)
    if len(rows) > most:
        rows = rows[generator(random_state, "random_state").choice(len(rows), most, replace=False)]
    # Differences, not products: a median near 0 must not be rounding.
    distances = torch.nn.functional.pdist(torch.from_numpy(np.ascontiguousarray(rows)))
    middle = float(np.median(distances.numpy()))
    return 1.0 / middle**2 if middle > 0 else 1.0


def _discrepancies(rows: Tensor, first: Tensor, n: int, unbiased: bool) -> NDArray[np.float64]:
    """Return MMD^2 for each column of ``first``, which says by 1 or 0 which n of the rows are the first sample."""
    m = len(rows) - n
    within, across, whole = first.new_zeros(first.shape[1]), first.new_zeros(first.shape[1]), 0.0
    for i in range(0, len(rows), _ROWS):
        k = gaussian_kernel(rows[i : i + _ROWS], rows)
        own = first[i : i + _ROWS]
        within += (own * (k @ first)).sum(0)
        across += own.T @ k.sum(1)
        whole += float(k.sum())
    # Sums over pairs: of the first sample, of the second, of one row each.
    xx, xy = within, across - within
    yy = whole - 2 * across + within
    # k(x, x) = 1 for every row.
    a, b = ((xx - n) / (n * (n - 1)), (yy - m) / (m * (m - 1))) if unbiased else (xx / n**2, yy / m**2)
    values: NDArray[np.float64] = (a + b - 2 * xy / (n * m)).numpy()
    return values if unbiased else np.maximum(values, 0.0)


def _sample(name: str, x: Any) -> NDArray[np.float64]:
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or len(rows) < 2 or not rows.shape[1]:
        raise QuernelError(f"{name} must be numbers of shape (n, d), n >= 2; got {rows.dtype}, shape {rows.shape}")
    check_finite(name, rows)
    return rows.astype(np.float64)


def _positive(gamma: Any) -> float:
    if isinstance(gamma, str):
        raise QuernelError(f'gamma must be "median" or a number > 0; got {gamma!r}')
    return check_float("gamma", gamma, low=0.0, open_low=True)
