"""Both sides of a pair as unit vectors of a feature space, or as a kernel matrix where that space is too large.

    cosine     phi(x) = x / |x|
    gaussian   phi(x) = R^-1/2 [cos(W x), sin(W x)], rows W ~ N(0, I / s^2);  phi(x).phi(y) ~= exp(-|x - y|^2 / (2 s^2))
    exact      the matrix K itself: gaussian without random features, or a function of the user's

All have K(x, x) = 1; everything is float64. Cost: d or 2 R numbers a row, n^2 for an exact kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from quernel._array_folder import readable
from quernel._errors import QuernelError
from quernel._random import spawn
from quernel._validate import check_bool, check_finite, check_float, check_int
from quernel.kernels.features.fourier import fourier_features
from quernel.kernels.features.spectral import spectral_directions
from quernel.kernels.gaussian import gaussian_kernel
from quernel.kernels.linalg import add_products

Kernel = Literal["cosine", "gaussian"] | Callable[[Any, Any], Any]
# Rows whose features are made at a time: temporaries stay small beside the features themselves.
BLOCK = 1024
_FEATURE_ROWS = 256
# A kernel that came from elsewhere is symmetric and has a unit diagonal up to this.
_ROUNDING = 1e-6


class KernelMap(Protocol):
    """One side: ``features`` where ``dim`` is a number, and ``gram`` always."""

    @property
    def dim(self) -> int | None:
        """Coordinates of a feature vector; None where there is only the kernel."""

    def features(self, x: Tensor) -> Tensor:
        """Return feature vectors, shape (n, dim), float64."""

    def gram(self, x: Tensor) -> Tensor:
        """Return the kernel between all rows, shape (n, n), float64."""


@dataclass(frozen=True, eq=False)
class CosineMap:
    """Rows divided by their lengths."""

    dim: int

    def features(self, x: Tensor) -> Tensor:
        """Return unit vectors; no row is zero, ``KernelChoice.rows`` saw to it."""
        rows = x.double()
        return rows / rows.norm(dim=1, keepdim=True)

    def gram(self, x: Tensor) -> Tensor:
        """Return the cosines."""
        return products(self.features(x))


@dataclass(frozen=True, eq=False)
class FourierMap:
    """Random Fourier features; directions: (R, d)."""

    directions: Tensor

    @property
    def dim(self) -> int:
        """Twice the number of directions."""
        return 2 * len(self.directions)

    def features(self, x: Tensor) -> Tensor:
        """Return cosines and sines, a block of rows at a time."""
        held = torch.empty(len(x), self.dim, dtype=torch.float64)
        for rows, found in zip(x.split(_FEATURE_ROWS), held.split(_FEATURE_ROWS), strict=True):
            found.copy_(fourier_features(rows.double() @ self.directions.T))
        return held

    def gram(self, x: Tensor) -> Tensor:
        """Return the dot products of the features."""
        return products(self.features(x))


@dataclass(frozen=True, eq=False)
class ExactMap:
    """A kernel without features: the Gaussian of a width, or a function."""

    kernel: Callable[[Any, Any], Any] | float
    dim: None = None

    def features(self, x: Tensor) -> Tensor:
        """Refuse: there are none."""
        raise QuernelError('an exact kernel has no features; take kernel="gaussian" with n_features > 0, or "cosine"')

    def gram(self, x: Tensor) -> Tensor:
        """Return the kernel matrix, checked where it came from a function."""
        rows = x.double()
        if not callable(self.kernel):
            # About the mean nothing cancels that need not.
            rows = (rows - rows.mean(0)) / self.kernel
            return gaussian_kernel(rows, rows)
        return unit_kernel("kernel(x, x)", self.kernel(rows.numpy(), rows.numpy()), len(x))


@dataclass(frozen=True)
class KernelChoice:
    """What the user chose for both sides, checked; ``maps`` makes it concrete once the widths are known."""

    kernel: Kernel
    bandwidth: float | Sequence[float] | None
    n_features: int
    shared_space: bool
    random_state: int

    def __post_init__(self) -> None:
        named = self.kernel if isinstance(self.kernel, str) else None
        if named not in ("cosine", "gaussian") and not callable(self.kernel):
            raise QuernelError(f'kernel must be "cosine", "gaussian" or a function of two arrays; got {self.kernel!r}')
        check_int("n_features", self.n_features, low=0)
        check_bool("shared_space", self.shared_space)
        object.__setattr__(self, "random_state", check_int("random_state", self.random_state, low=0))
        if named != "gaussian":
            if self.bandwidth is not None or self.n_features:
                raise QuernelError('bandwidth and n_features belong to kernel="gaussian"; leave them out otherwise')
        elif self.bandwidth is None:
            raise QuernelError(
                'kernel="gaussian" needs bandwidth=, in the units of the rows: about the median distance between two '
                "of them is a usual start"
            )
        elif self.n_features % 2:
            raise QuernelError(f"n_features must be even, a cosine and a sine a direction; got {self.n_features}")
        if self.bandwidth is not None:
            widths = self.widths
            if self.shared_space and widths[0] != widths[1]:
                raise QuernelError(f"a shared space has one bandwidth; got {widths}")

    @property
    def widths(self) -> tuple[float, float]:
        """Bandwidths of both sides."""
        both = self.bandwidth if isinstance(self.bandwidth, Sequence) else (self.bandwidth, self.bandwidth)
        if isinstance(both, str) or len(both) != 2:
            raise QuernelError(f"bandwidth must be one number or a pair (text, image); got {self.bandwidth!r}")
        first, second = (check_float("bandwidth", width, low=0.0, open_low=True) for width in both)
        return first, second

    def config(self) -> dict[str, Any]:
        """Return the arguments, by name."""
        bandwidth = list(self.widths) if isinstance(self.bandwidth, Sequence) else self.bandwidth
        return {
            "kernel": self.kernel,
            "bandwidth": bandwidth,
            "n_features": self.n_features,
            "shared_space": self.shared_space,
            "random_state": self.random_state,
        }

    def rows(self, t: Any, x: Any) -> tuple[Tensor, Tensor]:
        """Return both sides as matrices of as many rows, float32 or float64."""
        text, image = self.side("T", t), self.side("X", x)
        if len(text) != len(image):
            raise QuernelError(f"T and X must be pairs, row by row; got {len(text)} and {len(image)} rows")
        return text, image

    def side(self, name: str, value: Any) -> Tensor:
        """Return one side as a matrix, float32 or float64."""
        held = _matrix(name, value)
        check_finite(name, held)
        if self.kernel == "cosine":
            zero = (~held.any(1)).nonzero()
            if len(zero):
                raise QuernelError(
                    f"{name} must have no zero rows for the cosine kernel; row {int(zero[0])} is one. Drop such pairs"
                )
        return held

    def maps(self, widths: tuple[int, int]) -> tuple[KernelMap, KernelMap]:
        """Return both sides' maps; the same settings give the same random features."""
        if self.kernel == "cosine":
            return CosineMap(widths[0]), CosineMap(widths[1])
        if callable(self.kernel):
            return ExactMap(self.kernel), ExactMap(self.kernel)
        scales = self.widths
        if self.shared_space and widths[0] != widths[1]:
            raise QuernelError(f"T and X share no space: their rows have {widths[0]} and {widths[1]} numbers")
        if not self.n_features:
            return ExactMap(scales[0]), ExactMap(scales[1])
        seeds = spawn(self.random_state, 2)
        drawn = [
            # exp(-|x - y|^2 / (2 s^2)) is exp(-|x - y|^2 / s'^2) with s' = 2^0.5 s.
            spectral_directions("gaussian", self.n_features // 2, width, bandwidth=scale * 2**0.5, seed=seed)
            for width, scale, seed in zip(widths, scales, seeds, strict=True)
        ]
        first = FourierMap(torch.from_numpy(drawn[0]))
        return first, first if self.shared_space else FourierMap(torch.from_numpy(drawn[1]))


def _matrix(name: str, value: Any) -> Tensor:
    """Return numbers as a float32 matrix if they have no more precision, else float64."""
    held: Any
    if isinstance(value, Tensor):
        numbers = not value.dtype.is_complex and value.dtype is not torch.bool
        short = value.dtype in (torch.float16, torch.bfloat16, torch.float32)
        held = value.detach().cpu().to(torch.float32 if short else torch.float64) if numbers else value
    else:
        array = np.asarray(value)
        numbers = array.dtype.kind in "fiu"
        short = array.dtype in (np.float16, np.float32)
        held = readable(np.ascontiguousarray(array, np.float32 if short else np.float64)) if numbers else array
    if not numbers or held.ndim != 2 or held.shape[1] == 0:
        raise QuernelError(f"{name} must be real numbers of shape (n, d); got {held.dtype} of {tuple(held.shape)}")
    matrix: Tensor = held
    return matrix


def unit_kernel(name: str, k: Any, n: int | None = None) -> Tensor:
    """Return a kernel matrix of the user's as float64, if it is one and has a unit diagonal."""
    held = (k.detach().cpu() if isinstance(k, Tensor) else torch.as_tensor(np.asarray(k))).double()
    if held.ndim != 2 or held.shape[0] != held.shape[1] or (n is not None and len(held) != n):
        raise QuernelError(f"{name} must have shape (n, n){'' if n is None else f', n = {n}'}; got {tuple(held.shape)}")
    check_finite(name, held)
    off = float((held.diagonal() - 1).abs().max()) if len(held) else 0.0
    if off > _ROUNDING:
        raise QuernelError(
            f"{name} must have ones on its diagonal; it is {off:.3g} off. Divide K_ij by (K_ii K_jj)^0.5 first"
        )
    if float((held - held.T).abs().max()) > _ROUNDING:
        raise QuernelError(f"{name} must be symmetric")
    return held


def products(rows: Tensor) -> Tensor:
    """Return rows @ rows.T, its upper half copied from the lower one."""
    return add_products(rows.new_zeros(len(rows), len(rows)), rows)


def dims(maps: tuple[KernelMap, KernelMap]) -> tuple[int, int] | None:
    """Return the sizes of both feature spaces, or None where one has only a kernel."""
    found = maps[0].dim, maps[1].dim
    return None if None in found else cast(tuple[int, int], found)
