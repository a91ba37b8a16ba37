"""``QuantumKernel``: K(x, y) = |<Phi(y) | Phi(x)>|^2 of all pairs by one matrix product; shots and noise on request.

States once a row, then one blocked product: never a circuit a pair. The kernel is positive semi-definite, the
Hilbert-Schmidt product of density matrices. On a device it is the frequency of the all-zero string after U^+(y) U(x):
R shots give Binomial(R, K) / R, unbiased, with variance K (1 - K) / R, and no longer semi-definite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_int, check_probability, check_type
from quernel.kernels.psd import nearest_psd
from quernel.kernels.quantum._gram import squared_overlaps
from quernel.kernels.quantum.feature_map import QuantumFeatureMap

Repair = Literal["clip", "shift", "none"]
REPAIRS = ("clip", "shift", "none")
Matrix = NDArray[np.floating[Any]]
# States of a block of rows that are held at once; beyond it, columns are made again for every block of rows.
_HELD_BYTES = 2**29


@register(
    "quantum-kernels", pillar="kernels", contract="diagnostic", paper="1804.11326", status="stable", headline=False
)
@dataclass(frozen=True)
class QuantumKernel:
    """The kernel of a quantum feature map, exact or as a device would estimate it; callable for ``SVC(kernel=...)``.

    Parameters
    ----------
    feature_map : QuantumFeatureMap, optional
        Default is ``QuantumFeatureMap()``.
    shots : int, optional
        Measurements R an entry; default is the exact kernel.
    noise : float, default=0.0
        Depolarising share l in [0, 1]: K becomes (1 - l) K + l / 2^n before anything is measured.
    psd : {"clip", "shift", "none"}, default="clip"
        How an estimated matrix of rows with themselves is made positive semi-definite: negative eigenvalues to zero,
        the least one added to the diagonal, or not at all. An exact one needs nothing.
    random_state : int, Generator or None, default=None
        Of the shots. With an integer every call draws the same numbers.

    Notes
    -----
    A matrix of rows with themselves (``Y`` left out, or the same object) is symmetric with a diagonal of 1, each pair
    measured once. Clipping changes what a support vector machine sees of new rows too: their kernel belongs projected
    on the eigenvectors that are left, as ``QuantumKernelClassifier`` does, and is not to be clipped by itself.

    References
    ----------
    Havlicek et al., "Supervised learning with quantum enhanced feature spaces", arXiv 1804.11326, 2018.

    Examples
    --------
    >>> kernel = QuantumKernel(QuantumFeatureMap(reps=1, interactions="z"))
    >>> x = np.array([[0.5], [1.5]])
    >>> bool(np.allclose(kernel(x), np.cos(x - x.T) ** 2))
    True
    """

    feature_map: QuantumFeatureMap = field(default_factory=QuantumFeatureMap)
    shots: int | None = None
    noise: float = 0.0
    psd: Repair = "clip"
    random_state: Seed = None

    def __post_init__(self) -> None:
        check_type("feature_map", self.feature_map, QuantumFeatureMap)
        if self.shots is not None:
            check_int("shots", self.shots, low=1)
        check_probability("noise", self.noise)
        check_choice("psd", self.psd, REPAIRS)
        generator(self.random_state, "random_state")

    def __call__(self, X: ArrayLike, Y: ArrayLike | None = None) -> Matrix:
        """Return the kernel of all pairs of rows.

        Parameters
        ----------
        X, Y : array, shapes (N, n) and (M, n)
            Angles in (0, 2 pi]; ``Y`` defaults to ``X``.

        Returns
        -------
        K : array, shape (N, M)
            float32, or float64 for complex128 states.
        """
        k = self.estimate(X, None if Y is X else Y)
        if self.shots is None or (Y is not None and Y is not X):
            return k
        return repaired(k, self.psd)

    def estimate(self, X: ArrayLike, Y: ArrayLike | None = None) -> Matrix:
        """Return the kernel before any repair: exact, or with its noise and shots."""
        k = self.exact(X, Y)
        if self.noise:
            k *= 1.0 - self.noise
            k += self.noise * 2.0 ** -np.shape(X)[1]
        if self.shots is not None:
            draw = generator(self.random_state, "random_state")
            if Y is None:
                upper = np.triu_indices(len(k), 1)
                k[upper] = draw.binomial(self.shots, k[upper]) / self.shots
                k.T[upper] = k[upper]
            else:
                k[:] = draw.binomial(self.shots, k) / self.shots
        if Y is None:
            np.fill_diagonal(k, 1.0)
        return k

    def exact(self, X: ArrayLike, Y: ArrayLike | None = None) -> Matrix:
        """Return |<Phi(y) | Phi(x)>|^2 itself."""
        rows = self.feature_map.checked("X", X)
        columns = None if Y is None else self.feature_map.checked("Y", Y)
        if columns is not None and columns.shape[1] != rows.shape[1]:
            raise QuernelError(f"Y must have {rows.shape[1]} columns like X; got {columns.shape[1]}")
        return cast(Matrix, self._blocks(rows, columns).numpy())

    def _blocks(self, rows: NDArray[np.float64], columns: NDArray[np.float64] | None) -> Tensor:
        states = self.feature_map.states
        itemsize = np.dtype(self.feature_map.dtype).itemsize
        step = max(1, _HELD_BYTES // (itemsize << rows.shape[1]))
        other = rows if columns is None else columns
        if max(len(rows), len(other)) <= step:
            return squared_overlaps(states(rows), None if columns is None else states(columns))
        out = torch.empty(len(rows), len(other), dtype=torch.float32 if itemsize == 8 else torch.float64)
        for i in range(0, len(rows), step):
            left = states(rows[i : i + step])
            for j in range(i if columns is None else 0, len(other), step):
                if columns is None and i == j:
                    out[i : i + step, j : j + step] = squared_overlaps(left)
                    continue
                found = squared_overlaps(left, states(other[j : j + step]))
                out[i : i + step, j : j + step] = found
                if columns is None:
                    out[j : j + step, i : i + step] = found.T
        return out


def repaired(k: Matrix, how: Repair) -> Matrix:
    """Return an estimated matrix made positive semi-definite."""
    if how == "clip":
        return nearest_psd(k)
    if how == "shift":
        least = float(np.linalg.eigvalsh(k.astype(np.float64))[0])
        return k - min(least, 0.0) * np.eye(len(k), dtype=k.dtype)
    return k


def positive_projector(k: Matrix) -> NDArray[np.float64]:
    """Return the projector P on the eigenvectors of positive eigenvalues: P K is K clipped."""
    values, vectors = np.linalg.eigh(k.astype(np.float64))
    kept = vectors[:, values > 0]
    return np.asarray(kept @ kept.T)
