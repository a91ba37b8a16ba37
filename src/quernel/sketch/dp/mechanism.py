"""Sensitivities, mechanisms and their calibration: what may change between neighbours, and the noise that hides it.

    gaussian   N(0, scale^2) a coordinate         mu = D2 / scale            delta > 0
    laplace    Laplace(scale) a coordinate        epsilon = D1 / scale       delta = 0
    l2gamma    density ~ exp(-|z|_2 / scale)      epsilon = D2 / scale       delta = 0, floating point only

Values are integers (multiples of a grain), noise is discrete. A discrete Gaussian of variance s^2 in lattice steps is,
up to a factor 1 +- 1e-75 a coordinate, a continuous one of variance s^2 - 9 and a randomised rounding of variance 9:
the convolution lemma of Peikert (CRYPTO 2010), as sums of exp(-(z - y)^2 / 18) over integers z depend on y by no
more than 2 exp(-18 pi^2). Rounding is post-processing, so the exact curve of the continuous one holds in any dimension.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from quernel._errors import PrivacyError, QuernelError
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.sketch.dp.calibration import gaussian_delta, gaussian_epsilon, gaussian_sigma, round_up
from quernel.sketch.dp.noise import Integers, NoiseSource

Neighbours = Literal["add_remove", "replace"]
NEIGHBOURS: tuple[Neighbours, ...] = get_args(Neighbours)
Kind = Literal["gaussian", "laplace", "l2gamma"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Variance, in steps of the lattice, that the rounding of the module's docstring takes.
ROUNDING_VARIANCE = 9.0
_ROUNDING = 2.0**-44


@dataclass(frozen=True)
class Sensitivity:
    """The most that a release changes between neighbouring data sets, in steps of its lattice.

    Attributes
    ----------
    l1, l2 : float
        Largest change in L1 and in L2, over all neighbours.
    n_coords : int
        Length of the released vector.
    neighbours : {"add_remove", "replace"}
        What neighbours are: one record more or less, or one record exchanged (then their number is public).
    """

    l1: float
    l2: float
    n_coords: int
    neighbours: Neighbours

    def __post_init__(self) -> None:
        check_float("l1", self.l1, low=0.0, open_low=True)
        check_float("l2", self.l2, low=0.0, open_low=True)
        check_int("n_coords", self.n_coords, low=1)
        check_choice("neighbours", self.neighbours, NEIGHBOURS)

    @classmethod
    def on_lattice(
        cls,
        l1: float,
        l2: float,
        *,
        n_coords: int,
        grain: float,
        neighbours: Neighbours,
        records: int | None = None,
        touched: int | None = None,
    ) -> Sensitivity:
        """Return the sensitivity of integer sums of round(contribution / grain).

        Parameters
        ----------
        l1, l2 : float
            Largest change of the sums before rounding, in units of the contributions.
        n_coords : int
        grain : float
            One step of the lattice. Rounding moves each coordinate of a record by at most half a step.
        neighbours : {"add_remove", "replace"}
        records : int, optional
            Records whose rounding counts; default 1 for "add_remove" and 2 for "replace", 0 where nothing is rounded.
        touched : int, optional
            Coordinates that one record adds to; default all.
        """
        check_float("grain", grain, low=0.0, open_low=True)
        check_choice("neighbours", neighbours, NEIGHBOURS)
        rounded = records if records is not None else 1 + (neighbours == "replace")
        coords = n_coords if touched is None else touched
        # A vector of integers has an integer L1 norm, and an integer square of its L2 norm; what floating point took
        # off an exact bound is put back before rounding down to one.
        first = math.floor((l1 / grain + rounded * coords / 2) * (1 + _ROUNDING))
        second = math.sqrt(math.floor((l2 / grain + rounded * math.sqrt(coords) / 2) ** 2 * (1 + _ROUNDING)))
        return cls(float(first), second, n_coords, neighbours)


@dataclass(frozen=True)
class Mechanism:
    """Noise with its guarantee; what a ledger keeps of a release.

    Attributes
    ----------
    kind : {"gaussian", "laplace", "l2gamma"}
    sensitivity : float
        L2 for "gaussian" and "l2gamma", L1 for "laplace".
    scale : float
        Standard deviation, or the scale of Laplace and Gamma; in the same units.
    n_coords : int
    neighbours : {"add_remove", "replace"}
    discrete : bool, default=True
        Integer noise on integers. False is floating-point noise, whose last bits may leak.
    """

    kind: Kind
    sensitivity: float
    scale: float
    n_coords: int
    neighbours: Neighbours
    discrete: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_float("sensitivity", self.sensitivity, low=0.0, open_low=True)
        check_float("scale", self.scale, low=0.0, open_low=True)
        check_int("n_coords", self.n_coords, low=1)
        check_choice("neighbours", self.neighbours, NEIGHBOURS)
        check_bool("discrete", self.discrete)
        if self.kind == "l2gamma" and self.discrete:
            raise QuernelError("l2gamma noise has no lattice form; it needs discrete=False")
        if self.kind == "gaussian" and self.discrete and self.scale**2 <= ROUNDING_VARIANCE:
            raise QuernelError(
                f"discrete Gaussian noise must be wider than 3 steps of its lattice; got {self.scale:.3g}"
            )

    @property
    def mu(self) -> float | None:
        """D2 over the standard deviation for Gaussian noise, None for the others."""
        if self.kind != "gaussian":
            return None
        return self.sensitivity / _continuous(self.scale, self.discrete)

    @property
    def pure_epsilon(self) -> float | None:
        """Epsilon at delta = 0; None for Gaussian noise, which has none."""
        return None if self.kind == "gaussian" else self.sensitivity / self.scale

    @property
    def rho(self) -> float:
        """Zero-concentrated privacy; recorded beside the totals, never used for them."""
        return (self.mu if self.mu is not None else self.sensitivity / self.scale) ** 2 / 2

    @property
    def std(self) -> float:
        """Standard deviation of the noise in any fixed direction of unit length."""
        if self.kind == "gaussian":
            return self.scale
        return self.scale * (math.sqrt(2.0) if self.kind == "laplace" else math.sqrt(self.n_coords + 1))

    def epsilon(self, delta: float = 0.0) -> float:
        """Return the epsilon of this release alone."""
        check_float("delta", delta, low=0.0, high=1.0, open_high=True)
        mu = self.mu
        return self.sensitivity / self.scale if mu is None else gaussian_epsilon(mu, delta)

    def randomise(self, values: Integers, source: NoiseSource) -> NDArray[Any]:
        """Add noise to released vectors.

        Parameters
        ----------
        values : array of int64, shape (..., n_coords)
            Each vector gets noise of its own.
        source : NoiseSource

        Returns
        -------
        noisy : array of the same shape
            int64, or float64 where the mechanism is not discrete.
        """
        if values.dtype != np.int64 or values.shape[-1:] != (self.n_coords,):
            raise QuernelError(
                f"values must be int64 of shape (..., {self.n_coords}); got {values.dtype} {values.shape}"
            )
        if self.discrete:
            add = source.discrete_gaussian if self.kind == "gaussian" else source.discrete_laplace
            return add(values, self.scale)
        return values + getattr(source, self.kind)(values.shape, self.scale)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def calibrate(
    sensitivity: Sensitivity, epsilon: float, delta: float = 0.0, *, kind: str = "auto", unsafe_float: bool = False
) -> Mechanism:
    """Return the mechanism with the least noise that is (epsilon, delta)-private.

    Parameters
    ----------
    sensitivity : Sensitivity
    epsilon : float
        > 0.
    delta : float, default=0.0
        In [0, 1); Gaussian noise needs a positive one.
    kind : {"auto", "gaussian", "laplace", "l2gamma"}, default="auto"
        "auto" takes the smallest standard deviation among those that are possible.
    unsafe_float : bool, default=False
        Floating-point noise instead of discrete noise. Not for data that matter: the last bits of such a release can
        tell neighbours apart (Mironov, CCS 2012).

    Returns
    -------
    mechanism : Mechanism
        Its scale is rounded up: the guarantee holds for the number as it is.

    Raises
    ------
    PrivacyError
        For Gaussian noise with delta = 0, or l2gamma without ``unsafe_float``.

    Examples
    --------
    >>> mechanism = calibrate(Sensitivity(1000.0, 100.0, 100, "add_remove"), 1.0, 1e-6)
    >>> mechanism.kind, mechanism.epsilon(1e-6) <= 1.0, round(mechanism.scale, 1)
    ('gaussian', True, 422.5)
    """
    check_float("epsilon", epsilon, low=0.0, open_low=True)
    check_float("delta", delta, low=0.0, high=1.0, open_high=True)
    check_choice("kind", kind, ("auto", *KINDS))
    check_bool("unsafe_float", unsafe_float)
    if kind == "gaussian" and delta == 0:
        raise PrivacyError('kind="gaussian" needs delta > 0: Gaussian noise is never purely private; use "laplace"')
    if kind == "l2gamma" and not unsafe_float:
        raise PrivacyError('kind="l2gamma" has no lattice form, so it needs unsafe_float=True; kind="laplace" is exact')
    possible: tuple[str, ...] = (kind,)
    if kind == "auto":
        possible = ("laplace", *(("gaussian",) if delta > 0 else ()), *(("l2gamma",) if unsafe_float else ()))
    made = [_calibrated(one, sensitivity, epsilon, delta, not unsafe_float) for one in possible]
    return min(made, key=lambda mechanism: mechanism.std)


def _calibrated(kind: Any, sensitivity: Sensitivity, epsilon: float, delta: float, discrete: bool) -> Mechanism:
    held = sensitivity.l1 if kind == "laplace" else sensitivity.l2
    if kind == "gaussian":
        sigma = gaussian_sigma(held, epsilon, delta)
        # The extra variance is what makes the exact curve hold on the lattice.
        sigma = math.sqrt(sigma**2 + ROUNDING_VARIANCE) if discrete else sigma
        scale = round_up(sigma, lambda s: gaussian_delta(held / _continuous(s, discrete), epsilon) <= delta)
    else:
        scale = round_up(held / epsilon, lambda s: held / s <= epsilon)
    return Mechanism(kind, held, scale, sensitivity.n_coords, sensitivity.neighbours, discrete)


def _continuous(scale: float, discrete: bool) -> float:
    """Return the standard deviation of the continuous Gaussian of which the mechanism is a rounding."""
    return math.sqrt(scale**2 - ROUNDING_VARIANCE) if discrete else scale
