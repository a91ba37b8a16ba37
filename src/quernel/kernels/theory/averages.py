"""What one layer does to a single input: Gaussian averages of the activation, from one evaluation at the nodes.

With s2 = s(z)^2 and z ~ N(0, K), derivatives by K are averages of Hermite polynomials, so they need no derivative of s:

    g = <s2>,   g' = <s2 (z^2 - K)> / 2K^2,   g'' = <s2 (z^4 - 6 K z^2 + 3 K^2)> / 4K^4,
    d = <(s2)'> = <s2 z> / K,   d' = <s2 (z^3 - 3 K z)> / 2K^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quernel.kernels.gaussian_averages import gaussian_nodes
from quernel.kernels.theory.activations import Activation


@dataclass(frozen=True, eq=False)
class Averages:
    """Averages over z ~ N(0, K); every field has the shape of K."""

    square: Tensor  # g = <s^2>
    square_slope: Tensor  # g'
    square_bend: Tensor  # g''
    slope_square: Tensor  # <s'^2>
    fourth: Tensor  # <s^4>
    joint: Tensor  # <z^2 s^2>
    tilt: Tensor  # d = <(s^2)'>; 0 where s^2 is even
    tilt_slope: Tensor  # d'
    noise: Tensor  # <s^2 |z^2 - K|> / 2K^2: g' means something where it is well above the rounding of this
    edge: Tensor  # share of g that the outermost nodes have: above a rounding, what lies beyond them is missing


def averages(activation: Activation, kernel: Tensor) -> Averages:
    """Return the averages at K = ``kernel``, any shape, float64, all > 0."""
    z, weights = gaussian_nodes(kernel, activation.kinks)
    square = activation(z).square()
    slope_square = activation.slope(z).square()
    k = kernel[..., None]
    x2 = z.square()

    def mean(values: Tensor) -> Tensor:
        return (values * weights).sum(-1)

    lowered, shares = x2 - k, square * weights
    return Averages(
        square=mean(square),
        square_slope=mean(square * lowered) / (2 * kernel**2),
        square_bend=mean(square * (x2.square() - 6 * k * x2 + 3 * k**2)) / (4 * kernel**4),
        slope_square=mean(slope_square),
        fourth=mean(square.square()),
        joint=mean(square * x2),
        tilt=mean(square * z) / kernel,
        tilt_slope=mean(square * z * (x2 - 3 * k)) / (2 * kernel**3),
        noise=mean(square * lowered.abs()) / (2 * kernel**2),
        edge=torch.maximum(shares[..., 0], shares[..., -1]) / shares.sum(-1),
    )


def mean_square(activation: Activation, kernel: Tensor) -> Tensor:
    """Return g = <s^2>_K; K >= 0."""
    if activation.slopes is not None:
        return _half_square(activation.slopes) * kernel
    z, weights = gaussian_nodes(kernel, activation.kinks)
    return (activation(z).square() * weights).sum(-1)


def mean_slope_square(activation: Activation, kernel: Tensor) -> Tensor:
    """Return <s'^2>_K; K >= 0."""
    if activation.slopes is not None:
        return torch.full_like(kernel, _half_square(activation.slopes))
    z, weights = gaussian_nodes(kernel, activation.kinks)
    return (activation.slope(z).square() * weights).sum(-1)


def _half_square(slopes: tuple[float, float]) -> float:
    return (slopes[0] ** 2 + slopes[1] ** 2) / 2
