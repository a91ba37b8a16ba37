"""Quantised activations as pure functions: steps, codes, and the fraction that rounds to zero (arXiv 2410.07505).

x: (T, I) tokens by channels, q = 2^(bits-1) - 1, t_i = max_j |x_ij|, c_j = max_i |x_ij|.
Per token: step = t_i / q. Per channel: c_j / q. CrossQuant: t_i^alpha * c_j^(1-alpha) / q, which never clips
because |x_ij| <= t_i and |x_ij| <= c_j, and which is below the per-token step exactly where c_j < t_i.
Everything here computes in floating point: it is the reference, not the fast path.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_int, check_probability

Scheme = Literal["token", "channel", "cross"]


def activation_step(x: Tensor, *, bits: int = 8, scheme: Scheme = "cross", alpha: float = 0.15) -> Tensor:
    """Return the quantisation step of every element.

    Parameters
    ----------
    x : Tensor, shape (..., I)
        Activations; leading axes are tokens.
    bits : int, default=8
        2 to 8.
    scheme : {"token", "channel", "cross"}, default="cross"
        Which maxima set the step.
    alpha : float, default=0.15
        Exponent of the token maximum for "cross"; 1 is "token", 0 is "channel".

    Returns
    -------
    step : Tensor, shape (..., I)
        Zero where the whole token or the whole channel is zero.
    """
    levels = 2 ** (check_int("bits", bits, low=2, high=8) - 1) - 1
    check_choice("scheme", scheme, ("token", "channel", "cross"))
    alpha = {"token": 1.0, "channel": 0.0}.get(scheme, check_probability("alpha", alpha))
    check_finite("x", x)
    if x.ndim < 1:
        raise QuernelError("x must have a channel axis; got a scalar")
    rows = x.abs().reshape(-1, x.shape[-1])
    if not rows.numel():
        return torch.zeros_like(x)
    token = rows.amax(dim=1, keepdim=True)  # (T, 1)
    channel = rows.amax(dim=0, keepdim=True)  # (1, I)
    # The ends are exact powers, so that alpha = 1 and 0 are per-token and per-channel bit for bit.
    step = token if alpha == 1 else channel.expand_as(rows) if alpha == 0 else token**alpha * channel ** (1 - alpha)
    step = torch.where((token > 0) & (channel > 0), step, 0.0)
    return (step / levels).expand_as(rows).reshape(x.shape)


def quantize_activations(x: Tensor, step: Tensor, *, bits: int = 8) -> Tensor:
    """Return integer codes ``clamp(round(x / step), -q, q)`` as floats, 0 where the step is 0."""
    levels = 2 ** (bits - 1) - 1
    safe = torch.where(step > 0, step, 1.0)
    return torch.where(step > 0, (x / safe).round().clamp(-levels, levels), 0.0)


def fake_quantize(x: Tensor, *, bits: int = 8, scheme: Scheme = "cross", alpha: float = 0.15) -> Tensor:
    """Quantise and dequantise in floating point; shape and dtype of ``x``.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 100.0], [2.0, -50.0]])
    >>> fake_quantize(x, scheme="token")[0].round(decimals=2)
    tensor([  0.7900, 100.0000])
    >>> fake_quantize(x, scheme="cross")[0, 0].round(decimals=2)
    tensor(0.9900)
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    step = activation_step(wide, bits=bits, scheme=scheme, alpha=alpha)
    return (quantize_activations(wide, step, bits=bits) * step).to(x.dtype)


def quantization_kernel(
    x: Tensor, bits: int = 8, scheme: Scheme = "cross", alpha: float = 0.15, ignore_zeros: bool = False
) -> float:
    """Return the fraction of activations that round to exactly zero: the "quantisation kernel".

    It predicts what an activation quantiser costs, and takes one pass over a layer's input.

    Parameters
    ----------
    x : Tensor, shape (..., I)
        Activations of one layer.
    bits, scheme, alpha
        As in ``activation_step``.
    ignore_zeros : bool, default=False
        Leave out elements that are exactly zero already (ReLU inputs hold many, and no method can remove them).

    Returns
    -------
    fraction : float
        In [0, 1].

    References
    ----------
    "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel", arXiv 2410.07505, 2024.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.1, 0.2, 100.0]])
    >>> quantization_kernel(x, scheme="token") > quantization_kernel(x, scheme="cross")
    True
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        raise QuernelError(f"x must be a non-empty floating tensor; got {x!r:.80}")
    wide = x.double() if x.dtype == torch.float64 else x.float()
    codes = quantize_activations(wide, activation_step(wide, bits=bits, scheme=scheme, alpha=alpha), bits=bits)
    zero, total = codes == 0, x.numel()
    if ignore_zeros:
        counted = x != 0
        zero, total = zero & counted, int(counted.sum())
    return float(zero.sum()) / total if total else 0.0
