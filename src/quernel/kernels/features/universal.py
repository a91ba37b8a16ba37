"""Universal random features: f(w.x + b) as a dot product of one vector for x and one for (w, b) (arXiv 2310.13225).

With f(z) = int F(xi) exp(2 pi i xi z) d xi, frequencies xi ~ p, directions g ~ N(0, I) and M >= 0 (the damping):
  Lambda(g, u) = (1 + 4M)^(d/4) exp(-M |g|^2 + sqrt(1 + 4M) g.u - u.u / 2),     u.u bilinear, u = sqrt(2 pi i xi) x
  Phi_r(x) = n^-1/2 Lambda(g_r, u(x)),     Psi_r(w, b) = n^-1/2 F/p(xi_r) exp(2 pi i xi_r b) Lambda(g_r, u(w))
  E Re sum_r Psi_r Phi_r = f(w.x + b).
Everything here is real arithmetic: modulus exp(log_scale + t), angle sign(xi) t - pi xi |x|^2, t = slope g.x; real
columns [Re Phi, Im Phi] and [Re Psi, -Im Psi] have that real part as their dot product. That is also what the pair
+xi, -xi with the same g gives. The variance grows like exp(2 pi |xi| |x + w|^2): keep rows and weights near length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.kernels.linalg import Array, as_tensor, like

Floats = NDArray[np.float64]
Complex = NDArray[np.complex128]

# exp(60) of variance: no number of features averages that away, and float32 ends at exp(88).
LARGEST_EXPONENT = 60.0


@dataclass(frozen=True)
class Spectrum:
    """An activation by its Fourier transform F, for activations that have an integrable or a discrete one.

    Attributes
    ----------
    name : str
        What messages call it.
    sample : callable
        ``sample(generator, n)`` draws n real frequencies from a density p, shape (n,).
    ratio : callable
        ``ratio(xi)`` gives F(xi) / p(xi), complex, shape (n,); for a real activation F(-xi) = conj F(xi).
    """

    name: str
    sample: Callable[[np.random.Generator, int], Floats]
    ratio: Callable[[Floats], Complex]


def _one_frequency(draw: np.random.Generator, n: int) -> Floats:
    return (draw.integers(0, 2, n) * 2 - 1) / (2 * math.pi)


def _normal_frequencies(draw: np.random.Generator, n: int) -> Floats:
    return draw.standard_normal(n) / (2 * math.pi)


SPECTRA: Mapping[str, Spectrum] = MappingProxyType(
    {
        "cos": Spectrum("cos", _one_frequency, lambda xi: np.ones(len(xi), np.complex128)),
        # exp(-z^2 / 2) has F = sqrt(2 pi) exp(-2 pi^2 xi^2), which is a density itself.
        "gauss": Spectrum("gauss", _normal_frequencies, lambda xi: np.ones(len(xi), np.complex128)),
        "sin": Spectrum("sin", _one_frequency, lambda xi: -1j * np.sign(xi)),
    }
)


def spectrum_of(activation: str | Spectrum) -> Spectrum:
    """Return the spectrum of an activation by name, or the one given.

    Raises
    ------
    QuernelError
        If the name is not in ``SPECTRA``: ReLU, GELU and tanh have no integrable Fourier transform.
    """
    if isinstance(activation, Spectrum):
        return activation
    if isinstance(activation, str) and activation in SPECTRA:
        return SPECTRA[activation]
    known = ", ".join(map(repr, SPECTRA))
    raise QuernelError(
        f"activation must be {known} or a Spectrum for universal random features; got {activation!r}. ReLU, GELU, "
        "tanh and their kin have no integrable Fourier transform; use kind='relu'"
    )


def best_damping(s: Floats | float, dim: int) -> Floats:
    """Return the M >= 0 with the smallest second moment of one term.

    Parameters
    ----------
    s : float or array
        pi |xi| |x + w|^2, >= 0.
    dim : int
        Length d of the vectors.

    Returns
    -------
    damping : array, shape of ``s``

    Examples
    --------
    >>> round(float(best_damping(0.5, 16)), 4)
    0.0148
    """
    check_int("dim", dim, low=1)
    value = np.asarray(s, np.float64)
    if not np.isfinite(value).all() or (value < 0).any():
        raise QuernelError(f"s must be pi |xi| |x + w|^2, finite and >= 0; got {s!r}")
    root = np.sqrt((2 * dim - 4 * value) ** 2 + 64 * dim * value)
    return np.maximum(0.0, (4 * value - 2 * dim + root) / (32 * dim))


def second_moment(s: float, dim: int, damping: float) -> float:
    """Return E |Lambda(g, u(w)) Lambda(g, u(x))|^2 of one term, for s = pi |xi| |x + w|^2."""
    wide = 1 + 8 * damping
    log = dim * math.log1p(4 * damping) - dim / 2 * math.log(wide) + 2 * (1 + 4 * damping) * s / wide
    return math.exp(log)


def slopes(frequencies: Floats, damping: Floats | float) -> Floats:
    """Return sqrt((1 + 4M) pi |xi|), by which projections on the directions are multiplied."""
    return np.sqrt((1 + 4 * np.asarray(damping)) * math.pi * np.abs(frequencies))


def log_scales(squared_lengths: Floats, dim: int, damping: Floats | float) -> Floats:
    """Return log of n^-1/2 (1 + 4M)^(d/4) exp(-M |g|^2); squared_lengths: (n,)."""
    m = np.asarray(damping)
    return dim / 4 * np.log1p(4 * m) - m * squared_lengths - math.log(len(squared_lengths)) / 2


def universal_features(scaled: Array, squares: Array, frequencies: Array, log_scale: Array) -> Array:
    """Return the real columns [Re Phi, Im Phi] of the inputs' features.

    Parameters
    ----------
    scaled : Tensor or array, shape (..., n)
        ``slopes * (x @ G.T)``.
    squares : same kind, shape (..., 1)
        ``|x|^2``.
    frequencies, log_scale : same kind, shape (n,)
        As drawn, and from ``log_scales``.

    Returns
    -------
    features : same kind and dtype as ``scaled``, shape (..., 2 n)
    """
    modulus, angle = _polar(as_tensor("scaled", scaled), *_tensors(squares, frequencies, log_scale))
    return like(torch.cat((modulus * angle.cos(), modulus * angle.sin()), dim=-1), scaled)


def universal_weight_features(
    scaled: Array, squares: Array, frequencies: Array, log_scale: Array, ratio: Complex, bias: Array | None = None
) -> Array:
    """Return the real columns [Re Psi, -Im Psi] of weights' features.

    Parameters
    ----------
    scaled, squares, frequencies, log_scale
        As for ``universal_features``, of the rows w of a weight, shapes (l, n), (l, 1), (n,), (n,).
    ratio : array, shape (n,), complex
        F(xi) / p(xi).
    bias : same kind, shape (l,), optional
        b of f(w.x + b).

    Returns
    -------
    features : same kind and dtype as ``scaled``, shape (l, 2 n)
    """
    projections = as_tensor("scaled", scaled)
    squared, xi, scale = _tensors(squares, frequencies, log_scale)
    modulus, angle = _polar(projections, squared, xi, scale)
    factor = torch.as_tensor(ratio, device=projections.device)
    angle = angle + factor.angle().to(angle.dtype)
    modulus = modulus * factor.abs().to(modulus.dtype)
    if bias is not None:
        angle = angle + 2 * math.pi * xi * as_tensor("bias", bias)[:, None]
    return like(torch.cat((modulus * angle.cos(), -modulus * angle.sin()), dim=-1), scaled)


def check_exponents(squares: Array, frequencies: Array, what: str) -> None:
    """Raise if rows are so long that the estimate is noise or overflows: 2 pi |xi| |x + w|^2 could be above 60.

    Inputs and weights are checked apart, each against others as long: neither side alone is above a quarter of that,
    so that |x + w| <= |x| + |w| keeps the sum within it.
    """
    longest, fastest = as_tensor(what, squares).detach(), as_tensor("frequencies", frequencies).detach()
    if longest.numel() == 0 or fastest.numel() == 0:
        return
    exponent = 4 * 2 * math.pi * float(fastest.abs().max()) * float(longest.max())
    if not exponent <= LARGEST_EXPONENT:
        length = math.sqrt(float(longest.max()))
        raise QuernelError(
            f"{what} has rows of length up to {length:.3g}: beside others as long, the variance of universal random "
            f"features grows like exp({exponent:.3g}). Normalise inputs and weights to lengths near 1, or use ReLU "
            "features"
        )


def check_damping(damping: str | float) -> float | None:
    """Return a fixed damping as a float, or None for "auto"."""
    if isinstance(damping, str):
        if damping != "auto":
            raise QuernelError(f'damping must be "auto" or a number >= 0; got {damping!r}')
        return None
    return check_float("damping", damping, low=0.0)


def _tensors(*arrays: Array) -> tuple[Tensor, ...]:
    return tuple(as_tensor("features", array) for array in arrays)


def _polar(scaled: Tensor, squares: Tensor, xi: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return (log_scale + scaled).exp(), xi.sign() * scaled - math.pi * xi * squares
