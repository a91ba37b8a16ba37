"""Fourier transforms as products of small matrices (order-p Monarch), convolutions through them, and learned ones.

N = N1 N2, x as a matrix X[n1, n2] with n = N2 n1 + n2, F the matrices of small transforms:

    Z = ((F_N1 X) * T) F_N2,   T[k1, n2] = exp(-2 pi i k1 n2 / N),   Z[k1, k2] = xhat[k1 + N1 k2]

and so on for N2.  A convolution multiplies two such Z and goes back the same way, without any reordering.  Matrix units
make this fast; on a CPU ``fft_conv`` is 10 to 40 times faster, and these are here for what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.nn._fft_conv_op import circle_of, least_size

# Blocks of learned transforms.
BLOCK = 16


def monarch_factors(n: int, order: int = 2) -> tuple[int, ...]:
    """Split a power of two into ``order`` powers of two as alike as possible, larger ones first.

    Examples
    --------
    >>> monarch_factors(4096), monarch_factors(2048, order=3)
    ((64, 64), (16, 16, 8))
    """
    power = check_int("n", n, low=1).bit_length() - 1
    if n != 1 << power or check_int("order", order, low=1) > max(power, 1):
        raise QuernelError(f"n must be a power of two of at least 2^order, order={order}; got {n}")
    return tuple(1 << (power // order + (i < power % order)) for i in range(order))


def dft_matrix(n: int, *, dtype: torch.dtype = torch.complex64, device: torch.device | str | None = None) -> Tensor:
    """Return exp(-2 pi i j k / n), (n, n); phases are reduced modulo n and evaluated in float64."""
    j = torch.arange(n, device=device)
    return _roots(j[:, None] * j % n, n).to(dtype)


def monarch_dft(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Transform the last axis by one small matrix a factor.

    Parameters
    ----------
    x : Tensor, shape (..., N)
        Real or complex.
    factors : sequence of int
        Their product is N.

    Returns
    -------
    z : Tensor, shape (..., N)
        Complex; place (k1, k2, ...) of the factors' grid holds the frequency k1 + N1 k2 + N1 N2 k3 + ...

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    >>> z = monarch_dft(x, (4, 2))
    >>> torch.allclose(z.view(4, 2).T.flatten(), torch.fft.fft(x), atol=1e-5)
    True
    """
    n, first = x.shape[-1], _checked(x, factors)[0]
    x = x if x.is_complex() else torch.complex(x, torch.zeros_like(x))
    y = dft_matrix(first, dtype=x.dtype, device=x.device) @ x.unflatten(-1, (first, n // first))
    if len(factors) == 1:
        return y.flatten(-2)
    return monarch_dft(y * _twiddles(first, n, y), factors[1:]).flatten(-2)


def monarch_idft(z: Tensor, factors: Sequence[int]) -> Tensor:
    """Invert ``monarch_dft``; z: (..., N), complex, in its order."""
    n, first = z.shape[-1], _checked(z, factors)[0]
    y = z.unflatten(-1, (first, n // first))
    if len(factors) > 1:
        y = monarch_idft(y, factors[1:])
        y = y * _twiddles(first, n, y).conj()
    matrix = dft_matrix(first, dtype=z.dtype, device=z.device).conj()
    return (matrix @ y / first).flatten(-2)


def monarch_conv(
    u: Tensor, k: Tensor, *, bidirectional: bool = False, order: int = 2, three_pass: bool = False
) -> Tensor:
    """Convolve as ``fft_conv`` does, through products with small matrices.

    Parameters
    ----------
    u : Tensor, shape (B, H, L)
    k : Tensor, shape (H, taps) or (c, H, taps)
        With ``bidirectional`` two of them, as in ``fft_conv``.
    order : int, default=2
        Number of factors.
    three_pass : bool, default=False
        Multiply by the outer factor alone, which leaves N1 streams of length N2; convolve each stream as a whole with
        its slice of the kernel; multiply by the inverse of the outer factor.  For transforms too long for the fast
        memory: three passes over the data whatever its length.

    Returns
    -------
    y : Tensor, shape (B, H, L) or (B, c, H, L)

    Examples
    --------
    >>> import torch
    >>> u, k = torch.tensor([[[1.0, 0.0, 2.0, 0.0]]]), torch.tensor([[1.0, 0.5]])
    >>> monarch_conv(u, k).round(decimals=4) + 0.0
    tensor([[[1.0000, 0.5000, 2.0000, 1.0000]]])
    """
    sides = 2 if bidirectional else 1
    kernels = k.reshape(sides, -1, *k.shape[-2:])
    length = u.shape[-1]
    n = 1 << max(order, (least_size(length, k.shape[-1], sides) - 1).bit_length())
    circle = circle_of(kernels, length, n)  # (c, H, n)
    padded = torch.nn.functional.pad(u, (0, n - length))[:, None]
    if three_pass:
        y = _three_passes(padded, circle, monarch_factors(n)[0])
    else:
        factors = monarch_factors(n, order)
        y = monarch_idft(monarch_dft(padded, factors) * monarch_dft(circle, factors), factors).real
    y = y[..., :length]
    return y if k.ndim - bidirectional == 3 else y[:, 0]


def _three_passes(x: Tensor, k: Tensor, first: int) -> Tensor:
    n = x.shape[-1]
    matrix = dft_matrix(first, dtype=torch.promote_types(x.dtype, torch.complex64), device=x.device)

    def streams(y: Tensor) -> Tensor:  # (..., n) -> (..., N1, N2)
        y = matrix @ y.to(matrix.dtype).unflatten(-1, (first, n // first))
        return y * _twiddles(first, n, y)

    y = torch.fft.ifft(torch.fft.fft(streams(x)) * torch.fft.fft(streams(k)))
    return (matrix.conj() @ (y * _twiddles(first, n, y).conj()) / first).flatten(-2).real


def butterfly_dft(
    x: Tensor, matrices: Mapping[int, Tensor], nonlinearity: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Transform by given small matrices in the places of those of the Fourier transform.

    Parameters
    ----------
    x : Tensor, shape (..., H, N)
        Complex, N a power of two.
    matrices : mapping of int to Tensor, (r, r) or (H, r, r)
        Complex, by size: of 16 for every level but the last, and of the last one.  A row is a frequency.
    nonlinearity : callable, optional
        Applied to the real and to the imaginary parts between levels.

    Returns
    -------
    xhat : Tensor, shape (..., H, N)
        In the order of frequencies.
    """
    n = x.shape[-1]
    if n <= BLOCK:
        return (matrices[n] @ x[..., None])[..., 0]
    y = matrices[BLOCK] @ x.unflatten(-1, (BLOCK, n // BLOCK))  # (..., H, k1, n2)
    y = y * _twiddles(BLOCK, n, y)
    if nonlinearity is not None:
        y = torch.complex(nonlinearity(y.real), nonlinearity(y.imag))
    # The streams stand before the channels, so that matrices a channel meet their own.
    inner = butterfly_dft(y.transpose(-3, -2), matrices, nonlinearity)  # (..., k1, H, k2)
    return inner.movedim(-3, -1).flatten(-2)


def _twiddles(first: int, n: int, like: Tensor) -> Tensor:
    """Return T[k1, n2] = exp(-2 pi i k1 n2 / n), (first, n / first)."""
    k1, n2 = (torch.arange(size, device=like.device) for size in (first, n // first))
    return _roots(k1[:, None] * n2 % n, n).to(like.dtype)


def _roots(phases: Tensor, n: int) -> Tensor:
    turns = phases.double() * (-2 * math.pi / n)
    return torch.complex(turns.cos(), turns.sin())


def _checked(x: Tensor, factors: Sequence[int]) -> Sequence[int]:
    if not factors or math.prod(factors) != x.shape[-1]:
        raise QuernelError(f"factors must have the product {x.shape[-1]}, the size of the last axis; got {factors}")
    return factors
