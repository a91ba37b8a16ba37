"""What one layer of infinite width does to a kernel: E[f(u) f(v)] and E[f'(u) f'(v)] for an activation f.

Both are maps of inner products and squared lengths, as the kernels of ``grams``: (u, v) is Gaussian with the
covariance [[left, cross], [cross, right]]. ReLU, erf and the identity in closed form, everything else by quadrature
(11,520 evaluations of f a pair). Recursions over layers, of the NNGP kernel, the NTK or others, are made of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice
from quernel.kernels.gaussian_averages import Function, gaussian_average, gaussian_product_average
from quernel.kernels.grams import arc_cosine_gram, coincident, erf_gram, erf_slope_gram
from quernel.kernels.theory.activations import as_activation

LayerMap = Callable[[Tensor, Tensor, Tensor], Tensor]
PairMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
ActivationName = Literal["cos", "erf", "gelu", "identity", "relu", "sigmoid", "silu", "sin", "softplus", "tanh"]

ACTIVATIONS: Mapping[str, Function] = {
    "cos": torch.cos,
    "erf": torch.erf,
    "gelu": F.gelu,
    "identity": lambda z: z,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def layer_map(activation: ActivationName | Function) -> tuple[LayerMap, LayerMap]:
    """Return the value map E[f(u) f(v)] and the slope map E[f'(u) f'(v)] of an activation.

    Parameters
    ----------
    activation : str or callable
        A key of ``ACTIVATIONS``, or an elementwise function of tensors that torch can differentiate; its kinks are
        found by ``quernel.kernels.theory.as_activation``.

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
    if callable(activation):
        known = as_activation(activation)
        return _by_quadrature(known.function, known.kinks)
    name = check_choice("activation", activation, tuple(ACTIVATIONS))
    if name == "relu":
        return (
            lambda cross, left, right: arc_cosine_gram(cross, left, right) / 2,
            lambda cross, left, right: arc_cosine_gram(cross, left, right, order=0) / 2,
        )
    if name == "erf":
        return erf_gram, erf_slope_gram
    if name == "identity":
        return (lambda cross, left, right: cross.clone()), (lambda cross, left, right: torch.ones_like(cross))
    return _by_quadrature(ACTIVATIONS[name])


def pair_map(activation: ActivationName | Function, *, slopes: bool = True) -> PairMap:
    """Return ``(cross, left, right) -> (value, slope)``: the two maps of ``layer_map`` at once, without gradients.

    ReLU needs the angle for both and takes it once, in place. Without ``slopes`` the second is None.

    Examples
    --------
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> [float(k) for k in pair_map("relu")(torch.ones(1, 1).double(), one, one)]
    [0.5, 0.5]
    """
    if isinstance(activation, str) and activation == "relu":
        return _relu_pair if slopes else lambda *gram: (_relu_pair(*gram)[0], None)
    value_map, slope_map = layer_map(activation)
    return lambda *gram: (value_map(*gram), slope_map(*gram) if slopes else None)


def variance_map(activation: ActivationName | Function) -> Callable[[Tensor], Tensor]:
    """Return ``variance -> E[f(z)^2]``, z ~ N(0, variance): the value map between points and themselves.

    Examples
    --------
    >>> variance_map("relu")(torch.tensor([2.0])).tolist()
    [1.0]
    """
    if callable(activation):
        known = as_activation(activation)
        return functools.partial(_square_average, known.function, known.kinks)
    name = check_choice("activation", activation, tuple(ACTIVATIONS))
    if name == "relu":
        return lambda variance: variance / 2
    if name == "erf":
        return lambda variance: (2 / torch.pi) * (2 * variance / (1 + 2 * variance)).arcsin()
    if name == "identity":
        return torch.clone
    return functools.partial(_square_average, ACTIVATIONS[name], ())


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


def _by_quadrature(f: Function, kinks: tuple[float, ...] = ()) -> tuple[LayerMap, LayerMap]:
    return functools.partial(_average, f, kinks), functools.partial(_average, _slope_of(f), kinks)


def _average(f: Function, kinks: tuple[float, ...], cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if cross.shape != (*left.shape, right.shape[-1]) or left.shape[:-1] != right.shape[:-1]:
        raise QuernelError(
            "cross, left and right must have shapes (*batch, n, m), (*batch, n) and (*batch, m); "
            f"got {tuple(cross.shape)}, {tuple(left.shape)}, {tuple(right.shape)}"
        )
    return gaussian_product_average(f, f, left[..., :, None], right[..., None, :], cross, kinks).to(cross.dtype)


def _square_average(f: Function, kinks: tuple[float, ...], variance: Tensor) -> Tensor:
    return gaussian_average(lambda z: f(z).square(), variance, kinks).to(variance.dtype)


def _slope_of(f: Function) -> Function:
    def slope(z: Tensor) -> Tensor:
        with torch.enable_grad():
            given = z if z.requires_grad else z.detach().requires_grad_()
            return torch.autograd.grad(f(given).sum(), given, create_graph=z.requires_grad)[0]

    return slope
