"""Averages over Gaussian variables of any function: E[f(z)] and E[f(u) g(v)], to quadrature precision.

What infinitely wide networks are made of. One variable: Gauss-Legendre on panels that shrink by halves towards 0, on
both sides of it, so that a kink at 0 (ReLU), a narrow step (tanh of a wide z) and a wide bell are all resolved. Two
variables: polar coordinates, in which the kinks of f at u = 0 and of g at v = 0 are four rays; each arc between them
has its own nodes. Cost: 480 evaluations a variance, 11,520 a pair, in blocks of some megabytes.

Kinks elsewhere (hard tanh at -1 and 1) are no rays: where such are named, panels end at them, and two variables are
averaged one after the other, v given u. Cost then: some 50,000 evaluations a pair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float
from quernel.kernels.grams import cosine_and_sine

Function = Callable[[Tensor], Tensor]

# The density beyond 12 standard deviations is 1e-32.
_REACH = 12.0
_PANELS, _PANEL_NODES = 12, 20
_RADIAL_PANELS, _ARC_NODES = 6, 24
# Where v is averaged given u: pieces between kinks are smooth on the scale of the density, so few panels do.
_GIVEN_PANELS, _GIVEN_NODES = 4, 16
# The average over v, as a function of u, turns over some standard deviations of v around each kink.
_TURN = (-12.0, -4.0, -1.5, 0.0, 1.5, 4.0, 12.0)
# Evaluations a block: 8 MB of float64.
_BLOCK = 2**20


def gaussian_average(f: Function, variance: Tensor, kinks: Sequence[float] = ()) -> Tensor:
    """Return E[f(z)] over z ~ N(0, variance).

    Parameters
    ----------
    f : callable
        Maps a float64 tensor to one of the same shape, elementwise; may have kinks or jumps at 0.
    variance : Tensor, any shape
        >= 0; gradients flow through it where f is differentiable.
    kinks : sequence of float, default=()
        Where else f has kinks or jumps.

    Returns
    -------
    average : Tensor, shape of ``variance``, float64

    Raises
    ------
    QuernelError
        If a variance is negative, a kink is not finite or f returns another shape.

    Examples
    --------
    >>> round(float(gaussian_average(torch.relu, torch.tensor(2.0 * torch.pi))), 6)
    1.0
    """
    z, weights = gaussian_nodes(variance, kinks)
    return (_values(f, z) * weights).sum(-1)


def gaussian_nodes(variance: Tensor, kinks: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Return points z and weights w with E[f(z)] = sum_i w_i f(z_i), for averages of several functions at once.

    Parameters
    ----------
    variance, kinks
        As in ``gaussian_average``.

    Returns
    -------
    z : Tensor, shape (*variance.shape, m), float64
    weights : Tensor, shape (m,), or (*variance.shape, m) where there are kinks

    Examples
    --------
    >>> z, weights = gaussian_nodes(torch.tensor(2.0))
    >>> round(float((z**4 * weights).sum()), 6)
    12.0
    """
    variance = variance.double()
    if not bool((variance >= 0).all()):
        raise QuernelError("variance must be >= 0 and not NaN")
    places = _elsewhere(kinks)
    deviation = variance.sqrt()[..., None]
    if not places:
        nodes, weights = _line()
        return deviation * nodes.to(variance.device), weights.to(variance.device)
    ends = torch.tensor(places, dtype=torch.float64).to(variance) / deviation.detach()
    nodes, weights = _between(_grid(_PANELS).to(variance), ends, _PANEL_NODES)
    return deviation * nodes, weights


def gaussian_product_average(
    f: Function, g: Function, left: Tensor, right: Tensor, cross: Tensor, kinks: Sequence[float] = ()
) -> Tensor:
    """Return E[f(u) g(v)] over (u, v) ~ N(0, [[left, cross], [cross, right]]).

    Parameters
    ----------
    f, g : callable
        Map a float64 tensor to one of the same shape, elementwise; may have kinks or jumps at 0.
    left, right, cross : Tensor, shapes that broadcast
        Two variances and the covariance; a covariance beyond what the variances allow is taken back to it.
    kinks : sequence of float, default=()
        Where else f or g has kinks or jumps.

    Returns
    -------
    average : Tensor, the broadcast shape, float64

    Raises
    ------
    QuernelError
        If a variance is negative, a kink is not finite or a function returns another shape.

    Examples
    --------
    >>> one = torch.tensor(1.0)
    >>> round(float(gaussian_product_average(torch.relu, torch.relu, one, one, 0 * one) * 2 * torch.pi), 6)
    1.0
    """
    left, right, cross = torch.broadcast_tensors(left.double(), right.double(), cross.double())
    if not bool(((left >= 0) & (right >= 0)).all()):
        raise QuernelError("left and right must be >= 0 and not NaN")
    places = _elsewhere(kinks)
    if places:
        # 0 is an edge of the panels of u already, and must be one of those of v.
        rule = functools.partial(
            _one_given_the_other, f, g, torch.tensor((0.0, *places), dtype=torch.float64).to(cross)
        )
        panels = 2 * _GIVEN_PANELS + len(places)
        evaluations = (panels + len(_TURN) * (len(places) + 1)) * (panels + 1) * _GIVEN_NODES**2
    else:
        radii, radial = _radius()
        rule = functools.partial(_polar, f, g, radii.to(cross.device), radial.to(cross.device))
        evaluations = len(radii) * 4 * _ARC_NODES
    flat = [part.reshape(-1) for part in (left, right, cross)]
    rows = max(1, _BLOCK // evaluations)
    parts = [rule(*block) for block in zip(*(part.split(rows) for part in flat), strict=True)]
    return torch.cat(parts).reshape(cross.shape) if parts else cross.new_zeros(cross.shape)


def _polar(f: Function, g: Function, radii: Tensor, radial: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
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


def _one_given_the_other(f: Function, g: Function, kinks: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Average over u = sqrt(a) x the average over v = m x + s y; panels end at the kinks of both."""
    cosine, sine = cosine_and_sine(c, (a * b).sqrt())
    m, s = (cosine * b.sqrt())[:, None], (sine * b.sqrt())[:, None]
    grid = _grid(_GIVEN_PANELS).to(a)
    turns = (kinks[:, None] + s.detach()[..., None] * torch.tensor(_TURN).to(a)).flatten(1)  # (k, kinks * turns)
    ends = torch.cat((kinks / a.detach().sqrt()[:, None], turns / m.detach()), 1)
    x, outer = _between(grid, ends, _GIVEN_NODES)  # (k, p)
    mean = m * x
    y, inner = _between(grid, (kinks - mean.detach()[..., None]) / s.detach()[..., None], _GIVEN_NODES)  # (k, p, q)
    given = (_values(g, mean[..., None] + s[..., None] * y) * inner).sum(-1)
    return (_values(f, a.sqrt()[:, None] * x) * given * outer).sum(-1)


def _values(f: Function, z: Tensor) -> Tensor:
    values = f(z)
    if not isinstance(values, Tensor) or values.shape != z.shape:
        raise QuernelError(f"the function must return a tensor of the shape it got, {tuple(z.shape)}")
    return values.double()


def _elsewhere(kinks: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({check_float("kinks", kink) for kink in kinks} - {0.0}))


def _between(grid: Tensor, ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of N(0, 1) on panels between the edges of a grid and further ends, (..., m)."""
    # 0 / 0 is where nothing turns over: any edge is right.
    ends = ends.nan_to_num(nan=0.0).clamp(-_REACH, _REACH)
    edges = torch.cat((grid.expand(*ends.shape[:-1], -1), ends), -1).sort(-1).values
    x, w = (torch.from_numpy(part).to(grid) for part in np.polynomial.legendre.leggauss(count))
    width = edges.diff(dim=-1)[..., None]
    nodes = (edges[..., :-1, None] + width * (x + 1) / 2).flatten(-2)
    return nodes, (width * w / 2).flatten(-2) * torch.exp(-0.5 * nodes.square()) / (2 * torch.pi) ** 0.5


def _grid(panels: int) -> Tensor:
    edges = _REACH * 0.5 ** np.arange(panels)
    return torch.from_numpy(np.concatenate((-edges, [0.0], edges[::-1])))


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
