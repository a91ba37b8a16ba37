"""Custom op ``quernel::fft_conv``: long depthwise convolutions, forward and backward, from inputs alone.

y[b, c, h] = irfft(rfft(u[b, h]) (rfft(k[c, h]) + skip[c, h])), all spectra of one size n, by torch's transforms in
groups of rows (a sample's channel each) whose spectra stay in the cache and whose number fills the vectors of the
transform.  The backward pass transforms again instead of keeping spectra, and needs one inverse transform a kernel
whatever the batch: grad k = irfft(sum_b conj(U_b) G_b).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError

# Up to this many taps the products themselves cost less than transforms.
DIRECT_TAPS = 64
# Numbers in the padded rows of a group, and how many rows at least (of a long transform half of them) and at most:
# fewer than sixteen leave lanes of the transform's vectors empty.
GROUP_SIZE, GROUP_ROWS, MOST_ROWS, LONG = 2**18, 16, 256, 2**16
# Sizes with factors 3 and 5 cost so much more a point.
MIXED = 1.12

Spectrum = Callable[[slice], Tensor]  # channels -> their spectra, (c, h, n // 2 + 1)


@functools.cache
def fft_size(least: int) -> int:
    """Return the size of at least ``least`` whose transform costs least: a power of two or 32 * 2^a 3^b 5^c."""
    best = 1 << max(0, least - 1).bit_length()
    found, cost = best, _cost(best)
    for odd in (3, 5, 9, 15, 25, 27, 45, 75, 81, 125):
        size = odd << max(5, (-(-least // odd) - 1).bit_length())
        if size < best and MIXED * _cost(size) < cost:
            found, cost = size, MIXED * _cost(size)
    return found


def _cost(size: int) -> float:
    return size * math.log2(size + 1)


def least_size(length: int, taps: int, sides: int) -> int:
    """Return the size from which on no product wraps around into an output; taps: of a kernel cut to the length."""
    after = min(taps, length - 1) if sides == 2 else 0
    return max(length + min(taps, length) - 1, length + after, 1)


def rows_of(n: int, rows: int) -> int:
    """Return how many rows to transform together, ``rows`` if given."""
    least = GROUP_ROWS if n <= LONG else GROUP_ROWS // 2
    return rows or max(least, min(MOST_ROWS, GROUP_SIZE // n))


def circle_of(k: Tensor, length: int, n: int) -> Tensor:
    """Return kernels on a circle of n, for inputs of ``length``; k: (sides, c, H, T) -> (c, H, n).

    The second side, of lags -1, -2, ..., stands at the end.
    """
    taps = k.shape[3]
    first, second = min(taps, length), min(taps, length - 1) if len(k) == 2 else 0
    parts = [k[0, ..., :first], k.new_zeros(*k.shape[1:3], n - first - second)]
    return torch.cat([*parts, *([k[1, ..., :second].flip(-1)] if second else [])], -1)


def kernel_spectra(k: Tensor, skip: Tensor | None, length: int, n: int) -> Tensor:
    """Return the spectra of kernels for inputs of ``length``; k: (sides, c, H, T) -> (c, H, n // 2 + 1)."""
    # One side is padded by the transform itself.
    spectra = torch.fft.rfft(k[0, ..., :length], n) if len(k) == 1 else torch.fft.rfft(circle_of(k, length, n))
    return spectra if skip is None else spectra.add_(skip[..., None])


def convolve(u: Tensor, spectrum: Spectrum, heads: int, n: int, rows: int) -> Tensor:
    """Return the convolutions of u, (B, H, L), as (B, c, H, L)."""
    length, groups = u.shape[2], _groups(u, n, rows)
    y = empty_like_rows(u, heads)
    if len(groups) == 1 and len(groups[0][1]) == 1:
        # One group: nothing that could be used again.
        z = torch.fft.rfft(u, n)[:, None]
        k = spectrum(slice(None))
        return y.copy_(torch.fft.irfft(z.mul_(k) if heads == 1 else z * k, n)[..., :length])
    held = _Padded(u, n)
    for inner, parts in groups:
        k = spectrum(inner)
        for part in parts:
            spectra = held.rfft(u[part, inner])
            for head in range(heads):
                # The last product may destroy the spectra of the input.
                z = spectra.mul_(k[head]) if head == heads - 1 else spectra * k[head]
                y[part, head, inner] = torch.fft.irfft(z, n)[..., :length]
    return y


def _compute(u: Tensor, k: Tensor, skip: Tensor | None, n: int, rows: int) -> Tensor:
    _check(u, k, skip, n)
    sides, heads, _, taps = k.shape
    length = u.shape[2]
    if u.shape[0] == 0:
        return empty_like_rows(u, heads)
    if n == 0 and rows == 0 and taps <= DIRECT_TAPS and u.dtype is torch.float32:
        return _direct(u, k, skip)
    n = n or fft_size(least_size(length, taps, sides))

    def spectrum(inner: slice) -> Tensor:
        return kernel_spectra(k[:, :, inner], None if skip is None else skip[:, inner], length, n)

    return convolve(u, spectrum, heads, n, rows)


def _direct(u: Tensor, k: Tensor, skip: Tensor | None) -> Tensor:
    """Multiply and add: a convolution of torch with the taps from the last lag to the first."""
    sides, heads, channels, taps = k.shape
    length = u.shape[2]
    first = min(taps, length)
    second = min(taps, length - 1) if sides == 2 else 0
    weight = torch.cat([k[0, ..., :first].flip(-1), *([k[1, ..., :second]] if second else [])], -1)  # (c, H, taps)
    if skip is not None:
        weight[..., first - 1] += skip
    weight = weight.transpose(0, 1).reshape(channels * heads, 1, -1)
    padded = F.pad(u, (first - 1, second)).contiguous()
    y = F.conv1d(padded, weight, groups=channels).unflatten(1, (channels, heads)).transpose(1, 2)
    return empty_like_rows(u, heads).copy_(y)


def _compute_backward(
    g: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, n: int, rows: int, want_u: bool, want_k: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and k, empty where not wanted; g: (B, c, H, L)."""
    _check(u, k, skip, n)
    sides, heads, _, taps = k.shape
    length = u.shape[2]
    of_u, of_k = _gradients(u, k, want_u, want_k)
    if len(u) == 0:
        return of_u, of_k
    n = n or fft_size(least_size(length, taps, sides))
    held, other = _Padded(u, n), _Padded(u, n)
    for inner, parts in _groups(u, n, rows):
        if want_u:
            back = kernel_spectra(k[:, :, inner], None if skip is None else skip[:, inner], length, n)
            torch.conj_physical_(back)
        total: list[Tensor | None] = [None] * heads
        for part in parts:
            if want_k:
                spectra = torch.conj_physical_(held.rfft(u[part, inner]))
            sum_u: Tensor | None = None
            for head in range(heads):
                z = other.rfft(g[part, head, inner])
                if want_k:
                    total[head] = _added(total[head], spectra, z)
                if want_u:
                    # The last use of z.
                    sum_u = z.mul_(back[head]) if sum_u is None else sum_u.addcmul_(z, back[head])
            if sum_u is not None:
                of_u[part, inner] = torch.fft.irfft(sum_u, n)[..., :length]
        if want_k:
            found = torch.fft.irfft(torch.stack([t for t in total if t is not None]), n)  # (c, h, n)
            of_k[0, :, inner, :length] = found[..., : min(taps, length)]
            if sides == 2 and (second := min(taps, length - 1)) > 0:
                of_k[1, :, inner, :second] = found[..., n - second :].flip(-1)
    return of_u, of_k


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add the products of two spectra, (s, h, f) each, summed over samples."""
    if total is not None and len(a) == 1:
        return total.addcmul_(a[0], b[0])
    product = (a * b).sum(0)
    return product if total is None else total.add_(product)


class _Padded:
    """Rows with zeros behind them, the same memory for one group after another."""

    def __init__(self, like: Tensor, n: int) -> None:
        self.like, self.n = like, n
        self.memory: Tensor | None = None

    def rfft(self, x: Tensor) -> Tensor:  # (s, h, L) -> (s, h, n // 2 + 1)
        samples, channels, length = x.shape
        if self.memory is None or self.memory.shape[:2] != x.shape[:2]:
            self.memory = self.like.new_zeros(samples, channels, self.n)
        self.memory[..., :length] = x
        return torch.fft.rfft(self.memory)


def _groups(u: Tensor, n: int, rows: int) -> list[tuple[slice, list[slice]]]:
    """Return groups of channels, and of the samples whose rows are transformed with them."""
    batch, channels, _ = u.shape
    rows = rows_of(n, rows) if u.device.type == "cpu" else batch * channels
    inner = min(channels, rows)
    samples = max(1, rows // inner)
    parts = list(_slices(batch, samples))
    return [(part, parts) for part in _slices(channels, inner)]


def _slices(n: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, n)) for start in range(0, n, size))


def empty_like_rows(u: Tensor, heads: int) -> Tensor:
    """Return an empty (B, c, H, L) in the memory order of u, (B, H, L)."""
    batch, channels, length = u.shape
    if u.stride(1) < u.stride(2):
        return u.new_empty(batch, length, heads, channels).permute(0, 2, 3, 1)
    return u.new_empty(batch, heads, channels, length)


def _gradients(u: Tensor, k: Tensor, want_u: bool, want_k: bool) -> tuple[Tensor, Tensor]:
    of_u = empty_like_rows(u, 1)[:, 0] if want_u else u.new_empty(0)
    return of_u, k.new_zeros(k.shape) if want_k else k.new_empty(0)


def _check(u: Tensor, k: Tensor, skip: Tensor | None, n: int) -> None:
    """Raise unless the operands fit together."""
    channels, length = u.shape[1:]
    least = least_size(length, k.shape[3], k.shape[0])
    if n and n < least:
        raise QuernelError(
            f"n must be at least {least} for {length} steps and {k.shape[3]} taps, a smaller transform wraps around; "
            f"got {n}"
        )
    if k.shape[2] != channels or (skip is not None and skip.shape != k.shape[1:3]):
        shape = None if skip is None else tuple(skip.shape)
        raise QuernelError(
            f"k must have one kernel for each of the {channels} channels of u and skip one number a kernel; got "
            f"kernels {tuple(k.shape)} and skip {shape}"
        )


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "fft_conv(Tensor u, Tensor k, Tensor? skip, int n, int rows) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(
    "fft_conv_backward(Tensor g, Tensor u, Tensor k, Tensor? skip, int n, int rows, bool want_u, bool want_k)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _device in ("CPU", "CUDA"):
    _library.impl("fft_conv", _compute, _device)
    _library.impl("fft_conv_backward", _compute_backward, _device)
fft_conv_op = torch.ops.quernel.fft_conv.default
_backward_op = torch.ops.quernel.fft_conv_backward.default


def fft_conv_run(u: Tensor, k: Tensor, skip: Tensor | None, n: int, rows: int) -> Tensor:
    """Call the op; where it would only be run, without the dispatcher, which costs a tenth of a short convolution."""
    given = [t for t in (u, k, skip) if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if recorded or torch.compiler.is_compiling() or any(type(t) not in (Tensor, nn.Parameter) for t in given):
        return fft_conv_op(u, k, skip, n, rows)
    return _compute(u, k, skip, n, rows)


@torch.library.register_fake("quernel::fft_conv", lib=_library)
def _fake(u: Tensor, k: Tensor, skip: Tensor | None, n: int, rows: int) -> Tensor:
    return empty_like_rows(u, k.shape[1])


@torch.library.register_fake("quernel::fft_conv_backward", lib=_library)
def _fake_backward(
    g: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, n: int, rows: int, want_u: bool, want_k: bool
) -> tuple[Tensor, Tensor]:
    return _gradients(u, k, want_u, want_k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    u, k, skip, ctx.n, ctx.rows = inputs
    ctx.save_for_backward(u, k, skip)


def _back(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    u, k, skip = ctx.saved_tensors
    want_u, want_k, want_skip = ctx.needs_input_grad[:3]
    of_u, of_k = _backward_op(g, u, k, skip, ctx.n, ctx.rows, want_u, want_k or want_skip)
    # What is added at lag 0 has the gradient of the tap at lag 0.
    return of_u if want_u else None, of_k if want_k else None, of_k[0, :, :, 0] if want_skip else None, None, None


def _keep_again(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    g, u, k, skip, ctx.n, ctx.rows, ctx.want_u, ctx.want_k = inputs
    ctx.save_for_backward(g, u, k, skip)


def _back_again(ctx: Any, of_u: Tensor, of_k: Tensor) -> tuple[Any, ...]:
    """Differentiate the gradients: both are convolutions, linear in g and in the other operand."""
    g, u, k, skip = ctx.saved_tensors
    n, rows = ctx.n, ctx.rows
    of_u = of_u if ctx.want_u else torch.zeros_like(u)
    of_k = of_k if ctx.want_k else torch.zeros_like(k)
    of_g = fft_conv_op(of_u, k, skip, n, rows) + fft_conv_op(u, of_k, None, n, rows)
    new_u, new_k = _backward_op(g, of_u, of_k, None, n, rows, True, True)
    return of_g, new_u, new_k, None if skip is None else new_k[0, :, :, 0], None, None, None, None


torch.library.register_autograd("quernel::fft_conv", _back, setup_context=_keep, lib=_library)
torch.library.register_autograd("quernel::fft_conv_backward", _back_again, setup_context=_keep_again, lib=_library)
