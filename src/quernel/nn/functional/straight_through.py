"""Functions with a step in the forward pass and a useful gradient: round, sign, heaviside, powers of two.

The forward value is exact (not ``x + (y - x).detach()``, which rounds twice), the gradient is that of a smooth
stand-in: the identity for rounding, ``clamp`` for the two binary codes.  Nothing is edited in place, so leaves keep
their values; second derivatives are zero or those of the stand-in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_int

# 2^p is a normal float32 for these exponents.
LOWEST, HIGHEST = -126, 127
# Mantissas of [1/2, 1) are rounded up to 1 from here on: sqrt(1/2) halves the interval in the logarithm, 3/4 in value.
TURNING = {"log": math.sqrt(0.5), "nearest": 0.75}


def round_through(x: Tensor) -> Tensor:
    """Return ``round(x)``, half to even, with the gradient of the identity."""
    return pass_through(x, x.round())


def floor_through(x: Tensor) -> Tensor:
    """Return ``floor(x)`` with the gradient of the identity."""
    return pass_through(x, x.floor())


def pass_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, computed from ``x`` by any means, and hand its gradient to ``x`` unchanged.

    Parameters
    ----------
    x, value : Tensor
        Of one shape; ``value`` counts as a constant.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([0.3, 1.7], requires_grad=True)
    >>> pass_through(x, x.round()).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    if x.shape != value.shape:
        raise QuernelError(f"x and value must have one shape; got {tuple(x.shape)} and {tuple(value.shape)}")
    out: Tensor = _PassThrough.apply(x, value.detach())  # type: ignore[no-untyped-call]
    return out


def sign_through(x: Tensor) -> Tensor:
    """Return the sign, -1, 0 or 1, with the gradient of ``clamp(x, -1, 1)``."""
    out: Tensor = _Clamped.apply(x, x.detach().sign(), -1.0, 1.0)  # type: ignore[no-untyped-call]
    return out


def heaviside_through(x: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    """Return 1 where ``x > threshold``, else 0, with the gradient of ``clamp(x, 0, 1)``.

    Parameters
    ----------
    x : Tensor
    threshold : Tensor or float, default=0.0
        Broadcast against ``x``; a constant, and without influence on the gradient.

    Returns
    -------
    codes : Tensor
        0 or 1 in the dtype of ``x``.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([-0.5, 0.2, 0.9], requires_grad=True)
    >>> codes = heaviside_through(x, 0.5)
    >>> codes.sum().backward()
    >>> codes.tolist(), x.grad.tolist()
    ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    """
    held = x.detach()
    codes = (held > (threshold.detach() if isinstance(threshold, Tensor) else threshold)).to(x.dtype)
    out: Tensor = _Clamped.apply(x, codes, 0.0, 1.0)  # type: ignore[no-untyped-call]
    return out


def power_of_two(x: Tensor, low: int = LOWEST, high: int = HIGHEST, *, rounding: str = "log") -> Tensor:
    """Return ``sign(x) 2^p`` with ``p`` the rounded ``log2|x|``, kept in [low, high]; the gradient of the identity.

    Parameters
    ----------
    x : Tensor
        Floating point; zeros stay zero.
    low, high : int
        Range of the exponents, within [-126, 127].
    rounding : {"log", "nearest"}, default="log"
        Where the exponent turns: at sqrt(2) 2^p, halfway in the logarithm, or at 1.5 2^p, halfway in value.  Below
        the range the first gives 2^low, the second whichever of 2^low and 0 is nearer.

    Returns
    -------
    powers : Tensor
        Exact powers of two in the dtype of ``x``; NaN stays NaN.

    Notes
    -----
    With ``"log"``, ``powers / x`` lies in [2^-0.5, 2^0.5] inside the range.  Applied twice it changes nothing.

    Examples
    --------
    >>> import torch
    >>> power_of_two(torch.tensor([0.0, 0.3, -1.42, 1.41]), -4, 0).tolist()
    [0.0, 0.25, -1.0, 1.0]
    """
    exponents, signs = power_codes(x.detach(), low, high, rounding=rounding)
    powers = decode_powers(exponents, signs).to(x.dtype)
    return pass_through(x, torch.where(x.isnan(), x.detach(), powers))


def power_codes(x: Tensor, low: int, high: int, *, rounding: str = "log") -> tuple[Tensor, Tensor]:
    """Return the exponents (int32, ``low`` for zeros) and signs (int32 in -1, 0, 1) of ``power_of_two``."""
    check_int("low", low, low=LOWEST, high=HIGHEST)
    check_int("high", high, low=low, high=HIGHEST)
    check_choice("rounding", rounding, tuple(TURNING))
    wide = x if x.dtype == torch.float64 else x.float()
    # |x| = mantissa 2^exponent: the rounded logarithm without log2(0) and without its rounding error.
    mantissa, exponent = torch.frexp(wide.abs())
    exponent = exponent - (mantissa < TURNING[rounding]).to(torch.int32)
    signs = wide.sign().to(torch.int32)
    if rounding == "nearest":
        signs = torch.where(wide.abs() < 2.0 ** (low - 1), 0, signs)
    return torch.where(signs == 0, low, exponent.clamp(low, high)), signs


def decode_powers(exponents: Tensor, signs: Tensor) -> Tensor:
    """Return ``signs * 2^exponents`` in float32, made from its bits and so exact; int32 tensors of one shape."""
    return signs * ((exponents + 127) << 23).view(torch.float32)


class _PassThrough(torch.autograd.Function):
    """The second argument's value, the first one's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _Clamped(torch.autograd.Function):
    """Given codes forward, the gradient of ``clamp(x, low, high)`` backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, low: float, high: float) -> Tensor:
        return codes.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, low, high = inputs
        ctx.save_for_backward((x >= low) & (x <= high))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None
