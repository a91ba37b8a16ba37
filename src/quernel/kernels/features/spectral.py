"""Shift-invariant kernels and the random directions whose cosines estimate them (Bochner's theorem).

    name            kernel                          a direction w, drawn as
    gaussian        exp(-|x-y|_2^2 / s^2)           N(0, 2 / s^2)
    laplacian       exp(-|x-y|_1 / s)               independent Cauchy(0, 1 / s)
    exponential     exp(-|x-y|_2 / s)               g / (|h| s), g ~ N(0, I), h ~ N(0, 1)
    inverse-square  1 / (1 + |x-y|_2^2 / s^2)       sqrt(t) times the one of gaussian, t ~ Exp(1)
    inverse-l2      1 / (1 + |x-y|_2 / s)           t times the one of exponential
    inverse-l1      1 / (1 + |x-y|_1 / s)           t times the one of laplacian

The last three are mixtures, since 1 / (1 + z) = E exp(-t z): one draw of t a direction, and no expansion. With
``fourier_features`` (x @ w^T) the dot products have the kernel as their mean, and every feature vector length 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._validate import check_choice, check_float, check_int

Floats = NDArray[np.float64]
ShiftInvariant = Literal["gaussian", "laplacian", "exponential", "inverse-square", "inverse-l2", "inverse-l1"]
SHIFT_INVARIANT: tuple[ShiftInvariant, ...] = get_args(ShiftInvariant)

_NORM = {"gaussian": "sqeuclidean", "inverse-square": "sqeuclidean", "exponential": "euclidean"}
_NORM |= {"inverse-l2": "euclidean", "laplacian": "cityblock", "inverse-l1": "cityblock"}


def spectral_directions(kernel: ShiftInvariant, n: int, dim: int, *, bandwidth: float = 1.0, seed: Seed) -> Floats:
    """Draw random directions of a kernel.

    Parameters
    ----------
    kernel : str
        One of ``SHIFT_INVARIANT``.
    n, dim : int
        Directions, and the length of each.
    bandwidth : float, default=1.0
        The scale s, in the units of x.
    seed : int, SeedSequence, Generator or None
        What decides the draw.

    Returns
    -------
    directions : array, shape (n, dim), float64

    Raises
    ------
    QuernelError
        If an argument is no good.

    References
    ----------
    Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NIPS 2007.

    Examples
    --------
    >>> spectral_directions("laplacian", 3, 5, seed=0).shape
    (3, 5)
    """
    check_choice("kernel", kernel, SHIFT_INVARIANT)
    check_int("n", n, low=1)
    check_int("dim", dim, low=1)
    check_float("bandwidth", bandwidth, low=0.0, open_low=True)
    draw = generator(seed)
    if _NORM[kernel] == "cityblock":
        rows = draw.standard_cauchy((n, dim))
    else:
        rows = draw.standard_normal((n, dim))
        if _NORM[kernel] == "euclidean":
            rows /= np.abs(draw.standard_normal((n, 1)))
        else:
            rows *= np.sqrt(2.0)
    if kernel.startswith("inverse"):
        mixed = draw.exponential(size=(n, 1))
        rows *= np.sqrt(mixed) if kernel == "inverse-square" else mixed
    return rows / bandwidth


def shift_invariant_kernel(kernel: ShiftInvariant, x: Floats, y: Floats, *, bandwidth: float = 1.0) -> Floats:
    """Return the exact kernel between all rows, float64.

    Parameters
    ----------
    kernel : str
        One of ``SHIFT_INVARIANT``.
    x, y : arrays, shapes (n, d) and (m, d)
    bandwidth : float, default=1.0

    Returns
    -------
    k : array, shape (n, m)

    Examples
    --------
    >>> shift_invariant_kernel("inverse-l1", np.zeros((1, 2)), np.ones((1, 2))).round(4).tolist()
    [[0.3333]]
    """
    check_choice("kernel", kernel, SHIFT_INVARIANT)
    check_float("bandwidth", bandwidth, low=0.0, open_low=True)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise QuernelError(f"x and y must be matrices of equal width; got {a.shape} and {b.shape}")
    z = cdist(a, b, _NORM[kernel])
    z /= bandwidth**2 if _NORM[kernel] == "sqeuclidean" else bandwidth
    return 1 / (1 + z) if kernel.startswith("inverse") else np.exp(-z)
