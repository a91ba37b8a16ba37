"""``H3Conv``: two long convolutions with gates between them, as language needs (arXiv 2302.06646).

    z = K2 * (s v) + D2 (s v),   s = K1 * k + D1 k,   y = Out(q z),   q, k, v linear in x

The first convolution shifts and remembers what keys say, products pick out what values it belongs to, the second
carries it to later queries.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel.nn.conv._global import global_flops, kernel_groups
from quernel.nn.conv._online import Taps, windowed
from quernel.nn.conv._spectra import CachingMixer
from quernel.nn.conv.long_kernel import LongKernel
from quernel.nn.functional.fft_convolution import fft_conv, kernel_spectrum


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return H3Conv(6, 40, kernel_dropout=0.0)

    return {"make": make, "input": lambda generator: (torch.randn(3, 11, 6, generator=generator),)}


@register(
    "long-conv",
    pillar="nn",
    contract="mixer",
    paper="2302.06646",
    status="experimental",
    headline=False,
    example=_example,
)
class H3Conv(CachingMixer):
    """Queries times a convolution of values times a convolution of keys; causal.

    Parameters
    ----------
    dim : int
        Channels.
    l_max : int
        Taps, and tokens of the longest input.  A stream (``step``) may be longer, see ``LongConv``.
    lam, kernel_dropout, init, smooth_window, kernel_type
        Of both kernels, as in ``LongKernel``.

    Notes
    -----
    In eval mode spectra of the kernels are kept until a parameter changes; after a write through ``parameter.data``,
    which torch does not count as a change, call ``eval()`` again.

    References
    ----------
    Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv 2302.06646, 2023.

    Examples
    --------
    >>> import torch
    >>> H3Conv(16, l_max=1024)(torch.randn(2, 1000, 16)).shape
    torch.Size([2, 1000, 16])
    """

    options = ("l_max", "lam", "kernel_dropout", "init", "smooth_window", "kernel_type")
    causal = True

    def __init__(
        self,
        dim: int,
        l_max: int,
        lam: float | Literal["auto"] = "auto",
        kernel_dropout: float = 0.2,
        init: Literal["random", "double_exp"] = "random",
        smooth_window: int | None = None,
        kernel_type: Literal["direct", "multiscale"] = "direct",
    ) -> None:
        super().__init__(dim)
        self.l_max, self.lam, self.kernel_dropout, self.init = l_max, lam, kernel_dropout, init
        self.smooth_window, self.kernel_type = smooth_window, kernel_type
        self.filters = nn.ModuleList(
            LongKernel(dim, l_max, 1, lam, kernel_dropout, init, smooth_window, kernel_type) for _ in range(2)
        )
        self.max_len = l_max
        self.skips = nn.ParameterList(torch.randn(1, dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def warm_up(self, share: float) -> None:
        """Shrink by this share of lambda from now on, see ``LongKernel.warm_up``."""
        for filters in self.filters:
            cast(LongKernel, filters).warm_up(share)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C): two convolutions, three products, the projections."""
        batch, *sizes, channels = shape
        tokens = torch.Size(sizes).numel()
        return 2 * global_flops(batch, tokens, channels, 1) + batch * tokens * channels * (2 + 8 * channels)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the kernels without weight decay at no more than 1e-3, and the rest."""
        return kernel_groups(self, list(self.filters.parameters()), lr)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the windows of keys and of gated values before the first token, (B, C, 0) each."""
        empty = torch.empty(batch, self.dim, 0, device=self._state_device(device), dtype=dtype)
        return empty, empty

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._projected(x.flatten(1, -2))
        if mask is not None:
            # The biases of the projections are nothing a masked token has to say.
            k, v = (t * mask.flatten(1)[:, None].to(t.dtype) for t in (k, v))
        y: Tensor = self.out((q * self._convolved(1, self._convolved(0, k) * v)).transpose(1, 2))
        return y.view_as(x)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, N, C) -> three (B, C, N)
        q, k, v = self.qkv(x).transpose(1, 2).chunk(3, 1)
        return q, k, v

    def _convolved(self, which: int, u: Tensor) -> Tensor:  # (B, C, N) -> (B, C, N)
        length, skip = u.shape[2], self.skips[which]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return fft_conv(u, self.filters[which](length), skip=skip)[:, 0]
        spectrum = self._cache.get(
            self,
            f"spectrum {which}",
            (length, u.dtype),
            lambda: kernel_spectrum(self.filters[which](length), length, skip=skip),
        )
        return fft_conv(u, spectrum)[:, 0]

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # (B, T, C)
        if not isinstance(state, tuple | list) or len(state) != 2:
            got = f"{len(state)} parts" if isinstance(state, tuple | list) else type(state).__name__
            raise QuernelError(f"state must be the two windows of init_state; got {got}")
        first, second = self._taps(0), self._taps(1)
        q, k, v = self._projected(x)
        s, keys = windowed(k, state[0], first)
        z, values = windowed(s[:, 0] * v, state[1], second)
        y: Tensor = self.out((q * z[:, 0]).transpose(1, 2))
        return y, (keys, values)

    def _taps(self, which: int) -> Taps:
        def make() -> Taps:
            return Taps(self.filters[which](), self.skips[which])

        taps: Taps = self._cache.get(self, f"taps {which}", None, make)
        return taps
