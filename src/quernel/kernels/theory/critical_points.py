"""The critical initialisation of any activation: variances at which signals and gradients neither grow nor vanish.

Critical is where both susceptibilities are 1 at a fixed point K* of the kernel recursion (g = <s^2>):

    g'(K*) = <s'^2>_(K*),    C_W = 1 / <s'^2>_(K*),    C_b = K* - C_W g(K*) >= 0.

Activations fall into classes. *Scale-invariant* (ReLU): every K is fixed. *K zero* (tanh): s(0) = 0 and
a1 = s3/s1 + (3/4)(s2/s1)^2 < 0, with s_p the p-th derivative at 0; K falls like 1 / (-a1 l). *Half-stable* (GELU):
K* > 0, approached from one side. *None* (sigmoid). With a skip connection z' = c z + W s(z) + b both variances are
(1 - c^2) times as large, at the same K*.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import nn

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.kernels.theory.activations import Activation, Function, as_activation
from quernel.kernels.theory.averages import averages, mean_square

# Where a fixed point K* > 0 is looked for; (3 + 17^.5) / 2 for GELU, 14.3 for SiLU.
_KERNELS = (1e-3, 300.0, 160)
# g' is read off s^2 (z^2 - K), which cancels: below this share of its terms it is noise (sin beyond K = 15).
_NOISE = 1e-10
# One-sided derivatives at 0: a polynomial through s' on a short interval; no higher autograd is needed.
_NODES, _DEGREE, _INTERVALS, _FIT = 24, 10, (0.1, 0.01, 0.001), 1e-10
_SAME = 1e-6


class Universality(enum.StrEnum):
    """How the kernel of a critical network behaves with depth."""

    SCALE_INVARIANT = "scale-invariant"
    K_ZERO = "K*=0"
    HALF_STABLE = "half-stable"
    NONE = "none"


@dataclass(frozen=True)
class Criticality:
    """The critical point of an activation, and how fluctuations grow there.

    Parameters
    ----------
    activation : str
    cls : Universality
    C_W, C_b : float or None
        Variances: of a weight times its fan-in, and of a bias. None in class "none".
    K_star : float or None
        Fixed point of the kernel; None where every K is fixed, and in class "none".
    p_perp : float or None
        chi_perp = 1 - p_perp / l in layer l: what learning rates must make up for. None where there is no such power.
    nu : float or None
        V / K^2 grows by this much a layer (class K*=0: on the long run); seeds differ by a relative variance of
        nu depth / width. None where there is no such rate.
    stable : bool
        Whether kernels that are larger, or lie on the stable side, come back to K*.
    drift : float or None
        K' - K = drift (K - K*)^2 near K* > 0; for K* = 0 it is a1, and K' - K = a1 K^2.
    residual : float
        c of the skip connection z' = c z + W s(z) + b that this is for.
    note : str
        What is particular.
    alternative : Criticality or None
        Of a half-stable activation with s(0) = 0: the choice at K* = 0, which small signals leave.
    """

    activation: str
    cls: Universality
    C_W: float | None = None
    C_b: float | None = None
    K_star: float | None = None
    p_perp: float | None = None
    nu: float | None = None
    stable: bool = False
    drift: float | None = None
    residual: float = 0.0
    note: str = ""
    alternative: Criticality | None = None

    def variances(self) -> tuple[float, float]:
        """Return (C_W, C_b), or raise a ``QuernelError`` that says why there are none."""
        if self.C_W is None or self.C_b is None:
            raise QuernelError(f"activation {self.activation!r} has no critical initialisation. {self.note}")
        return self.C_W, self.C_b

    def first_kernel(self, input_power: float = 1.0) -> float:
        """Return K^1 of ``critical_init_``: K* where that is > 0, else C_b + C_W |x|^2 / n_0."""
        weight, bias = self.variances()
        return self.K_star or bias + weight * input_power

    def fluctuation(self, layer: int, width: int) -> float:
        """Return V / (width K^2) in a layer, the relative variance of K over seeds: (1 + nu / width)^(layer - 1) - 1.

        Exact for scale-invariant networks without skip connections, closer than the leading order nu (layer - 1) /
        width at a K* > 0; for K* = 0 the leading order itself.
        """
        check_int("layer", layer, low=1)
        check_int("width", width, low=1)
        if self.nu is None:
            raise QuernelError(f"activation {self.activation!r} has no rate nu; take four_vertex. {self.note}")
        if self.cls is Universality.K_ZERO:
            return self.nu * (layer - 1) / width
        return float(np.expm1((layer - 1) * np.log1p(self.nu / width)))


@dataclass(frozen=True)
class _Side:
    """Values at 0 from one side: of s and its first three derivatives."""

    value: float
    first: float
    second: float
    third: float


def criticality(activation: str | Function | nn.Module | Activation, *, residual: float = 0.0) -> Criticality:
    """Return the critical initialisation of an activation, found by quadrature and autograd.

    Parameters
    ----------
    activation : str, callable or nn.Module
        A name of ``ACTIVATIONS``, or any elementwise function of tensors.
    residual : float, default=0.0
        c of a skip connection z' = c z + W s(z) + b, in [0, 1).

    Returns
    -------
    critical : Criticality

    Raises
    ------
    QuernelError
        If the activation cannot be called, does not act elementwise, is not finite between -20 and 20 or has no
        autograd; if ``residual`` is outside [0, 1).

    Notes
    -----
    Some milliseconds. K* > 0 is looked for between 0.001 and 300, the first fixed point counts.

    References
    ----------
    Roberts, Yaida and Hanin, "The Principles of Deep Learning Theory", arXiv 2106.10165, 2021, chapter 5.

    Examples
    --------
    >>> gelu = criticality(torch.nn.GELU())
    >>> str(gelu.cls), round(gelu.C_W, 4), round(gelu.C_b, 4), round(gelu.K_star, 4)
    ('half-stable', 1.9831, 0.1729, 3.5616)
    """
    c = check_float("residual", residual, low=0.0, high=1.0, open_high=True)
    return _found(as_activation(activation), c)


@functools.lru_cache(maxsize=256)
def _found(act: Activation, c: float) -> Criticality:
    if act.slopes is not None and any(act.slopes):
        return _scale_invariant(act, c)
    left, right = _side(act, -1), _side(act, 1)
    at_zero = None
    if max(abs(left.value), abs(right.value)) < _SAME < max(abs(left.first), abs(right.first)):
        at_zero = _zero(act, left, right, c)
        if at_zero.stable:
            return at_zero
    kernel = _fixed_point(act)
    if kernel is not None:
        return replace(_half_stable(act, kernel, c), alternative=at_zero)
    why = "The two susceptibilities are never 1 together"
    if at_zero is not None:
        why += f", but at K = 0 (C_W = {at_zero.C_W:.6g}, C_b = 0), which signals leave"
    note = f"{why}. Take tanh, relu, gelu or silu, or subtract from it its value at 0."
    return Criticality(act.name, Universality.NONE, residual=c, note=note, alternative=at_zero)


def _scale_invariant(act: Activation, c: float) -> Criticality:
    slopes = act.slopes or (0.0, 0.0)
    second = sum(a**2 for a in slopes) / 2
    return Criticality(
        act.name,
        Universality.SCALE_INVARIANT,
        C_W=(1 - c**2) / second,
        C_b=0.0,
        p_perp=0.0,
        nu=_growth(act, 1.0, c),
        stable=True,
        residual=c,
        note="Every K is a fixed point: signals keep the scale of the inputs.",
    )


def _half_stable(act: Activation, kernel: float, c: float) -> Criticality:
    found = averages(act, torch.tensor(kernel, dtype=torch.float64))
    weight = 1 / float(found.slope_square)
    drift = weight * float(found.square_bend) / 2
    side = "above" if drift < 0 else "below"
    return Criticality(
        act.name,
        Universality.HALF_STABLE,
        C_W=(1 - c**2) * weight,
        C_b=(1 - c**2) * max(kernel - weight * float(found.square), 0.0),
        K_star=kernel,
        p_perp=0.0,
        nu=_growth(act, kernel, c),
        stable=True,
        drift=(1 - c**2) * drift,
        residual=c,
        note=f"K* = {kernel:.4g} attracts from {side} only, and slowly: scale the first layer so that K^1 = K*.",
    )


def _zero(act: Activation, left: _Side, right: _Side, c: float) -> Criticality:
    """Return the choice at K* = 0; ``stable`` says whether small signals stay small."""
    second = (left.first**2 + right.first**2) / 2
    zero = Criticality(act.name, Universality.K_ZERO, C_W=(1 - c**2) / second, C_b=0.0, K_star=0.0, residual=c)
    smooth = abs(left.first - right.first) < _SAME and abs(left.second - right.second) < _SAME
    s1, s2, s3 = ((getattr(left, p) + getattr(right, p)) / 2 for p in ("first", "second", "third"))
    a1 = s3 / s1 + 0.75 * (s2 / s1) ** 2 if smooth else None
    if a1 is not None and abs(a1) > _SAME:
        ratio = (s3 / s1 + (s2 / s1) ** 2) / a1
        zero = replace(zero, drift=(1 - c**2) * a1, stable=a1 < 0, p_perp=ratio if a1 < 0 else None)
        if a1 < 0:
            note = f"K falls like {1 / (-(1 - c**2) * a1):.4g} / l with depth, so gradients fall by powers, not more."
            return replace(zero, nu=2 / 3 * (1 - c**4), note=note)
        return replace(zero, note="Signals grow away from K = 0.")
    # Not smooth, or no curvature at 0: whether K falls is read off the recursion itself.
    few = torch.tensor([0.003, 0.03, 0.3, 1.0], dtype=torch.float64)
    falls = bool((mean_square(act, few) <= second * few * (1 + 1e-12)).all())
    what = "Not smooth at 0" if not smooth else "No curvature at 0"
    how = "K falls, but not like 1 / l" if falls else "signals grow away from K = 0"
    return replace(zero, stable=falls, note=f"{what}, so that a1, p_perp and nu do not exist; {how}.")


def _growth(act: Activation, kernel: float, c: float) -> float:
    """Return by how much V / K^2 grows a layer at chi = 1; with a skip connection, T has come to its fixed point."""
    a = averages(act, torch.tensor(kernel, dtype=torch.float64))
    weight = (1 - c**2) / float(a.slope_square)
    drawn = 2 * c**2 * weight * float(a.joint - kernel * a.square) + weight**2 * float(a.fourth - a.square**2)
    odd = c * weight * kernel * float(a.tilt) / (1 - c)
    return (drawn + 2 * weight * float(a.tilt) * odd) / kernel**2


def _fixed_point(act: Activation) -> float | None:
    """Return the first K > 0 with g' = <s'^2> at which C_b is not negative."""
    low, high, count = _KERNELS
    grid = torch.logspace(np.log10(low), np.log10(high), count, dtype=torch.float64)
    found = averages(act, grid)
    gap = found.square_slope - found.slope_square
    sure = gap.isfinite() & (found.square_slope.abs() > _NOISE * found.noise) & (found.edge < _NOISE)
    changes = (gap[:-1] * gap[1:] < 0) & sure[:-1] & sure[1:]
    for i in torch.nonzero(changes)[:, 0].tolist():
        kernel = float(brentq(functools.partial(_gap, act), float(grid[i]), float(grid[i + 1]), xtol=1e-12))
        here = averages(act, torch.tensor(kernel, dtype=torch.float64))
        if float(here.slope_square) > 0 and kernel >= float(here.square / here.slope_square):
            return kernel
    return None


def _gap(act: Activation, kernel: float) -> float:
    found = averages(act, torch.tensor(kernel, dtype=torch.float64))
    return float(found.square_slope - found.slope_square)


def _side(act: Activation, sign: int) -> _Side:
    """Return one-sided derivatives at 0, on the longest interval over which s and s' are polynomials."""
    x = (1 - np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)) / 2  # (24,) in 0..1
    for reach in _INTERVALS:
        z = torch.from_numpy(sign * reach * x)
        fits = []
        for values in (act(z).numpy(), act.slope(z).numpy()):
            fit = np.polynomial.Chebyshev.fit(x, values, _DEGREE, domain=[0.0, 1.0])
            fits.append((fit, float(np.abs(fit(x) - values).max()) <= _FIT * (1 + float(np.abs(values).max()))))
        if all(fine for _, fine in fits):
            break
    (value, _), (slope, _) = fits
    step = sign * reach
    return _Side(
        float(value(0.0)), float(slope(0.0)), float(slope.deriv(1)(0.0)) / step, float(slope.deriv(2)(0.0)) / step**2
    )
