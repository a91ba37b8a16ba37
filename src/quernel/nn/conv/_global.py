"""``GlobalConv``: what mixers by convolutions as long as the sequence share (LongConv, SGConv).

y = Out(GELU(K * x + D x)) with kernels K and factors D a channel and head; Out is linear from c C to C, or twice as
wide with a gate.  A subclass makes the kernels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.nn.conv._online import OnlineState, Taps, windowed
from quernel.nn.conv._spectra import CachingMixer
from quernel.nn.functional.fft_convolution import KernelSpectrum, fft_conv, kernel_spectrum

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda x: x,
}
# The largest rate at which kernels train well; other parameters take more.
KERNEL_RATE = 1e-3


class GlobalConv(CachingMixer):
    """Base of the mixers by long convolutions.

    Tokens of several axes count row by row.
    """

    def __init__(
        self,
        dim: int,
        l_max: int,
        heads: int,
        bidirectional: bool,
        activation: str,
        dropout: float,
        glu: bool,
        normed: bool = False,
    ) -> None:
        super().__init__(dim)
        self.l_max, self.heads = check_int("l_max", l_max, low=1), check_int("heads", heads, low=1)
        self.bidirectional, self.causal = check_bool("bidirectional", bidirectional), not bidirectional
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.dropout = check_float("dropout", dropout, low=0.0, high=1.0, open_high=True)
        self.glu = check_bool("glu", glu)
        self.before_out = nn.LayerNorm(heads * dim) if normed else nn.Identity()
        self.skip = nn.Parameter(torch.randn(heads, dim))
        self.out = nn.Linear(heads * dim, 2 * dim if glu else dim)

    @property
    def sides(self) -> int:
        """How many kernels a head and channel has: of past tokens, and of later ones."""
        return 2 if self.bidirectional else 1

    @abstractmethod
    def kernel(self, length: int | None = None) -> Tensor:
        """Return the effective kernels for ``length`` tokens, (heads, C, taps), two of them if bidirectional."""

    @abstractmethod
    def kernel_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are kernels."""

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C): transforms of 2N, products, and the projection."""
        batch, *sizes, channels = shape
        tokens = torch.Size(sizes).numel()
        projected = 2 * batch * tokens * self.out.in_features * self.out.out_features
        return global_flops(batch, tokens, channels, self.heads) + projected

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the kernels without weight decay, which would end them, at no more than 1e-3; and the rest."""
        return kernel_groups(self, self.kernel_parameters(), lr)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        u = x.flatten(1, -2).transpose(1, 2)  # (B, C, N), channels last in memory
        return self._finished(self._convolved(u)).view_as(x)

    def _convolved(self, u: Tensor) -> Tensor:  # (B, C, N) -> (B, c, C, N)
        length = u.shape[2]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return fft_conv(u, self.kernel(length), skip=self.skip, bidirectional=self.bidirectional)
        spectrum: KernelSpectrum = self._cache.get(self, "spectrum", (length, u.dtype), lambda: self._spectrum(length))
        return fft_conv(u, spectrum)

    def _spectrum(self, length: int) -> KernelSpectrum:
        return kernel_spectrum(self.kernel(length), length, skip=self.skip, bidirectional=self.bidirectional)

    def _finished(self, y: Tensor) -> Tensor:  # (B, c, C, N) -> (B, N, C)
        y = ACTIVATIONS[self.activation](y.flatten(1, 2).transpose(1, 2))
        if self.training and self.dropout:
            # One draw a sample and channel, the same for all tokens.
            y = y * F.dropout(y.new_ones(len(y), 1, y.shape[2]), self.dropout)
        y = self.out(self.before_out(y))
        return F.glu(y, -1) if self.glu else y

    def init_state(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        online: bool = False,
    ) -> Any:
        """Return the state before the first token.

        Parameters
        ----------
        batch : int
        device, dtype
            Of the inputs to come.
        online : bool, default=False
            Whether outputs to come are worked on ahead: O(log^2 L) a token on average instead of O(L), for up to
            ``l_max`` tokens, in a state that is changed in place and holds C (1 + heads) l_max numbers a stream.

        Returns
        -------
        state
            The last inputs, (B, C, 0 .. l_max - 1), or an ``OnlineState``.
        """
        self._check_recurrent()
        empty = torch.empty(batch, self.dim, 0, device=self._state_device(device), dtype=dtype)
        return OnlineState(self.l_max) if online else empty

    def _check_recurrent(self) -> None:
        if not self.causal:
            raise QuernelError(f"{type(self).__name__} has a recurrent form only with bidirectional=False")

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # (B, T, C)
        u = x.transpose(1, 2)
        taps: Taps = self._cache.get(self, "taps", None, lambda: Taps(self.kernel(self.l_max), self.skip))
        if isinstance(state, OnlineState):
            return self._finished(state.advance(u, taps)), state
        y, state = windowed(u, state, taps)
        return self._finished(y), state


def kernel_groups(module: nn.Module, kernels: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Return groups: kernels at no more than 1e-3 and without weight decay, the module's other parameters at ``lr``."""
    taken = {id(p) for p in kernels}
    rest = [p for p in module.parameters() if id(p) not in taken]
    return [{"params": kernels, "lr": min(lr, KERNEL_RATE), "weight_decay": 0.0}, {"params": rest, "lr": lr}]


def global_flops(batch: int, tokens: int, channels: int, heads: int) -> int:
    """Return the operations of a convolution of all channels: transforms of 2N and products."""
    size = 2 * tokens
    transform = round(2.5 * size * max(1, (size - 1).bit_length()))
    rows = batch * channels
    return (rows * (1 + heads) + channels * heads) * transform + 3 * rows * heads * size
