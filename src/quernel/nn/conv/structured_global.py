"""``SGConv``: convolutions as long as the sequence, kernels of O(log L) parameters that decay (arXiv 2210.09298).

    k = concat_i(a^i Upsample_{s_i}(w_i)) / Z,   s_i = 2^max(0, i - 1),   i = 0 .. n - 1,   a = 1 / decay

Segments of d, d, 2d, 4d, ... taps, each interpolated from d parameters, each weaker than the one before.  Z makes the
initial kernels unit vectors and stays as it is.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.nn.conv._global import GlobalConv

Upsample = Literal["linear", "nearest"]
Combine = Literal["cat", "sum"]
Init = Literal["normal", "cos"]
UPSAMPLE: tuple[Upsample, ...] = ("linear", "nearest")
COMBINE: tuple[Combine, ...] = ("cat", "sum")
INITS: tuple[Init, ...] = ("normal", "cos")


class MultiScaleKernel(nn.Module):
    """Kernels of segments that double in length and halve in strength.

    Parameters
    ----------
    dim, l_max : int
        Channels, and how many taps at least.
    heads : int, default=1
        Kernels a channel.
    kernel_dim : int, default=64
        Parameters d a segment.
    decay : (float, float), default=(2.0, 2.0)
        What a segment is divided by compared with the one before, for the first and the last channel, evenly in
        between.  (1.0, 2.0) gives channels from no decay to a strong one.
    upsample : {"linear", "nearest"}, default="linear"
        Interpolation, with half-pixel centres.
    combine : {"cat", "sum"}, default="cat"
        Segments one after another, or all from lag 0 on, added.
    learnable_decay : bool, default=False
        Divide by (j + 1)^gamma instead, gamma learned for every channel from a uniform draw out of ``decay``.
    init : {"normal", "cos"}, default="normal"
        Parameters N(0, 1), or cosines of a frequency a channel.

    Attributes
    ----------
    length : int
        Taps: d 2^(n - 1), the first such number of at least l_max.
    norm : Tensor, shape (heads, dim, 1)
        Z, computed once at construction.

    Notes
    -----
    heads dim d (1 + ceil(log2(l_max / d))) parameters; building L taps costs O(heads dim L).

    References
    ----------
    Li et al., "What Makes Convolutional Models Great on Long Sequence Modeling?", arXiv 2210.09298, 2023.

    Examples
    --------
    >>> kernel = MultiScaleKernel(4, l_max=1000)
    >>> kernel().shape, sum(w.numel() for w in kernel.weights) // 4
    (torch.Size([1, 4, 1024]), 320)
    """

    norm: Tensor

    def __init__(
        self,
        dim: int,
        l_max: int,
        heads: int = 1,
        kernel_dim: int = 64,
        decay: tuple[float, float] = (2.0, 2.0),
        upsample: Upsample = "linear",
        combine: Combine = "cat",
        learnable_decay: bool = False,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        self.dim, self.l_max = check_int("dim", dim, low=1), check_int("l_max", l_max, low=1)
        self.heads, self.kernel_dim = check_int("heads", heads, low=1), check_int("kernel_dim", kernel_dim, low=1)
        self.decay = _checked_decay(decay)
        self.upsample = check_choice("upsample", upsample, UPSAMPLE)
        self.combine = check_choice("combine", combine, COMBINE)
        self.init = check_choice("init", init, INITS)
        self.learnable_decay = check_bool("learnable_decay", learnable_decay)
        scales = 1 + (-(-l_max // kernel_dim) - 1).bit_length()
        self.length = kernel_dim << (scales - 1)
        self.weights = nn.ParameterList(self._initial() for _ in range(scales))
        low, high = self.decay
        if learnable_decay:
            self.gamma = nn.Parameter(torch.empty(dim).uniform_(low, high))
        self.register_buffer("norm", torch.ones(heads, dim, 1))
        if not self.weights[0].is_meta:
            with torch.no_grad():
                self.norm.copy_(torch.linalg.vector_norm(self().double(), dim=-1, keepdim=True))

    def forward(self, length: int | None = None) -> Tensor:
        """Return the kernels, (heads, dim, length): cut, or with zeros behind them."""
        length = self.length if length is None else length
        wide = torch.promote_types(self.norm.dtype, torch.float32)
        parts: list[Tensor] = []
        for i, factors in enumerate(self._factors(wide)):
            start, scale = self._segment(i)
            if start < length:
                # What is constant along a segment is multiplied before it gets long.
                parts.append(self._upsampled(self.weights[i].to(wide) * factors, scale)[..., : length - start])
        if self.combine == "cat":
            k = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        else:
            whole = min(length, self.length)
            k = torch.stack([F.pad(part, (0, whole - part.shape[-1])) for part in parts]).sum(0)
        if self.learnable_decay:
            lags = torch.arange(1, k.shape[-1] + 1, dtype=wide, device=k.device)
            k = k * torch.exp(-self.gamma.to(wide)[:, None] * lags.log())
        return F.pad(k, (0, length - k.shape[-1])) if k.shape[-1] < length else k

    @torch.no_grad()
    def extended(self) -> MultiScaleKernel:
        """Return kernels of twice the length: one more scale, of zeros, so that the first taps are the same."""
        new = MultiScaleKernel(
            self.dim,
            2 * self.length,
            self.heads,
            self.kernel_dim,
            self.decay,
            self.upsample,
            self.combine,
            self.learnable_decay,
            self.init,
        ).to(self.norm)
        state = self.state_dict()
        last = f"weights.{len(self.weights)}"
        new.load_state_dict(state | {last: torch.zeros_like(new.weights[-1])})
        return new

    def extra_repr(self) -> str:
        """Show the sizes and modes."""
        return (
            f"{self.dim}, length={self.length}, heads={self.heads}, scales={len(self.weights)}, decay={self.decay}, "
            f"upsample={self.upsample!r}, combine={self.combine!r}, learnable_decay={self.learnable_decay}"
        )

    def _segment(self, i: int) -> tuple[int, int]:
        """Return the first lag of segment i and its upsampling."""
        if self.combine == "sum":
            return 0, 1 << i
        return (0 if i == 0 else self.kernel_dim << (i - 1)), 1 << max(0, i - 1)

    def _factors(self, dtype: torch.dtype) -> list[Tensor]:
        """Return what the parameters of every segment are multiplied by, (heads, dim, 1) each."""
        low, high = self.decay
        device = self.norm.device
        decay = torch.ones(self.dim, dtype=dtype, device=device)
        if not self.learnable_decay:
            decay = torch.linspace(low, high, self.dim, dtype=dtype, device=device)
        return [decay[:, None] ** -i / self.norm.to(dtype) for i in range(len(self.weights))]

    def _upsampled(self, w: Tensor, scale: int) -> Tensor:  # (heads, dim, d) -> (heads, dim, d * scale)
        if scale == 1:
            return w
        if self.upsample == "nearest":
            return w.repeat_interleave(scale, -1)
        return F.interpolate(w, scale_factor=float(scale), mode="linear", align_corners=False)

    def _initial(self) -> nn.Parameter:
        shape = self.heads, self.dim, self.kernel_dim
        if self.init == "normal":
            return nn.Parameter(torch.randn(shape))
        # As many whole and half turns as channels, dealt anew for every scale.
        turns = torch.randperm(self.dim)[:, None] * torch.linspace(0.0, 1.0, self.kernel_dim)
        return nn.Parameter(torch.cos(2 * torch.pi * turns).expand(shape).clone())


def _checked_decay(decay: Any) -> tuple[float, float]:
    try:
        low, high = decay
    except (TypeError, ValueError) as error:
        raise QuernelError(f"decay must be two numbers, for the first and the last channel; got {decay!r}") from error
    return check_float("decay", low, low=0.0, open_low=True), check_float("decay", high, low=0.0, open_low=True)


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return SGConv(6, 80, heads=2, kernel_dim=5)

    return {"make": make, "input": lambda generator: (torch.randn(3, 43, 6, generator=generator),)}


@register("sgconv", pillar="nn", contract="mixer", paper="2210.09298", status="experimental", example=_example)
class SGConv(GlobalConv):
    """A global convolution whose kernels have O(log L) parameters and decay with the distance.

    y = Out(GELU(k * x + D x)), k from ``MultiScaleKernel``.

    Parameters
    ----------
    dim : int
        Channels.
    l_max : int
        Tokens that the kernel covers.  Longer inputs are convolved all the same, with zeros behind the kernel.
    heads : int, default=1
        Kernels a channel.
    bidirectional : bool, default=False
        Second kernels for later tokens; then the mixer is not causal.
    activation : {"gelu", "silu", "relu", "identity"}, default="gelu"
    dropout : float, default=0.0
        Share of channels left out while training, the same for all tokens.
    glu : bool, default=False
        Twice as wide an output, half of it a gate.
    norm : bool, default=False
        A LayerNorm before the last projection.
    kernel_dim, decay, upsample, combine, learnable_decay, init
        As in ``MultiScaleKernel``.

    Notes
    -----
    Kernels train at 1e-3 at most and without weight decay: ``param_groups``.  In eval mode their spectra are kept until
    a parameter changes; after a write through ``parameter.data``, which torch does not count as a change, call
    ``eval()`` again.

    Departs from public code: Z is computed
    at construction and not in the first forward pass, and kernels are normalised per direction and head.

    References
    ----------
    Li et al., "What Makes Convolutional Models Great on Long Sequence Modeling?", arXiv 2210.09298, 2023.

    Examples
    --------
    >>> import torch
    >>> SGConv(16, l_max=1024)(torch.randn(2, 1000, 16)).shape
    torch.Size([2, 1000, 16])
    """

    options = (
        *("l_max", "heads", "bidirectional", "activation", "dropout", "glu", "norm"),
        *("kernel_dim", "decay", "upsample", "combine", "learnable_decay", "init"),
    )

    def __init__(
        self,
        dim: int,
        l_max: int,
        heads: int = 1,
        bidirectional: bool = False,
        activation: Literal["gelu", "silu", "relu", "identity"] = "gelu",
        dropout: float = 0.0,
        glu: bool = False,
        norm: bool = False,
        *,
        kernel_dim: int = 64,
        decay: tuple[float, float] = (2.0, 2.0),
        upsample: Upsample = "linear",
        combine: Combine = "cat",
        learnable_decay: bool = False,
        init: Init = "normal",
    ) -> None:
        super().__init__(dim, l_max, heads, bidirectional, activation, dropout, glu, norm)
        self.norm = check_bool("norm", norm)
        self.kernel_dim, self.decay = kernel_dim, _checked_decay(decay)
        self.upsample, self.combine, self.learnable_decay, self.init = upsample, combine, learnable_decay, init
        self.filters = MultiScaleKernel(
            dim, l_max, self.sides * heads, kernel_dim, self.decay, upsample, combine, learnable_decay, init
        )
        self._warned = False

    def kernel(self, length: int | None = None) -> Tensor:
        """Return the kernels, (heads, C, taps), or (2, heads, C, taps) if bidirectional."""
        taps = self.filters.length if length is None else min(length, self.filters.length)
        k: Tensor = self.filters(taps)
        return k.unflatten(0, (2, self.heads)) if self.bidirectional else k

    def kernel_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the kernels."""
        return list(self.filters.parameters())

    @torch.no_grad()
    def extended(self) -> Self:
        """Return a mixer whose kernel is twice as long and that gives the same on what the old one covered."""
        new = copy.deepcopy(self)
        new.filters = self.filters.extended()
        new.l_max = new.filters.l_max
        return new

    def _convolved(self, u: Tensor) -> Tensor:
        # Tracing asks for sizes; the warning is for whoever calls.
        if not torch.compiler.is_compiling() and u.shape[2] > self.filters.length and not self._warned:
            self._warned = True
            warnings.warn(
                f"x has {u.shape[2]} tokens, more than the {self.filters.length} taps of the kernel: tokens farther "
                "apart do not meet. Use extended(), or a larger l_max",
                stacklevel=6,
            )
        return super()._convolved(u)
