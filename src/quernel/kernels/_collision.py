"""Closed forms of hash collisions in torch, with their derivatives: what a student of LSH kernels is trained through.

With t = w / c and e = 1 - exp(-t^2 / 2):

         l2  k = erf(t / sqrt 2) - sqrt(2 / pi) e / t,      dk/dc = -sqrt(2 / pi) e / w
         l1  k = (2 / pi) atan t - ln(1 + t^2) / (pi t),    dk/dc = -ln(1 + t^2) / (pi w)
    angular  k = 1 - acos(u) / pi,                          dk/du = 1 / (pi sqrt(1 - u^2))

Distances below ``CLOSEST`` count as that and have gradient 0: the l2 kernel has the tip of a cone there, the slope of
the l1 kernel and of the angular one grows without bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VECTOR_KERNELS = ("l2", "l1", "angular")
CLOSEST = 1e-4
# The cosine of a small angle keeps half the digits of the number format.
_ALIGNED = {torch.float32: 1 - 1e-6, torch.float64: 1 - 1e-8}
_ROOT = math.sqrt(2 / math.pi)


class _Power(torch.autograd.Function):
    """form(v)^K, where ``form`` gives value and derivative together: one erf or log serves both directions."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        argument, form, n_concat = arguments
        k, slope = form(argument)
        if n_concat > 1:
            before = k if n_concat == 2 else k ** (n_concat - 1)
            k, slope = before * k, n_concat * before * slope
        ctx.save_for_backward(slope)
        value: Tensor = k
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


def collision(kernel: str, x: Tensor, anchors: Tensor, width: float, n_concat: int, *, exact: bool = False) -> Tensor:
    """Return the probability that K hashes agree, for all pairs; differentiable in both.

    Parameters
    ----------
    kernel : {"l2", "l1", "angular"}
    x, anchors : Tensor, shapes (n, p) and (m, p)
    width : float
        Width w of a cell; without effect for "angular".
    n_concat : int
        Hashes K of a code.
    exact : bool, default=False
        Take Euclidean distances from differences and not from a matrix product, which is faster and may be wrong in
        the last digits of small distances.

    Returns
    -------
    k : Tensor, shape (n, m)
    """
    if kernel == "angular":
        aligned = _ALIGNED.get(x.dtype, 1 - 1e-6)
        cosine = F.normalize(x, dim=-1) @ F.normalize(anchors, dim=-1).mT
        return _with_power(_angular, cosine.clamp(-aligned, aligned), n_concat)
    if kernel == "l1":
        distance = torch.cdist(x, anchors, p=1.0)
        return _with_power(lambda c: _l1(c, width), distance.clamp_min(CLOSEST), n_concat)
    if exact:
        distance = torch.cdist(x, anchors, compute_mode="donot_use_mm_for_euclid_dist").clamp_min(CLOSEST)
    else:
        squared = torch.addmm(x.square().sum(-1, keepdim=True) + anchors.square().sum(-1), x, anchors.mT, alpha=-2)
        distance = squared.clamp_min(CLOSEST**2).sqrt()
    return _with_power(lambda c: _l2(c, width), distance, n_concat)


def _l2(c: Tensor, width: float) -> tuple[Tensor, Tensor]:
    t = width / c
    rest = -torch.expm1(-0.5 * t * t)
    return torch.erf(t * 0.5**0.5) - _ROOT / t * rest, rest * (-_ROOT / width)


def _l1(c: Tensor, width: float) -> tuple[Tensor, Tensor]:
    t = width / c
    log = torch.log1p(t * t)
    return torch.atan(t) * (2 / math.pi) - log / (math.pi * t), log * (-1 / (math.pi * width))


def _angular(u: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - torch.acos(u) / math.pi, 1 / (math.pi * (1 - u * u).sqrt())


def _with_power(form: Callable[[Tensor], tuple[Tensor, Tensor]], argument: Tensor, n_concat: int) -> Tensor:
    value: Tensor = _Power.apply(argument, form, n_concat)  # type: ignore[no-untyped-call]
    return value
