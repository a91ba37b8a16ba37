"""Depthwise convolutions as long as the sequence, by FFT: y[t] = sum_j k[j] u[t - j], in O(L log L).

The transform is so long that no product wraps around, L + taps - 1 at least, and of a size that costs little.  A few
channels at a time go there and back within the cache; the backward pass transforms again instead of keeping spectra.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_int, check_type
from quernel.nn._fft_conv_op import convolve, fft_conv_run, fft_size, kernel_spectra, least_size


@dataclass(frozen=True)
class KernelSpectrum:
    """What ``fft_conv`` needs of kernels that stay the same, from ``kernel_spectrum``.

    Attributes
    ----------
    values : Tensor
        Spectra, what is added at lag 0 included: complex (c, H, n // 2 + 1).
    channels, length : int
        H, and the steps of the inputs it is for.
    n : int
        Size of the transform.
    heads : bool
        Whether kernels had an axis of heads.
    """

    values: Tensor
    channels: int
    length: int
    n: int
    heads: bool


def fft_conv(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    *,
    skip: Tensor | None = None,
    bidirectional: bool = False,
    n: int | Literal["auto"] = "auto",
    block: int | Literal["auto"] = "auto",
) -> Tensor:
    """Convolve every channel with a kernel of its own along the sequence.

    y[b, h, t] = sum_j k[h, j] u[b, h, t - j] + skip[h] u[b, h, t], j = 0 .. min(t, taps - 1); ``bidirectional`` adds
    sum_j k1[h, j] u[b, h, t + j + 1], where k1[:, 0] is the tap of lag -1.  Taps beyond the sequence do nothing.

    Parameters
    ----------
    u : Tensor, shape (B, H, L)
        Any memory order; float16 and bfloat16 are computed in float32.
    k : Tensor, shape (H, taps) or (c, H, taps), or KernelSpectrum
        Kernels; c of them a channel give c outputs a channel.  ``bidirectional``: (2, H, taps) or (2, c, H, taps).
    skip : Tensor, shape (H,) or (c, H), optional
        Factors of the input itself.
    bidirectional : bool, default=False
        Whether outputs depend on later steps too.
    n : int or "auto"
        Size of the transform.  "auto" takes one that costs little, and plain products up to 64 taps.
    block : int or "auto"
        Rows (a channel of a sample each) that are transformed together.

    Returns
    -------
    y : Tensor, shape (B, H, L) or (B, c, H, L)
        In the memory order of u.

    Raises
    ------
    QuernelError
        If shapes do not fit, numbers are complex or integers, or n is so small that products wrap around.

    Notes
    -----
    Round-off is that of a transform: about 1e-7 of sum |k| max |u| in float32, in earlier outputs too.  Differentiable
    twice; keeps u and k alone for the backward pass.

    Examples
    --------
    >>> import torch
    >>> u, k = torch.tensor([[[1.0, 0.0, 2.0]]]), torch.tensor([[1.0, 0.5]])
    >>> fft_conv(u, k).round(decimals=4)
    tensor([[[1.0000, 0.5000, 2.0000]]])
    """
    _check_input(u)
    rows = 0 if block == "auto" else check_int("block", block, low=1)
    if isinstance(k, KernelSpectrum):
        return _by_spectrum(u, k, skip, rows)
    kernels = _kernels(k, bidirectional)
    factors = _factors(skip, kernels)
    size = 0 if n == "auto" else check_int("n", n, low=1)
    wide = _wide(u, kernels)
    operands = u.to(wide), kernels.to(wide).contiguous(), None if factors is None else factors.to(wide)
    y = fft_conv_run(*operands, size, rows)
    y = y.to(u.dtype)
    return y if k.ndim - bidirectional == 3 else y[:, 0]


def kernel_spectrum(
    k: Tensor,
    length: int,
    *,
    skip: Tensor | None = None,
    bidirectional: bool = False,
    n: int | Literal["auto"] = "auto",
) -> KernelSpectrum:
    """Transform kernels once for many inputs of one length.

    Parameters
    ----------
    k, skip, bidirectional, n
        As in ``fft_conv``; no gradient reaches them.
    length : int
        Steps of the inputs.

    Returns
    -------
    spectrum : KernelSpectrum
    """
    kernels = _kernels(k, bidirectional).detach()
    least = least_size(check_int("length", length, low=1), kernels.shape[3], kernels.shape[0])
    kernels = kernels.to(_wide(kernels))
    factors = _factors(None if skip is None else skip.detach().to(kernels.dtype), kernels)
    channels, heads = kernels.shape[2], k.ndim - bidirectional == 3
    size = fft_size(least) if n == "auto" else check_int("n", n, low=least)
    return KernelSpectrum(kernel_spectra(kernels, factors, length, size), channels, length, size, heads)


def squash(k: Tensor, lam: float | Tensor) -> Tensor:
    """Shrink every tap towards zero by ``lam``: sign(k) max(|k| - lam, 0).

    Parameters
    ----------
    k : Tensor
    lam : float or Tensor
        At least 0, of the size of the taps: one far above them leaves nothing.

    Returns
    -------
    shrunk : Tensor
        Its gradient is zero where a tap is.

    Examples
    --------
    >>> import torch
    >>> squash(torch.tensor([0.5, -0.25, 0.1]), 0.25)
    tensor([0.2500, 0.0000, 0.0000])
    """
    if not isinstance(lam, Tensor) and lam < 0:
        raise QuernelError(f"lam must be at least 0; got {lam}")
    bound = torch.as_tensor(lam, dtype=k.dtype, device=k.device)
    return k - k.clamp(-bound, bound)


def smooth(k: Tensor, window: int) -> Tensor:
    """Average every tap with its neighbours in an odd window; beyond the ends there are zeros.

    Parameters
    ----------
    k : Tensor, shape (..., taps)
    window : int
        Odd; the divisor at the ends too, so that these are attenuated.

    Examples
    --------
    >>> import torch
    >>> smooth(torch.tensor([3.0, 3.0, 3.0, 0.0]), 3)
    tensor([2., 3., 2., 1.])
    """
    if check_int("window", window, low=1) % 2 == 0:
        raise QuernelError(f"window must be odd, so that it is centred on its tap; got {window}")
    rows = k.reshape(1, -1, k.shape[-1])
    return torch.nn.functional.avg_pool1d(rows, window, 1, window // 2).view(k.shape)


def _by_spectrum(u: Tensor, k: KernelSpectrum, skip: Tensor | None, rows: int) -> Tensor:
    if u.shape[1:] != (k.channels, k.length) or skip is not None:
        raise QuernelError(
            f"u must have shape (B, {k.channels}, {k.length}), that of the spectrum, which holds skip already; got "
            f"{tuple(u.shape)}{'' if skip is None else ' and skip'}. Make another with kernel_spectrum"
        )
    if torch.is_grad_enabled() and u.requires_grad:
        raise QuernelError("a KernelSpectrum is for inference: give the kernel itself where gradients are wanted")
    y = convolve(u.to(k.values.real.dtype), lambda inner: k.values[:, inner], len(k.values), k.n, rows)
    return y.to(u.dtype) if k.heads else y[:, 0].to(u.dtype)


def _check_input(u: Tensor) -> None:
    check_type("u", u, Tensor)
    if not u.is_floating_point():
        raise QuernelError(f"u must hold real floating-point numbers; got {u.dtype}. Convert it, or take u.real")
    if u.ndim != 3 or u.shape[1] == 0 or u.shape[2] == 0:
        raise QuernelError(
            f"u must have shape (B, H, L), steps last, with at least one channel and step; got {tuple(u.shape)}"
        )


def _kernels(k: Tensor, bidirectional: bool) -> Tensor:
    """Return kernels as (sides, c, H, taps)."""
    check_type("k", k, Tensor)
    if not k.is_floating_point():
        raise QuernelError(f"k must hold real floating-point numbers; got {k.dtype}. Convert it, or take k.real")
    sides = 2 if bidirectional else 1
    if k.ndim - bidirectional not in (2, 3) or (bidirectional and len(k) != 2) or k.shape[-1] == 0:
        wanted = (
            "(2, H, taps) or (2, c, H, taps), forward and backward" if bidirectional else "(H, taps) or (c, H, taps)"
        )
        raise QuernelError(f"k must have shape {wanted}, with at least one tap; got {tuple(k.shape)}")
    return k.reshape(sides, -1, *k.shape[-2:])


def _factors(skip: Tensor | None, kernels: Tensor) -> Tensor | None:
    """Return the factors of the input as (c, H)."""
    if skip is None:
        return None
    if skip.numel() != kernels.shape[1] * kernels.shape[2]:
        raise QuernelError(
            f"skip must have one number for each of {kernels.shape[1]} x {kernels.shape[2]} kernels; got "
            f"{tuple(skip.shape)}"
        )
    return skip.reshape(kernels.shape[1:3])


def _wide(*tensors: Tensor) -> torch.dtype:
    kinds = {t.dtype for t in tensors}
    return torch.float64 if torch.float64 in kinds else torch.float32
