"""Kernel functions of Gram matrices: what a wide random layer makes of inner products, without any features.

Given inner products g = x.y and squared lengths a = |x|^2, b = |y|^2, with p = sqrt(a b) and angle t = arccos(g / p):

    arc-cosine, order 0   (pi - t) / pi                              2 E[step(u) step(v)]
    arc-cosine, order 1   (p sin t + (pi - t) g) / pi                2 E[relu(u) relu(v)]
    erf                   (2/pi) arcsin(2 g / sqrt((1+2a)(1+2b)))      E[erf(u) erf(v)]
    erf, slope            (4/pi) / sqrt((1+2a)(1+2b) - 4 g^2)          E[erf'(u) erf'(v)]
    squared exponential   exp(-(a + b - 2 g) / 2)

over (u, v) ~ N(0, [[a, g], [g, b]]). The kernel of order 1 has the gradient ((pi - t)/pi, sin t/pi) in (g, p), finite
everywhere; written with arccos it would be infinity times zero where two points coincide: it is a function of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError

# Units in the last place by which the product of a vector with itself, in another order of sums, may miss its length.
_SAME = 32


def arc_cosine_gram(cross: Tensor, left: Tensor, right: Tensor, order: int = 1) -> Tensor:
    """Return the normalised arc-cosine kernel of order 0 or 1; order 1 keeps the diagonal of its input.

    Parameters
    ----------
    cross : Tensor, shape (*batch, n, m)
        Inner products between n and m points; float64 where gradients near coincident points matter.
    left, right : Tensor, shapes (*batch, n) and (*batch, m)
        Squared lengths, >= 0.
    order : {0, 1}, default=1
        0 is the step, 1 the ReLU.

    Returns
    -------
    kernel : Tensor, shape (*batch, n, m)
        0 where a point has no length. Where two points coincide, the gradient of order 0, infinite in truth, is 0.

    Raises
    ------
    QuernelError
        If shapes do not fit, or ``order`` is another.

    References
    ----------
    Cho and Saul, "Kernel Methods for Deep Learning", NIPS 2009.

    Examples
    --------
    >>> one = torch.ones(2, dtype=torch.float64)
    >>> arc_cosine_gram(torch.eye(2).double(), one, one).round(decimals=4).tolist()
    [[1.0, 0.3183], [0.3183, 1.0]]
    """
    _check(cross, left, right)
    if order == 0:
        return _open_share(cross, _lengths(left, right))
    if order == 1:
        result: Tensor = _ArcCosine.apply(cross, left, right)[0]  # type: ignore[no-untyped-call]
        return result
    raise QuernelError(f"order must be 0 or 1; got {order!r}")


def erf_gram(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return E[erf(u) erf(v)]; shapes as in ``arc_cosine_gram``.

    References
    ----------
    Williams, "Computing with Infinite Networks", NIPS 1996.

    Examples
    --------
    >>> round(float(erf_gram(torch.ones(1, 1), torch.ones(1), torch.ones(1))), 4)
    0.4646
    """
    _check(cross, left, right)
    scale = _erf_scale(left, right)
    return (2 / torch.pi) * (2 * cross / scale).clamp(-1, 1).arcsin()


def erf_slope_gram(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return E[erf'(u) erf'(v)]; shapes as in ``arc_cosine_gram``.

    Examples
    --------
    >>> round(float(erf_slope_gram(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1))), 4)
    1.2732
    """
    _check(cross, left, right)
    scale = _erf_scale(left, right)
    # (1 + 2a)(1 + 2b) - 4 g^2 >= 1 for every positive semi-definite (a, b, g); rounding alone goes below.
    return (4 / torch.pi) * (scale.square() - 4 * cross.square()).clamp_min(1.0).rsqrt()


def squared_exponential_gram(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return exp(-|x - y|^2 / 2) from inner products; shapes as in ``arc_cosine_gram``.

    Examples
    --------
    >>> squared_exponential_gram(torch.ones(1, 1), torch.ones(1), torch.ones(1)).tolist()
    [[1.0]]
    """
    _check(cross, left, right)
    return (cross - 0.5 * left[..., :, None] - 0.5 * right[..., None, :]).clamp(max=0.0).exp()


class _ArcCosine(torch.autograd.Function):
    """(p sin t + (pi - t) g) / pi with its own, finite gradient.

    Passes over the (n, m) numbers are what it costs, so the first gradient is made of what the forward pass held.
    """

    @staticmethod
    def forward(cross: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the kernel, and for the gradients: (pi - t) / pi, sin t / pi and p."""
        lengths = (left[..., :, None] * right[..., None, :]).sqrt_()
        everywhere = bool((left > 0).all()) and bool((right > 0).all())
        cosine, sine = _plain_angles(cross, lengths) if everywhere else cosine_and_sine(cross, lengths)
        share = torch.atan2(sine, cosine).mul_(-1 / torch.pi).add_(1)
        if not everywhere:
            share = share.masked_fill_(lengths == 0, 0.0)
        sine = sine.mul_(1 / torch.pi)
        return torch.addcmul(share * cosine.mul_(lengths), sine, lengths), share, sine, lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep inputs and what the gradients are made of."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of inner products and squared lengths."""
        cross, left, right, share, sine, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():  # they are to have gradients in turn
            lengths = _lengths(left, right)
            share, sine = _open_share(cross, lengths), cosine_and_sine(cross, lengths)[1] / torch.pi
        # p = sqrt(a b) has the slope p / 2a in a.
        along = grads[0] * sine * lengths
        return grads[0] * share, _halved(along.sum(-1), left), _halved(along.sum(-2), right)


def _halved(total: Tensor, squares: Tensor) -> Tensor:
    some = squares > 0
    return torch.where(some, 0.5 * total / torch.where(some, squares, 1.0), 0.0)


def _plain_angles(cross: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine where no length is 0, without gradients."""
    cosine = (cross / lengths).clamp_(-1, 1)
    return cosine, (1 - cosine).mul_(1 + cosine).sqrt_()


def cosine_and_sine(cross: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of angles from inner products and products of lengths; 0 and 1 where there is no length.

    Gradients are finite everywhere, and 0 where an angle is 0 or pi.
    """
    some = lengths > 0
    cosine = coincident(torch.where(some, cross / torch.where(some, lengths, torch.ones_like(lengths)), 0.0))
    square = (1 - cosine) * (1 + cosine)
    # Two where: the root's infinite slope at 0 must not be reached, not even to be multiplied by 0.
    apart = square > 0
    root = torch.where(apart, square, torch.ones_like(square)).sqrt()
    return cosine, torch.where(apart, root, torch.zeros_like(square))


def coincident(cosine: Tensor) -> Tensor:
    """Return cosines, those that rounding cannot tell from 1 or -1 put there, so that a point is at no angle to itself.

    A rounding error e in the cosine is an angle of sqrt(2 e): without this the kernel of order 0 between a point and
    itself would be 5e-9 short of 1 in float64, and predictions at training points as much off.
    """
    edge = 1 - _SAME * torch.finfo(cosine.dtype).eps
    return torch.where(cosine.abs() > edge, cosine.sign(), cosine)


def _open_share(cross: Tensor, lengths: Tensor) -> Tensor:
    cosine, sine = cosine_and_sine(cross, lengths)
    share = 1 - torch.atan2(sine, cosine) / torch.pi
    return torch.where(lengths > 0, share, torch.zeros_like(share))


def _lengths(left: Tensor, right: Tensor) -> Tensor:
    product = left[..., :, None] * right[..., None, :]
    some = product > 0
    return torch.where(some, torch.where(some, product, torch.ones_like(product)).sqrt(), torch.zeros_like(product))


def _erf_scale(left: Tensor, right: Tensor) -> Tensor:
    return ((1 + 2 * left)[..., :, None] * (1 + 2 * right)[..., None, :]).sqrt()


def _check(cross: Tensor, left: Tensor, right: Tensor) -> None:
    wanted = (*left.shape, right.shape[-1]) if left.ndim and right.ndim else None
    if tuple(cross.shape) != wanted or left.shape[:-1] != right.shape[:-1] or not cross.is_floating_point():
        raise QuernelError(
            "cross, left and right must be floating point with shapes (*batch, n, m), (*batch, n) and (*batch, m); "
            f"got {tuple(cross.shape)}, {tuple(left.shape)}, {tuple(right.shape)}"
        )
