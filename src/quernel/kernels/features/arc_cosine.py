"""Arc-cosine kernels (Cho and Saul, 2009) and their random features: wide random ReLU layers as dot products.

k_p(x, y) = 2 E[ step(g.x) step(g.y) (g.x)^p (g.y)^p ] over g ~ N(0, I) = |x|^p |y|^p J_p(t) / pi, t the angle:
J_0 = pi - t,  J_1 = sin t + (pi - t) cos t,  J_2 = 3 sin t cos t + (pi - t) (1 + 2 cos^2 t).
Features: sqrt(2 / n) step(Gx) (Gx)^p. SNNK's ReLU features (arXiv 2310.13225) are those of order 1 without the 2.
"""

from __future__ import annotations

import math

import torch

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float
from quernel.kernels.grams import arc_cosine_gram
from quernel.kernels.linalg import Array, as_tensor, like

ORDERS = (0, 1, 2)


def arc_cosine_features(projections: Array, order: int = 1, threshold: float = 0.0) -> Array:
    """Return ``sqrt(2 / n) step(p) p^order`` of projections p on n random directions.

    Parameters
    ----------
    projections : Tensor or array, shape (..., n)
        ``x @ G.T`` with random directions G.
    order : {0, 1, 2}, default=1
        0 is a step, 1 a ReLU, 2 a squared ReLU.
    threshold : float, default=0.0
        With order 1: ``max(p, threshold)`` instead of ``max(p, 0)``, as SNNK allows; then the dot products no
        longer estimate an arc-cosine kernel.

    Returns
    -------
    features : same kind, shape and dtype

    Examples
    --------
    >>> arc_cosine_features(torch.tensor([[-1.0, 3.0]])).tolist()
    [[0.0, 3.0]]
    """
    check_choice("order", order, ORDERS)
    check_float("threshold", threshold)
    if threshold and order != 1:
        raise QuernelError(f"threshold needs order=1; got threshold={threshold} with order={order}")
    p = as_tensor("projections", projections)
    if not p.is_floating_point() or p.ndim == 0 or p.shape[-1] == 0:
        raise QuernelError(f"projections must be floating point, shape (..., n); got {p.dtype}, {tuple(p.shape)}")
    if order == 0:
        # The kernel counts x = 0 as no side at all.
        values = (p > 0).to(p.dtype)
    else:
        values = p.clamp_min(threshold) if order == 1 else p.clamp_min(0).square()
    return like(values * math.sqrt(2 / p.shape[-1]), projections)


def arc_cosine_kernel(x: Array, y: Array, order: int = 1) -> Array:
    """Return the arc-cosine kernel between all rows.

    Parameters
    ----------
    x, y : Tensor or array, shapes (n, d) and (m, d)
        Floating point; computed in float64.
    order : {0, 1, 2}, default=1

    Returns
    -------
    kernel : same kind and dtype as ``x``, shape (n, m)
        0 where a row is zero.

    References
    ----------
    Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009, eq. (3) to (7).

    Examples
    --------
    >>> arc_cosine_kernel(torch.eye(2), torch.eye(2), order=0).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    check_choice("order", order, ORDERS)
    a, b = as_tensor("x", x), as_tensor("y", y)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.is_floating_point():
        raise QuernelError(f"x and y must be floating matrices of equal width; got {tuple(a.shape)}, {tuple(b.shape)}")
    dtype = a.dtype
    a, b = a.double(), b.double()
    cross, left, right = a @ b.mT, a.square().sum(1), b.square().sum(1)
    if order < 2:
        return like(arc_cosine_gram(cross, left, right, order).to(dtype), x)
    lengths = (left[:, None] * right).sqrt()
    # Rounding can push a cosine past 1; a zero row has no angle, and its length makes the kernel 0.
    cosine = (cross / lengths.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    sine = (1 - cosine.square()).sqrt()
    shape = 3 * sine * cosine + (torch.pi - cosine.arccos()) * (1 + 2 * cosine.square())
    return like((lengths.square() * shape / torch.pi).to(dtype), x)
