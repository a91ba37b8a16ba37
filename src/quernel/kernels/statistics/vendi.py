"""``vendi_score``: how many different items a sample amounts to, from the spectrum of its kernel (arXiv 2210.02410).

exp of the entropy of the eigenvalues of K / n, K(x, x) = 1: n where all items are unlike, 1 where all are the same.
Cost: O(n D^2 + D^3) with D features where n > D, else O(n^2 D + n^3).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from quernel._errors import QuernelError
from quernel._validate import check_float
from quernel.kernels.moments import Gram
from quernel.kernels.statistics._pair_maps import BLOCK, Kernel, KernelChoice, unit_kernel
from quernel.kernels.statistics.schur_report import entropy


def vendi_score(
    x: Any,
    *,
    kernel: Kernel | Literal["precomputed"] = "cosine",
    bandwidth: float | None = None,
    n_features: int = 0,
    order: float = 1.0,
    random_state: int = 0,
) -> float:
    """Return the effective number of different rows.

    Parameters
    ----------
    x : array or Tensor, shape (n, d), or (n, n) if precomputed
        Rows, or a kernel matrix with a unit diagonal.
    kernel : {"cosine", "gaussian", "precomputed"} or callable, default="cosine"
        As in ``SchurEntropy``.
    bandwidth, n_features, random_state
        Of the Gaussian kernel, as in ``SchurEntropy``.
    order : float, default=1.0
        Of the entropy; large orders count only the most frequent kinds.

    Returns
    -------
    score : float
        In [1, n].

    Raises
    ------
    QuernelError
        If rows are fewer than 1, not finite or, for the cosine kernel, zero, or the kernel's diagonal is not 1.

    References
    ----------
    Friedman, Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning", arXiv 2210.02410, 2022.

    Examples
    --------
    >>> round(vendi_score(torch.eye(3).repeat(2, 1)), 6)
    3.0
    """
    check_float("order", order, low=0.0, open_low=True)
    if kernel == "precomputed":
        k = unit_kernel("x", x)
        if not len(k):
            raise QuernelError("x must have at least one row")
        return math.exp(entropy(k / len(k), order)[0])
    choice = KernelChoice(kernel, bandwidth, n_features, False, random_state)
    rows = choice.side("x", x)
    if not len(rows):
        raise QuernelError("x must have at least one row")
    side = choice.maps((rows.shape[1], rows.shape[1]))[1]
    if side.dim is None or len(rows) <= side.dim:
        return math.exp(entropy(side.gram(rows) / len(rows), order)[0])
    sums = Gram(side.dim, compute_dtype=torch.float64)
    for part in rows.split(BLOCK):
        sums.update(side.features(part))
    return math.exp(entropy(sums.mean(), order)[0])
