"""``MonarchFFT`` and ``LearnedButterfly``: Fourier transforms by small matrices, fixed or trained.

A trained transform starts as the Fourier transform and learns its small matrices: more parameters at no cost of running
where matrix products are what is fast.  The way back stays the exact inverse transform, whose real part is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.nn.functional.butterfly import (
    BLOCK,
    butterfly_dft,
    dft_matrix,
    monarch_dft,
    monarch_factors,
    monarch_idft,
)

INITS = ("exact", "additive")
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}
ADDED_STD = 0.01


class MonarchFFT(nn.Module):
    """The Fourier transform of a power of two as a product of ``order`` small matrices.

    Parameters
    ----------
    n : int
        A power of two.
    order : int, default=2
        Number of factors, as alike as possible.

    Examples
    --------
    >>> import torch
    >>> transform, x = MonarchFFT(64), torch.randn(2, 64)
    >>> torch.allclose(transform.inverse(transform(x)).real, x, atol=1e-5)
    True
    """

    def __init__(self, n: int, order: int = 2) -> None:
        super().__init__()
        self.n, self.order = n, order
        self.factors = monarch_factors(n, order)

    def forward(self, x: Tensor) -> Tensor:
        """Return the spectrum of the last axis in the order of ``monarch_dft``."""
        return monarch_dft(x, self.factors)

    def inverse(self, z: Tensor) -> Tensor:
        """Return what ``forward`` transformed."""
        return monarch_idft(z, self.factors)

    def frequencies(self) -> Tensor:
        """Return the frequency at each place of the spectrum, (n,)."""
        places, step = torch.zeros(self.factors, dtype=torch.int64), 1
        for axis, size in enumerate(self.factors):
            shape = [-1 if i == axis else 1 for i in range(self.order)]
            places, step = places + step * torch.arange(size).view(shape), step * size
        return places.flatten()

    def extra_repr(self) -> str:
        """Show the factors."""
        return " x ".join(map(str, self.factors))


class LearnedButterfly(nn.Module):
    """A circular convolution whose transforms of input and kernel are learned, from the Fourier transform on.

    Parameters
    ----------
    n : int
        Size of the circle, a power of two; twice the sequence for convolutions that do not wrap around at the start.
    mats : int, default=1
        Matrices a size: one for all channels, or as many as channels.
    init : {"exact", "additive"}, default="exact"
        Learn the matrices themselves, or what is added to those of the transform, from 0.01 N(0, 1) on.
    dropout : float, default=0.0
        Share of what is added that is left out while training, "additive" only.
    nonlinearity : {"relu", "gelu", "tanh"}, optional
        Between levels.

    Notes
    -----
    One matrix a size, shared by all levels: of 16 x 16, and one of 2, 4 or 8 if n is no power of 16; separate ones for
    inputs and kernels.  Once trained, it is no convolution any more: outputs depend on later inputs.

    Examples
    --------
    >>> import torch
    >>> u, k = torch.randn(2, 3, 20), torch.randn(1, 3, 20)
    >>> wanted = torch.fft.irfft(torch.fft.rfft(u, 64) * torch.fft.rfft(k, 64), 64)[..., :20]
    >>> torch.allclose(LearnedButterfly(64)(u, k)[:, 0], wanted, atol=1e-4)
    True
    """

    def __init__(
        self,
        n: int,
        mats: int = 1,
        init: Literal["exact", "additive"] = "exact",
        dropout: float = 0.0,
        nonlinearity: Literal["relu", "gelu", "tanh"] | None = None,
    ) -> None:
        super().__init__()
        if check_int("n", n, low=2) & (n - 1):
            raise QuernelError(f"n must be a power of two; got {n}")
        self.n, self.mats, self.init = n, check_int("mats", mats, low=1), check_choice("init", init, INITS)
        self.dropout = check_float("dropout", dropout, low=0.0, high=1.0, open_high=True)
        self.nonlinearity = check_choice("nonlinearity", nonlinearity, (None, *NONLINEARITIES))
        self.for_inputs = nn.ParameterDict({str(size): self._initial(size) for size in sizes_of(n)})
        self.for_kernels = nn.ParameterDict({str(size): self._initial(size) for size in sizes_of(n)})

    def forward(self, u: Tensor, k: Tensor) -> Tensor:
        """Return the convolutions of u, (B, H, L), by k, (c, H, T), up to n each: (B, c, H, L)."""
        length = u.shape[-1]
        if max(length, k.shape[-1]) > self.n:
            raise QuernelError(f"u and k must have at most n={self.n} steps; got {length} and {k.shape[-1]}")
        if self.mats not in (1, u.shape[1]):
            raise QuernelError(f"mats must be 1 or the {u.shape[1]} channels of u; got {self.mats}")
        inputs, kernels = (
            self._transformed(F.pad(x, (0, self.n - x.shape[-1])), held)
            for x, held in ((u[:, None], self.for_inputs), (k, self.for_kernels))
        )
        return torch.fft.ifft(inputs * kernels).real[..., :length]

    def matrix(self, size: int, of: Literal["inputs", "kernels"] = "inputs") -> Tensor:
        """Return the complex matrices of a size, (mats, size, size)."""
        return self._matrix((self.for_inputs if of == "inputs" else self.for_kernels)[str(size)])

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.n}, sizes={sizes_of(self.n)}, mats={self.mats}, init={self.init!r}"

    def _initial(self, size: int) -> nn.Parameter:  # (mats, size, size, 2), pairs of real and imaginary parts
        if self.init == "additive":
            return nn.Parameter(ADDED_STD * torch.randn(self.mats, size, size, 2))
        exact = torch.view_as_real(dft_matrix(size, dtype=torch.complex128))
        return nn.Parameter(exact.to(torch.get_default_dtype()).repeat(self.mats, 1, 1, 1))

    def _matrix(self, held: Tensor) -> Tensor:
        held = held.to(torch.promote_types(held.dtype, torch.float32))
        if self.init == "exact":
            return torch.view_as_complex(held.contiguous())
        held = F.dropout(held, self.dropout, self.training)
        added = torch.view_as_complex(held.contiguous())
        return added + dft_matrix(held.shape[1], dtype=added.dtype, device=held.device)

    def _transformed(self, x: Tensor, held: nn.ParameterDict) -> Tensor:
        matrices = {int(size): self._matrix(parameter) for size, parameter in held.items()}
        x = x.to(next(iter(matrices.values())).dtype)
        return butterfly_dft(x, matrices, NONLINEARITIES.get(self.nonlinearity or ""))


def sizes_of(n: int) -> tuple[int, ...]:
    """Return the sizes of the small matrices for a transform of n: 16, and what is left over."""
    power = int(math.log2(n))
    last = 1 << (power % 4 or 4)
    return (BLOCK,) if last == BLOCK else (BLOCK, last) if n > BLOCK else (last,)
