"""``permutation_moments``: what an infinite ensemble trained on k basis vectors says about sums of them.

Trained are e_i -> P e_i, one hidden layer of ReLUs, no biases. The input is x / |x| for x in {0, 1}^k with m ones. With

    d = 1                      the NTK between equal rows
    a = [k1(u) + u k0(u)] / 2  between x and a basis vector in it, u = 1 / sqrt(m)
    b = 1 / (2 pi)             between x and a basis vector outside it
    k1(u) = (sqrt(1-u^2) + u (pi - acos u)) / pi,   k0(u) = (pi - acos u) / pi

all over k, the inverse of the kernel is [I - b/(d+(k-1)b) 11^T] / (d-b), hence two means: of coordinates that should be
1 and of those that should be 0. In the standard parametrisation the NNGP kernel takes the place of the NTK (d = 1/2,
a = k1(u)/2). The variance is the same for every coordinate. Cost: a few operations a pair (k, m).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_int
from quernel.kernels.ntk.kernel import PARAMETRIZATIONS, Parametrization

Doubles = NDArray[np.float64]
# Kernel between two basis vectors, times k: both kinds.
APART = 1 / (2 * np.pi)


@dataclass(frozen=True)
class PermutationMoments:
    """Means of coordinates that should be 1 (``mean_on``) and 0 (``mean_off``), and the variance of one network."""

    mean_on: Doubles
    mean_off: Doubles
    variance: Doubles


@dataclass(frozen=True)
class BasisKernels:
    """Kernels, times k, between a basis vector and itself, and between it and a normalised input that holds it."""

    own: float
    inside: Doubles

    def weights(self, k: int, ones: Doubles) -> tuple[Doubles, Doubles]:
        """Return the entries of Th(x, X) Th(X, X)^-1 for training vectors in the input and outside it."""
        rest = self.own + (k - 1) * APART
        # Written so that both are exact for one of the training vectors, where inside = own.
        excess = ones * (self.inside - APART) - (self.own - APART)
        off = -APART / (self.own - APART) * excess / rest
        return (self.inside - APART) / (self.own - APART) + off, off


def permutation_moments(
    k: int, ones: ArrayLike | None = None, *, parametrization: Parametrization = "ntk"
) -> PermutationMoments:
    """Return means and variance of the outputs of networks that have learned a permutation of k bits.

    Parameters
    ----------
    k : int
        Bits, >= 2.
    ones : array of int, any shape, optional
        How many bits of the input are set, 1 to k; default is every number, shape (k,).
    parametrization : {"ntk", "standard"}, default="ntk"
        See ``NTKernel``.

    Returns
    -------
    moments : PermutationMoments
        Arrays of the shape of ``ones``.

    Raises
    ------
    QuernelError
        If ``k`` is below 2 or a number of ones is not in 1 to k.

    References
    ----------
    "Exact learning of permutations for nonzero binary inputs", arXiv 2502.16763; closed forms derived here.

    Examples
    --------
    >>> moments = permutation_moments(5, 2)
    >>> [round(float(v), 4) for v in (moments.mean_on, moments.mean_off, moments.variance)]
    [0.5606, -0.0146, 0.0132]
    """
    check_int("k", k, low=2)
    given = np.arange(1, k + 1) if ones is None else np.asarray(ones)
    if given.dtype.kind not in "iu" or given.size == 0 or given.min() < 1 or given.max() > k:
        raise QuernelError(f"ones must be integers in [1, {k}]; got {ones!r}")
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    m: Doubles = given.astype(np.float64)
    nngp, trained = basis_kernels(m, "standard"), basis_kernels(m, parametrization)
    on, off = trained.weights(k, m)
    total, squares = m * on + (k - m) * off, m * on**2 + (k - m) * off**2
    known = m * on * nngp.inside + (k - m) * off * APART
    variance = nngp.own + (nngp.own - APART) * squares + APART * total**2 - 2 * known
    # A training vector is known exactly; what rounding leaves there may be below 0.
    return PermutationMoments(on, off, np.where(m == 1, 0.0, np.maximum(variance, 0.0)) / k)


def basis_kernels(ones: Any, parametrization: Parametrization) -> BasisKernels:
    """Return the kernels between basis vectors and normalised inputs with so many ones."""
    m = np.asarray(ones, np.float64)
    cosine, sine = 1 / np.sqrt(m), np.sqrt((m - 1) / m)
    share = 1 - np.arctan2(sine, cosine) / np.pi
    first = sine / np.pi + cosine * share
    return (
        BasisKernels(0.5, first / 2)
        if parametrization == "standard"
        else BasisKernels(1.0, (first + cosine * share) / 2)
    )
