"""Where noise comes from: the operating system, through OpenDP's exact samplers; a seed only for tests.

Discrete Gaussian and discrete Laplace noise on 64-bit integers is drawn by OpenDP (exact rational arithmetic, no
floating point that could leak). Floating-point noise, from 53 bits of the system's generator through an inverse
distribution function, exists for comparisons and for mechanisms without a lattice form; its last bits are not private.
A ``NoiseSource`` with a seed is INSECURE: whoever knows the seed subtracts the noise. It makes tests repeatable.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri

from quernel._errors import MissingExtraError, QuernelError
from quernel._random import generator
from quernel._validate import check_int

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# Integers handed to OpenDP at a time: as Python objects they take 32 bytes each.
_CHUNK = 2**18
# Beyond this a sum of an integer and its noise could leave int64; OpenDP would saturate, which is private but wrong.
LARGEST = 2.0**61


class NoiseSource:
    """Draws noise, from the operating system unless a seed is given.

    Parameters
    ----------
    insecure_seed : int, optional
        Makes the noise repeatable and the release worthless as protection.
    """

    def __init__(self, insecure_seed: int | None = None) -> None:
        if insecure_seed is not None:
            check_int("insecure_noise_seed", insecure_seed, low=0)
        self._draw = None if insecure_seed is None else generator(insecure_seed)

    @property
    def insecure(self) -> bool:
        """Whether the noise can be drawn again."""
        return self._draw is not None

    def check(self) -> None:
        """Raise ``MissingExtraError`` now if discrete noise cannot be drawn here."""
        if not self.insecure:
            _opendp()

    def discrete_gaussian(self, values: Integers, scale: float) -> Integers:
        """Return integers plus noise of P(k) ~ exp(-k^2 / (2 scale^2))."""
        if self._draw is None:
            return _through_opendp("make_gaussian", "l2_distance", "f64", values, scale)
        # Rounding a Gaussian many integers wide differs from the discrete one by less than any test can see.
        return values + np.rint(self._draw.standard_normal(values.shape) * scale).astype(np.int64)

    def discrete_laplace(self, values: Integers, scale: float) -> Integers:
        """Return integers plus noise of P(k) ~ exp(-|k| / scale)."""
        if self._draw is None:
            return _through_opendp("make_laplace", "l1_distance", "i64", values, scale)
        # The difference of two geometric variables.
        success = -np.expm1(-1 / scale)
        first, second = (self._draw.geometric(success, values.shape) for _ in range(2))
        return values + (first - second)

    def gaussian(self, shape: tuple[int, ...], scale: float) -> Floats:
        """Return floating-point Gaussian noise."""
        return np.asarray(ndtri(self._uniform(shape)) * scale, np.float64)

    def laplace(self, shape: tuple[int, ...], scale: float) -> Floats:
        """Return floating-point Laplace noise."""
        centred = self._uniform(shape) - 0.5
        return np.asarray(-scale * np.sign(centred) * np.log1p(-2 * np.abs(centred)), np.float64)

    def l2gamma(self, shape: tuple[int, ...], scale: float) -> Floats:
        """Return vectors along the last axis of density ~ exp(-|z|_2 / scale): a Gamma radius, a uniform direction."""
        direction = self.gaussian(shape, 1.0)
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        radius = gammaincinv(shape[-1], self._uniform((*shape[:-1], 1))) * scale
        return np.asarray(radius * direction, np.float64)

    def _uniform(self, shape: tuple[int, ...]) -> Floats:
        """Return numbers strictly within (0, 1), from 53 random bits each."""
        size = int(np.prod(shape))
        if self._draw is None:
            bits = np.frombuffer(os.urandom(8 * size), np.uint64) >> np.uint64(11)
        else:
            bits = self._draw.integers(0, 2**53, size, dtype=np.uint64)
        return (bits.astype(np.float64) * 2.0**-53 + 2.0**-54).reshape(shape)


@functools.cache
def _opendp() -> Any:
    try:
        package = importlib.import_module("opendp.prelude")
    except ImportError as error:
        raise MissingExtraError("exact discrete noise (OpenDP)", "dp") from error
    # OpenDP asks for this by name: its constructors count as contributed code. Numbers do not change.
    package.enable_features("contrib")
    return package


def _through_opendp(maker: str, metric: str, distance: str, values: Integers, scale: float) -> Integers:
    if not scale < LARGEST or (values.size and float(np.abs(values).max()) > LARGEST):
        raise QuernelError(f"the release or its noise (scale {scale:.3g}) does not fit into 64-bit integers")
    package = _opendp()
    space = package.vector_domain(package.atom_domain(T="i64")), getattr(package, metric)(T=distance)
    measurement = getattr(package.m, maker)(*space, scale)
    flat = values.ravel()
    noisy = np.empty(flat.size, np.int64)
    for start in range(0, flat.size, _CHUNK):
        noisy[start : start + _CHUNK] = measurement(flat[start : start + _CHUNK].tolist())
    return noisy.reshape(values.shape)
