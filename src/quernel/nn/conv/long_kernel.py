"""``LongKernel``: kernels learned tap by tap, shrunk and smoothed in every forward pass (arXiv 2302.06646).

Kbar = dropout(squash(smooth(K))),   squash(k) = sign(k) max(|k| - lambda, 0)
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.nn.conv.structured_global import MultiScaleKernel
from quernel.nn.functional.fft_convolution import smooth, squash

KERNELS, INITS = ("direct", "multiscale"), ("random", "double_exp")
RANDOM_STD, EXPONENTIAL_STD = 0.002, 0.02
# A kernel of which more than this share is squashed to zero from the start learns nothing.
DEAD = 0.99


class LongKernel(nn.Module):
    """Regularised kernels, one weight a lag.

    Parameters
    ----------
    dim, l_max : int
        Channels and taps.
    heads : int, default=1
        Kernels a channel.
    lam : float or "auto"
        What every tap is shrunk by.  "auto" is half the standard deviation that taps start with, after smoothing.
    kernel_dropout : float, default=0.2
        Share of taps set to zero while training, the same for the whole batch.
    init : {"random", "double_exp"}, default="random"
        0.002 N(0, 1), or 0.02 N(0, 1) exp(-(j / l_max) floor(dim / 2)^(h / dim)): channels of different memories.
    smooth_window : int, optional
        Odd; taps are averages over so many neighbours, with zeros beyond the ends.
    kernel_type : {"direct", "multiscale"}, default="direct"
        What is regularised: free taps, or those of ``MultiScaleKernel``, to which ``init`` does not apply.

    Attributes
    ----------
    strength : Tensor
        What lambda is multiplied by, 1 from the start; ``warm_up`` sets it.

    Examples
    --------
    >>> LongKernel(4, l_max=100)(50).shape
    torch.Size([1, 4, 50])
    """

    strength: Tensor

    def __init__(
        self,
        dim: int,
        l_max: int,
        heads: int = 1,
        lam: float | Literal["auto"] = "auto",
        kernel_dropout: float = 0.2,
        init: Literal["random", "double_exp"] = "random",
        smooth_window: int | None = None,
        kernel_type: Literal["direct", "multiscale"] = "direct",
    ) -> None:
        super().__init__()
        self.dim, self.l_max = check_int("dim", dim, low=1), check_int("l_max", l_max, low=1)
        self.heads = check_int("heads", heads, low=1)
        self.kernel_dropout = check_float("kernel_dropout", kernel_dropout, low=0.0, high=1.0, open_high=True)
        self.init, self.kernel_type = (
            check_choice("init", init, INITS),
            check_choice("kernel_type", kernel_type, KERNELS),
        )
        if smooth_window is not None and check_int("smooth_window", smooth_window, low=1) % 2 == 0:
            raise QuernelError(f"smooth_window must be odd, so that it is centred on its tap; got {smooth_window}")
        self.smooth_window = smooth_window
        if kernel_type == "multiscale":
            self.taps: Any = MultiScaleKernel(dim, l_max, heads)
            # Kernels of norm 1, and smooth already.
            std: float = self.taps.length**-0.5
        else:
            scales = _scales(dim, l_max, init)
            self.taps = nn.Parameter((scales * torch.randn(heads, dim, l_max)).to(torch.get_default_dtype()))
            # A mean over w independent taps deviates by 1 / sqrt(w) of one.
            std = _root_mean_square(dim, l_max, init) * (smooth_window or 1) ** -0.5
        self.lam = std / 2 if lam == "auto" else check_float("lam", lam, low=0.0)
        self.register_buffer("strength", torch.ones(()))
        self._warn_if_dead()

    def forward(self, length: int | None = None) -> Tensor:
        """Return the effective kernels for ``length`` tokens, (heads, dim, length) or less if l_max is."""
        k = self._smooth()
        # Cut after smoothing: the end of a shorter sequence is no end of the kernel.
        k = squash(k if length is None else k[..., :length], self.lam * self.strength.to(k.dtype))
        return F.dropout(k, self.kernel_dropout, self.training)

    def warm_up(self, share: float) -> None:
        """Shrink by this share of lambda from now on: rise from 0 to 1 over the first steps of a training."""
        self.strength.fill_(check_float("share", share, low=0.0, high=1.0))

    def extra_repr(self) -> str:
        """Show the sizes and what regularises."""
        return (
            f"{self.dim}, l_max={self.l_max}, heads={self.heads}, lam={self.lam:.3g}, init={self.init!r}, "
            f"kernel_dropout={self.kernel_dropout}, smooth_window={self.smooth_window}"
        )

    def _smooth(self) -> Tensor:
        taps: Tensor = self.taps() if isinstance(self.taps, MultiScaleKernel) else self.taps
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32))[..., : self.l_max]
        return taps if self.smooth_window is None else smooth(taps, self.smooth_window)

    @torch.no_grad()
    def _warn_if_dead(self) -> None:
        k = self._smooth()
        if k.is_meta or self.lam == 0:
            return
        share = float((k.abs() <= self.lam).double().mean())
        if share > DEAD:
            warnings.warn(
                f"lam={self.lam:.3g} sets {share:.1%} of the taps to zero from the start, where they get no gradient: "
                f"they begin with a root mean square of {float(k.square().mean().sqrt()):.3g}. Use lam='auto' or one "
                "below that",
                stacklevel=4,
            )


def _scales(dim: int, l_max: int, init: str) -> Tensor | float:
    """Return the standard deviation of every tap at the start, (dim, l_max) or one number."""
    if init == "random":
        return RANDOM_STD
    speeds = max(dim // 2, 1) ** (torch.arange(dim, dtype=torch.float64) / dim)
    places = torch.arange(l_max, dtype=torch.float64) / l_max
    return EXPONENTIAL_STD * torch.exp(-places * speeds[:, None])


def _root_mean_square(dim: int, l_max: int, init: str) -> float:
    """Return the standard deviation of all taps together; on the CPU, as a number is wanted on any device."""
    with torch.device("cpu"):
        scales = _scales(dim, l_max, init)
    return scales if isinstance(scales, float) else float(scales.square().mean().sqrt())
