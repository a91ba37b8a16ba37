"""Averages over Gaussian variables of any function: E[f(z)] and E[f(u) g(v)], to quadrature precision.

What infinitely wide networks are made of. One variable: Gauss-Legendre on panels that shrink by halves towards 0, on
both sides of it, so that a kink at 0 (ReLU), a narrow step (tanh of a wide z) and a wide bell are all resolved. Two
variables: polar coordinates, in which the kinks of f at u = 0 and of g at v = 0 are four rays; each arc between them
has its own nodes. Cost: 480 evaluations a variance, 11,520 a pair, in blocks of some megabytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.kernels.grams import cosine_and_sine

Function = Callable[[Tensor], Tensor]

# The density beyond 12 standard deviations is 1e-32.
_REACH = 12.0
_PANELS, _PANEL_NODES = 12, 20
_RADIAL_PANELS, _ARC_NODES = 6, 24
# Evaluations a block: 8 MB of float64.
_BLOCK = 2**20


def gaussian_average(f: Function, variance: Tensor) -> Tensor:
    """Return E[f(z)] over z ~ N(0, variance).

    Parameters
    ----------
    f : callable
        Maps a float64 tensor to one of the same shape, elementwise; may have kinks or jumps at 0.
    variance : Tensor, any shape
        >= 0; gradients flow through it where f is differentiable.

    Returns
    -------
    average : Tensor, shape of ``variance``, float64

    Raises
    ------
    QuernelError
        If a variance is negative or f returns another shape.

    Examples
    --------
    >>> round(float(gaussian_average(torch.relu, torch.tensor(2.0 * torch.pi))), 6)
    1.0
    """
    variance = variance.double()
    if not bool((variance >= 0).all()):
        raise QuernelError("variance must be >= 0 and not NaN")
    nodes, weights = _line()
    z = variance.sqrt()[..., None] * nodes.to(variance.device)
    return _values(f, z) @ weights.to(variance.device)


def gaussian_product_average(f: Function, g: Function, left: Tensor, right: Tensor, cross: Tensor) -> Tensor:
    """Return E[f(u) g(v)] over (u, v) ~ N(0, [[left, cross], [cross, right]]).

    Parameters
    ----------
    f, g : callable
        Map a float64 tensor to one of the same shape, elementwise; may have kinks or jumps at 0.
    left, right, cross : Tensor, shapes that broadcast
        Two variances and the covariance; a covariance beyond what the variances allow is taken back to it.

    Returns
    -------
    average : Tensor, the broadcast shape, float64

    Raises
    ------
    QuernelError
        If a variance is negative or a function returns another shape.

    Examples
    --------
    >>> one = torch.tensor(1.0)
    >>> round(float(gaussian_product_average(torch.relu, torch.relu, one, one, 0 * one) * 2 * torch.pi), 6)
    1.0
    """
    left, right, cross = torch.broadcast_tensors(left.double(), right.double(), cross.double())
    if not bool(((left >= 0) & (right >= 0)).all()):
        raise QuernelError("left and right must be >= 0 and not NaN")
    shape = cross.shape
    radii, radial = _radius()
    flat = [part.reshape(-1) for part in (left, right, cross)]
    rows = max(1, _BLOCK // (len(radii) * 4 * _ARC_NODES))
    nodes, weights = radii.to(cross.device), radial.to(cross.device)
    blocks = zip(*(part.split(rows) for part in flat), strict=True)
    parts = [_polar(f, g, a, b, c, nodes, weights) for a, b, c in blocks]
    return torch.cat(parts).reshape(shape) if parts else cross.new_zeros(shape)


def _polar(f: Function, g: Function, a: Tensor, b: Tensor, c: Tensor, radii: Tensor, radial: Tensor) -> Tensor:
    cosine, sine = cosine_and_sine(c, (a * b).sqrt())
    # u = sqrt(a) r cos(s), v = sqrt(b) r cos(s - t): the kinks lie at s = +-pi/2 and t +- pi/2.
    t = torch.atan2(sine, cosine)
    half = torch.pi / 2
    edges = torch.stack((-half + 0 * t, t - half, half + 0 * t, t + half, 3 * half + 0 * t), -1)  # (k, 5)
    x, w = (torch.from_numpy(part).to(a) for part in np.polynomial.legendre.leggauss(_ARC_NODES))
    start, width = edges[:, :-1, None], edges.diff(dim=-1)[..., None]
    angles = (start + width * (x + 1) / 2).flatten(1)  # (k, 4 nodes)
    arc = (width * w / 2).flatten(1) / (2 * torch.pi)
    u = (a.sqrt()[:, None] * angles.cos())[..., None] * radii
    v = (b.sqrt()[:, None] * (angles - t[:, None]).cos())[..., None] * radii
    return (((_values(f, u) * _values(g, v)) @ radial) * arc).sum(-1)


def _values(f: Function, z: Tensor) -> Tensor:
    values = f(z)
    if not isinstance(values, Tensor) or values.shape != z.shape:
        raise QuernelError(f"the function must return a tensor of the shape it got, {tuple(z.shape)}")
    return values.double()


@functools.cache
def _line() -> tuple[Tensor, Tensor]:
    """Return nodes and weights of N(0, 1), kinks at 0 allowed."""
    points, weights = _graded(_PANELS)
    weights = weights * np.exp(-0.5 * points**2) / np.sqrt(2 * np.pi)
    return torch.from_numpy(np.concatenate((-points, points))), torch.from_numpy(np.tile(weights, 2))


@functools.cache
def _radius() -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the density r exp(-r^2 / 2)."""
    points, weights = _graded(_RADIAL_PANELS)
    return torch.from_numpy(points), torch.from_numpy(weights * points * np.exp(-0.5 * points**2))


def _graded(panels: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.legendre.leggauss(_PANEL_NODES)
    edges = np.concatenate(([0.0], _REACH * 0.5 ** np.arange(panels)[::-1]))
    width = np.diff(edges)[:, None]
    return (edges[:-1, None] + width * (x + 1) / 2).ravel(), (width * w / 2).ravel()
