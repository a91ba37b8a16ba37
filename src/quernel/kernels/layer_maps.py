"""What one layer of infinite width does to a kernel: E[f(u) f(v)] and E[f'(u) f'(v)] for an activation f.

Both are maps of inner products and squared lengths, as the kernels of ``grams``: (u, v) is Gaussian with the covariance
[[left, cross], [cross, right]]. What is linear on both sides of 0 (ReLU, leaky ReLU, the identity) and erf in closed
form, everything else by quadrature (11,520 evaluations of f a pair). Recursions over layers, of the NNGP kernel, the
NTK or others, are made of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.kernels.gaussian_averages import Function, gaussian_average, gaussian_product_average
from quernel.kernels.grams import arc_cosine_gram, coincident, erf_gram, erf_slope_gram
from quernel.kernels.theory.activations import Activation, as_activation

LayerMap = Callable[[Tensor, Tensor, Tensor], Tensor]
PairMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

_RELU = (0.0, 1.0)


def layer_map(activation: str | Function | Activation) -> tuple[LayerMap, LayerMap]:
    """Return the value map E[f(u) f(v)] and the slope map E[f'(u) f'(v)] of an activation.

    Parameters
    ----------
    activation : str, callable or Activation
        What ``quernel.kernels.theory.as_activation`` takes: a name, or an elementwise function of tensors that torch
        can differentiate. Its kinks are found.

    Returns
    -------
    value_map, slope_map : callable
        ``(cross, left, right) -> kernel`` with shapes (*batch, n, m), (*batch, n), (*batch, m) and the result's
        (*batch, n, m), in the dtype of ``cross``. Gradients flow through both.

    Raises
    ------
    QuernelError
        If the name is unknown or the function is none that can be averaged; when called, if shapes do not fit.

    Notes
    -----
    Between a point and itself a slope map that jumps (of a function with a kink) is sensitive to rounding: the angle of
    two vectors is known to the root of the precision only. ReLU takes angles below 1e-7 as none; for a kinked function
    of yours expect 1e-6 there.

    Examples
    --------
    >>> value, slope = layer_map("relu")
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> float(value(torch.ones(1, 1).double(), one, one)), float(slope(torch.ones(1, 1).double(), one, one))
    (0.5, 0.5)
    """
    known = as_activation(activation)
    if known.slopes is not None:
        return _linear_sides(*known.slopes)
    if known.function is torch.erf:
        return erf_gram, erf_slope_gram
    return tuple(functools.partial(_average, f, known.kinks) for f in (known, known.slope))  # type: ignore[return-value]


def pair_map(activation: str | Function | Activation, *, slopes: bool = True) -> PairMap:
    """Return ``(cross, left, right) -> (value, slope)``: the two maps of ``layer_map`` at once, without gradients.

    ReLU needs the angle for both and takes it once, in place. Without ``slopes`` the second is None.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> [float(k) for k in pair_map("relu")(torch.ones(1, 1).double(), one, one)]
    [0.5, 0.5]
    """
    if as_activation(activation).slopes == _RELU:
        return _relu_pair if slopes else lambda *gram: (_relu_pair(*gram)[0], None)
    value_map, slope_map = layer_map(activation)
    return lambda *gram: (value_map(*gram), slope_map(*gram) if slopes else None)


def variance_map(activation: str | Function | Activation) -> Callable[[Tensor], Tensor]:
    """Return ``variance -> E[f(z)^2]``, z ~ N(0, variance): the value map between points and themselves.

    Examples
    --------
    >>> variance_map("relu")(torch.tensor([2.0])).tolist()
    [1.0]
    """
    known = as_activation(activation)
    if known.slopes is not None:
        gain = (known.slopes[0] ** 2 + known.slopes[1] ** 2) / 2
        return lambda variance: gain * variance
    if known.function is torch.erf:
        return lambda variance: (2 / torch.pi) * (2 * variance / (1 + 2 * variance)).arcsin()
    return functools.partial(_square_average, known)


def _linear_sides(below: float, above: float) -> tuple[LayerMap, LayerMap]:
    """Return the maps of f(z) = below z + (above - below) relu(z), by E[u relu(v)] = E[u v] / 2."""
    even, step = below * above, (above - below) ** 2 / 2
    if step == 0:
        return (lambda cross, left, right: even * cross), (lambda cross, left, right: torch.full_like(cross, even))
    return (
        lambda cross, left, right: even * cross + step * arc_cosine_gram(cross, left, right),
        lambda cross, left, right: even + step * arc_cosine_gram(cross, left, right, order=0),
    )


def _relu_pair(cross: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    roots = left.sqrt()[..., :, None], right.sqrt()[..., None, :]
    # A point without length has no angle; its cosine is taken as 0, its slope below.
    inverse = [torch.where(root > 0, root, torch.inf).reciprocal() for root in roots]
    cosine = coincident(cross * inverse[0] * inverse[1])
    slope = (1 - cosine).mul_(1 + cosine).sqrt_()  # the sine, and in its place, soon, the share of directions
    value = slope / torch.pi
    slope = torch.atan2(slope, cosine).div_(-torch.pi).add_(1)  # (pi - t) / pi, exactly 0 at t = pi
    value = value.addcmul_(slope, cosine).mul_(roots[0] / 2).mul_(roots[1])
    slope = slope.div_(2)
    if not all(bool((root > 0).all()) for root in roots):
        slope = slope.mul_(roots[0] > 0).mul_(roots[1] > 0)
    return value, slope


def _average(f: Function, kinks: tuple[float, ...], cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if cross.shape != (*left.shape, right.shape[-1]) or left.shape[:-1] != right.shape[:-1]:
        raise QuernelError(
            "cross, left and right must have shapes (*batch, n, m), (*batch, n) and (*batch, m); "
            f"got {tuple(cross.shape)}, {tuple(left.shape)}, {tuple(right.shape)}"
        )
    return gaussian_product_average(f, f, left[..., :, None], right[..., None, :], cross, kinks).to(cross.dtype)


def _square_average(known: Activation, variance: Tensor) -> Tensor:
    return gaussian_average(lambda z: known(z).square(), variance, known.kinks).to(variance.dtype)
