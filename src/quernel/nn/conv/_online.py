"""Long convolutions one token at a time: over a window of the last inputs, or with the outputs to come worked on ahead.

``windowed`` multiplies all taps with as many inputs, O(L) a token.  ``OnlineState`` adds, whenever P new inputs are
complete (P the largest power of two that divides their number), what they do to the next P outputs, by one transform of
2 P: every pair of an input and a later output is met exactly once, and a token costs O(log^2 L) on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional.fft_convolution import fft_conv

# Inputs of a block that are multiplied directly: transforms of fewer cost more.
BLOCK = 32


class Taps:
    """Kernels for streams, (c, C, T), with what is added at lag 0 in their first taps.

    Parameters
    ----------
    kernel : Tensor, shape (c, C, T)
    skip : Tensor, shape (c, C), optional
    """

    def __init__(self, kernel: Tensor, skip: Tensor | None = None) -> None:
        wide = torch.promote_types(kernel.dtype, torch.float32)
        self.kernel = kernel.to(wide)
        if skip is not None:
            self.kernel = torch.cat([self.kernel[..., :1] + skip.to(wide)[..., None], self.kernel[..., 1:]], -1)
        self.backwards = self.kernel.flip(-1).transpose(0, 1).contiguous()  # (C, c, T)
        self._spectra: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Number of taps."""
        return self.kernel.shape[-1]

    def latest(self, u: Tensor) -> Tensor:  # (B, C, w) -> (B, c, C)
        """Return the outputs at the last of w inputs."""
        w = min(u.shape[2], self.length)
        y = self.backwards[..., self.length - w :] @ u[..., u.shape[2] - w :].permute(1, 2, 0)  # (C, c, B)
        return y.permute(2, 1, 0)

    def spectrum(self, size: int) -> Tensor:
        """Return the spectra of the first ``size`` taps; kept."""
        if size not in self._spectra:
            self._spectra[size] = torch.fft.rfft(self.kernel[..., :size], size)
        return self._spectra[size]


def windowed(u: Tensor, window: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:  # (B, C, t), (B, C, w)
    """Return the outputs after a window of earlier inputs, (B, c, C, t), and the window after them."""
    check_window(window, u)
    given, wide = u.dtype, taps.kernel.dtype
    both = torch.cat([window.to(u.dtype), u], -1)
    if u.shape[2] == 1:
        y = taps.latest(both.to(wide))[..., None]
    else:
        y = fft_conv(both.to(wide), taps.kernel)[..., window.shape[2] :]
    return y.to(given), both[..., max(0, both.shape[2] - taps.length + 1) :]


def check_window(window: Tensor, u: Tensor) -> None:
    """Raise unless ``window`` holds earlier inputs of the streams of ``u``, (B, C, t)."""
    if not isinstance(window, Tensor) or window.ndim != 3 or window.shape[:2] != u.shape[:2]:
        got = tuple(window.shape) if isinstance(window, Tensor) else type(window).__name__
        raise QuernelError(
            f"state must hold the last inputs of {u.shape[0]} streams, ({u.shape[0]}, {u.shape[1]}, w), as init_state("
            f"{u.shape[0]}) and earlier calls return them; got {got}"
        )


class OnlineState:
    """Inputs so far and what they add to outputs to come, for ``steps`` tokens; changed in place, without gradients.

    Parameters
    ----------
    steps : int
        Tokens that a stream may have.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.time = steps, 0
        # From here on inputs have not been added to all outputs to come.
        self._origin = 0
        self._inputs = self._ahead = torch.empty(0)

    @torch.no_grad()
    def advance(self, u: Tensor, taps: Taps) -> Tensor:  # (B, C, t) -> (B, c, C, t)
        """Return the next outputs."""
        batch, channels, count = u.shape
        if self.time:
            check_window(self._inputs, u)
        if self.time + count > self.steps:
            raise QuernelError(
                f"state holds room for {self.steps} tokens, of which {self.time} are taken; got {count} more. "
                "Start another, or use init_state(online=False), whose window moves on"
            )
        wide = u.to(taps.kernel.dtype)
        if self.time == 0:
            self._inputs = wide.new_zeros(batch, channels, self.steps)
            self._ahead = wide.new_zeros(batch, len(taps.kernel), channels, self.steps)
        start, self.time = self.time, self.time + count
        self._inputs[..., start : self.time] = wide
        if count > 1:
            # All outputs anew: what is ahead then lacks nothing of any input so far.
            self._ahead, self._origin = fft_conv(self._inputs, taps.kernel), self.time
            return self._ahead[..., start : self.time].to(u.dtype)
        done = self.time - self._origin
        block = done % BLOCK or BLOCK
        y = self._ahead[..., start] + taps.latest(self._inputs[..., self.time - block : self.time])
        if block == BLOCK:
            self._add_ahead(done & -done, taps)
        return y[..., None].to(u.dtype)

    def _add_ahead(self, count: int, taps: Taps) -> None:
        """Add what the last ``count`` inputs do to as many outputs."""
        end = min(self.time + count, self.steps)
        if end == self.time:
            return
        u = torch.fft.rfft(self._inputs[..., self.time - count : self.time], 2 * count)
        # A circle of twice their number: wrapped products fall on the first half.
        y = torch.fft.irfft(u[:, None] * taps.spectrum(2 * count), 2 * count)
        self._ahead[..., self.time : end] += y[..., count : count + end - self.time]
