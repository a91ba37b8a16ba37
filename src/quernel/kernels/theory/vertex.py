"""Finite width, order 1 / n: the four-point vertex V, how much seeds differ, and the correction of the mean.

In layer l, over random weights, with n_(l-1) neurons in the layer before,

    E[z_i^2 z_j^2] - E[z_i^2] E[z_j^2] = V^l / n_(l-1)   (i != j),     E[z_i^2] = K^l + G^l / n_(l-1),

and, T being the same for z_i^2 z_j (a skip connection of an activation that is not odd makes it),

    V' = q (chi^2 V + 2 chi C_W d T) + 2 c^2 C_W (<z^2 s^2> - K g) + C_W^2 (<s^4> - g^2)
    T' = c (q chi T + C_W K d)
    G' = q (chi G + C_W g'' V / 2 + C_W d' T)

with g = <s^2>, d = <(s^2)'>, chi = c^2 + C_W g', and q = n_l / n_(l-1). All start from 0. The terms of T and of T in G
follow from the cumulants of z_i^2 z_j and z_j^3 (T and 3 T); they are checked against simulated networks in the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.kernels.theory.activations import Activation, Function, as_activation
from quernel.kernels.theory.averages import averages


@dataclass(frozen=True, eq=False)
class FourVertex:
    """Kernel and its fluctuations by layer; index 0 is layer 1. All float64, shape (depth,).

    Parameters
    ----------
    kernel : Tensor
        K at infinite width.
    vertex : Tensor
        V; divide by the width of the layer before.
    odd_vertex : Tensor
        T; 0 without skip connections, and for odd activations.
    mean_correction : Tensor
        G; E[z^2] = K + G / n.
    """

    kernel: Tensor
    vertex: Tensor
    odd_vertex: Tensor
    mean_correction: Tensor

    @property
    def relative(self) -> Tensor:
        """V / K^2; divided by the width it is the relative variance of K from seed to seed."""
        return self.vertex / self.kernel.square()


def four_vertex(
    kernel: float,
    depth: int,
    C_W: float,
    C_b: float,
    activation: str | Function | nn.Module | Activation,
    *,
    widths: Sequence[int] | None = None,
    residual: float = 0.0,
) -> FourVertex:
    """Return the leading fluctuations of a network of finite width, for a single input.

    Parameters
    ----------
    kernel : float
        K^1 = C_b + C_W |x|^2 / n_0 > 0.
    depth : int
        Layers with weights, >= 1.
    C_W, C_b, activation, residual
        As in ``kernel_recursion``.
    widths : sequence of depth - 1 ints, optional
        Neurons of the hidden layers 1 .. depth - 1; all equal without it.

    Returns
    -------
    vertex : FourVertex
        Good where depth / width is well below 1.

    Raises
    ------
    QuernelError
        If an argument is out of range, or K falls to 0 on the way.

    References
    ----------
    Roberts, Yaida and Hanin, arXiv 2106.10165, chapters 4 and 5; the terms of T are an addition.

    Examples
    --------
    >>> four_vertex(1.0, 3, 2.0, 0.0, "relu").relative.round(decimals=6).tolist()
    [0.0, 5.0, 10.0]
    """
    check_int("depth", depth, low=1)
    check_float("C_W", C_W, low=0.0)
    check_float("C_b", C_b, low=0.0)
    c = check_float("residual", residual, low=0.0, high=1.0, open_high=True)
    act = as_activation(activation)
    ratios = _ratios(widths, depth)
    k = torch.tensor(check_float("kernel", kernel, low=0.0, open_low=True), dtype=torch.float64)
    vertex = odd = correction = torch.zeros_like(k)
    rows = [(k, vertex, odd, correction)]
    for q in ratios:
        a = averages(act, k)
        chi = c**2 + C_W * a.square_slope
        drawn = 2 * c**2 * C_W * (a.joint - k * a.square) + C_W**2 * (a.fourth - a.square**2)
        correction = q * (chi * correction + C_W * (a.square_bend * vertex / 2 + a.tilt_slope * odd))
        vertex = q * (chi**2 * vertex + 2 * chi * C_W * a.tilt * odd) + drawn
        odd = c * (q * chi * odd + C_W * k * a.tilt)
        k = c**2 * k + C_b + C_W * a.square
        if not float(k) > 0:
            raise QuernelError(f"K falls to 0 after {len(rows)} layers at C_W={C_W}, C_b={C_b}: no signal is left")
        rows.append((k, vertex, odd, correction))
    return FourVertex(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _ratios(widths: Sequence[int] | None, depth: int) -> list[float]:
    """Return n_l / n_(l-1) for the steps from layer l to l + 1; V^1 = 0, so the first does not matter."""
    if widths is None:
        return [1.0] * (depth - 1)
    held = [check_int("widths", width, low=1) for width in widths]
    if len(held) != depth - 1:
        raise QuernelError(f"widths must name the {depth - 1} hidden layers of {depth} layers; got {len(held)}")
    return [1.0, *(after / before for before, after in itertools.pairwise(held))][: depth - 1]
