"""``simplex_logits``: products with the corners of a regular simplex, without ever storing them (arXiv 2405.02581).

K corners in d = K - 1 dimensions: the rows e_1 .. e_d and a (1, ..., 1) with a = (1 - sqrt(K)) / d, less their mean row
m (1, ..., 1), m = (1 + a) / K, over their common length r = sqrt((1 - m)^2 + (d - 1) m^2).  With S = sum(z) so

    <z, w_c> = (z_c - m S) / r  for c < d,     <z, w_d> = (a - m) S / r:     O(d) instead of O(K d).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_int


class Corners(NamedTuple):
    """The three numbers that a simplex is made of: last row, mean row, length of the rows."""

    a: float
    m: float
    r: float


def corners(n: int) -> Corners:
    """Return the numbers of the simplex with ``n`` corners, n >= 2."""
    d = n - 1
    a = (1 - math.sqrt(n)) / d
    m = (1 + a) / n
    return Corners(a, m, math.sqrt((1 - m) ** 2 + (d - 1) * m * m))


def simplex_logits(z: Tensor) -> Tensor:
    """Return the products of each row with all corners of the regular simplex around zero.

    Parameters
    ----------
    z : Tensor, shape (..., d)
        Features, d >= 1.  Floating; sums of float16 and bfloat16 are taken in float32.

    Returns
    -------
    logits : Tensor, shape (..., d + 1)
        In the dtype of ``z``; ``z @ simplex_prototypes(d + 1).T`` up to rounding.

    Raises
    ------
    QuernelError
        If ``z`` has no features or is not floating.

    Notes
    -----
    Three passes over d numbers a row and no matrix; gradients of any order go through plain operations.

    References
    ----------
    Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
    Model Replacements", arXiv 2405.02581, 2024.

    Examples
    --------
    >>> z = torch.tensor([[3.0, 0.0, 1.0]])
    >>> torch.allclose(simplex_logits(z), z @ simplex_prototypes(4).T, atol=1e-6)
    True
    """
    if z.ndim == 0 or z.shape[-1] < 1 or not z.is_floating_point():
        raise QuernelError(f"z must hold floating features, shape (..., d), d >= 1; got {z.dtype} {tuple(z.shape)}")
    a, m, r = corners(z.shape[-1] + 1)
    wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    total = wide.sum(-1, keepdim=True)  # (..., 1)
    most = torch.add(total * (-m / r), wide, alpha=1 / r)  # (..., d)
    return torch.cat((most, total * ((a - m) / r)), -1).to(z.dtype)


def simplex_prototypes(
    n: int, ids: Tensor | None = None, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Return corners of the regular simplex with ``n`` corners: unit rows, pairwise cosine -1 / (n - 1), sum zero.

    Parameters
    ----------
    n : int
        Corners K of the whole simplex, at least 2.
    ids : Tensor, shape (k,), int64, optional
        Which of them, each in 0 .. n - 1; default all.
    dtype, device
        Of the result.

    Returns
    -------
    w : Tensor, shape (k, n - 1)

    Raises
    ------
    QuernelError
        If ``n`` or an id is out of range.

    Examples
    --------
    >>> w = simplex_prototypes(3, dtype=torch.float64)
    >>> (w @ w.T).round(decimals=6).tolist()
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    a, m, r = corners(check_int("n", n, low=2))
    ids = torch.arange(n, device=device) if ids is None else ids.to(device)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
        raise QuernelError(f"ids must lie in 0 .. {n - 1}; got {int(ids.min())} to {int(ids.max())}")
    w = torch.full((len(ids), n - 1), -m / r, dtype=torch.float64, device=ids.device)
    last = ids == n - 1
    w[last] = (a - m) / r
    rows = (~last).nonzero().flatten()
    w[rows, ids[rows]] = (1 - m) / r
    return w.to(dtype)
