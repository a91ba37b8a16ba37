"""``LongConv``: a depthwise convolution as long as the sequence, its kernel learned tap by tap (arXiv 2302.06646).

    y = GLU(W GELU(Kbar * x + D x)),   Kbar = dropout(squash(smooth(K)))

What makes plain kernels train as well as state-space models is that they are shrunk: squash takes lambda off every tap.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_choice
from quernel.nn._fft_conv_op import circle_of
from quernel.nn.conv._global import KERNEL_RATE, GlobalConv
from quernel.nn.conv.butterfly import LearnedButterfly
from quernel.nn.conv.long_kernel import LongKernel
from quernel.nn.functional.butterfly import monarch_conv

BUTTERFLIES, NORMS = (None, "monarch", "learned"), ("layer", "batch")


def _example() -> dict[str, Any]:
    make = seeded(lambda: LongConv(6, 40, heads=2, kernel_dropout=0.0))
    return {"make": make, "input": lambda generator: (torch.randn(3, 11, 6, generator=generator),)}


@register("long-conv", pillar="nn", contract="mixer", paper="2302.06646", status="experimental", example=_example)
class LongConv(GlobalConv):
    """A convolution with one weight a lag and channel, regularised.

    Parameters
    ----------
    dim : int
        Channels.
    l_max : int
        Taps, and tokens of the longest input.  Shorter inputs meet the first taps alone.  A stream (``step``) may be
        longer than ``forward`` takes: kernels then reach l_max tokens back.
    heads : int, default=1
        Kernels a channel.
    lam, kernel_dropout, init, smooth_window, kernel_type
        As in ``LongKernel``.
    bidirectional : bool, default=False
        Second kernels for later tokens; then the mixer is not causal.
    butterfly : {"monarch", "learned"}, optional
        Transforms by products with small matrices, for devices where these are fast; or trained ones, which start as
        the Fourier transform and make outputs depend on later tokens.
    dropout : float, default=0.0
        Share of channels left out while training, the same for all tokens.

    Notes
    -----
    O(L log L) a channel.  Kernels train at 1e-3 at most and without weight decay, which with squash would end them:
    ``param_groups``.  In eval mode spectra of the kernels are kept until a parameter changes; after a write through
    ``parameter.data``, which torch does not count as a change, call ``eval()`` again.

    Departs from public code: no tap wraps around, whatever the lengths, so that causal means causal;
    and lambda is relative to what taps start with.

    References
    ----------
    Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv 2302.06646, 2023.

    Examples
    --------
    >>> import torch
    >>> LongConv(16, l_max=1024)(torch.randn(2, 1000, 16)).shape
    torch.Size([2, 1000, 16])
    """

    options: ClassVar[tuple[str, ...]] = (
        *("l_max", "heads", "lam", "kernel_dropout", "init", "smooth_window", "bidirectional", "butterfly"),
        *("kernel_type", "dropout"),
    )

    def __init__(
        self,
        dim: int,
        l_max: int,
        heads: int = 1,
        lam: float | Literal["auto"] = "auto",
        kernel_dropout: float = 0.2,
        init: Literal["random", "double_exp"] = "random",
        smooth_window: int | None = None,
        bidirectional: bool = False,
        butterfly: Literal["monarch", "learned"] | None = None,
        kernel_type: Literal["direct", "multiscale"] = "direct",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, l_max, heads, bidirectional, "gelu", dropout, glu=True)
        self.max_len = self.l_max
        self.lam, self.kernel_dropout, self.init = lam, kernel_dropout, init
        self.smooth_window, self.kernel_type = smooth_window, kernel_type
        self.butterfly = check_choice("butterfly", butterfly, BUTTERFLIES)
        self.causal = not bidirectional and butterfly != "learned"
        self.filters = LongKernel(dim, l_max, self.sides * heads, lam, kernel_dropout, init, smooth_window, kernel_type)
        self.transform = LearnedButterfly(circle_size(l_max)) if butterfly == "learned" else None

    def kernel(self, length: int | None = None) -> Tensor:
        """Return the effective kernels, (heads, C, taps), or (2, heads, C, taps) if bidirectional."""
        k: Tensor = self.filters(length)
        return k.unflatten(0, (2, self.heads)) if self.bidirectional else k

    def kernel_parameters(self) -> list[nn.Parameter]:
        """Return the kernels."""
        return list(self.filters.parameters())

    def warm_up(self, share: float) -> None:
        """Shrink by this share of lambda from now on, see ``LongKernel.warm_up``."""
        self.filters.warm_up(share)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return kernels and learned transforms without weight decay at no more than 1e-3, and the rest."""
        kernels, rest = super().param_groups(lr)
        if self.transform is None:
            return [kernels, rest]
        learned = list(self.transform.parameters())
        taken = {id(p) for p in learned}
        kept = [p for p in rest["params"] if id(p) not in taken]
        return [
            kernels,
            {"params": learned, "lr": min(lr, KERNEL_RATE), "weight_decay": 0.0},
            {"params": kept, "lr": lr},
        ]

    def _convolved(self, u: Tensor) -> Tensor:
        if self.butterfly is None:
            return super()._convolved(u)
        k = self.kernel(u.shape[2])
        if self.transform is None:
            y = monarch_conv(u, k, bidirectional=self.bidirectional)
        else:
            sides = k if self.bidirectional else k[None]
            y = self.transform(u, circle_of(sides, u.shape[2], self.transform.n))
        return y.to(u.dtype) + self.skip[..., None] * u[:, None]


def circle_size(l_max: int) -> int:
    """Return the power of two of at least 2 l_max, on which nothing wraps around."""
    return 1 << l_max.bit_length() + (l_max & (l_max - 1) > 0)


def _block_example() -> dict[str, Any]:
    make = seeded(lambda: LongConvBlock(6, 40, kernel_dropout=0.0))
    return {"make": make, "input": lambda generator: (torch.randn(3, 11, 6, generator=generator),)}


@register(
    "long-conv",
    pillar="nn",
    contract="mixer",
    paper="2302.06646",
    status="experimental",
    headline=False,
    example=_block_example,
)
class LongConvBlock(LongConv):
    """``LongConv`` with a norm and a residual connection: x + f(norm(x)), or norm(x + f(x)).

    Parameters
    ----------
    dim, l_max : int
        As in ``LongConv``.
    norm : {"layer", "batch"}, default="layer"
        "batch": statistics of every channel over samples and tokens.
    prenorm : bool, default=True
    **options
        Of ``LongConv``.

    Examples
    --------
    >>> import torch
    >>> LongConvBlock(16, l_max=1024)(torch.randn(2, 1000, 16)).shape
    torch.Size([2, 1000, 16])
    """

    options = (*LongConv.options, "norm", "prenorm")

    def __init__(
        self, dim: int, l_max: int, norm: Literal["layer", "batch"] = "layer", prenorm: bool = True, **options: Any
    ) -> None:
        super().__init__(dim, l_max, **options)
        self.norm, self.prenorm = check_choice("norm", norm, NORMS), check_bool("prenorm", prenorm)
        self.standard: nn.Module = nn.LayerNorm(dim) if norm == "layer" else nn.BatchNorm1d(dim)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if not self.prenorm:
            return self._standardised(x + super()._mix(x, mask))
        y = self._standardised(x)
        if mask is not None:
            # The norm's bias is nothing a masked token has to say.
            y = y.masked_fill(~mask[..., None], 0.0)
        return x + super()._mix(y, mask)

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super()._continue(self._standardised(x) if self.prenorm else x, state)
        return (x + y if self.prenorm else self._standardised(x + y)), state

    def _standardised(self, x: Tensor) -> Tensor:
        y: Tensor = self.standard(x.flatten(0, -2)).view_as(x)
        return y
