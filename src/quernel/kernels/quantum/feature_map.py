"""``QuantumFeatureMap``: rows as exact n-qubit states, thousands of times faster than circuit by circuit.

|Phi(x)> = U(x) H U(x) H |0..0>, U(x) = exp(i sum_S phi_S(x) prod_{i in S} Z_i) over single qubits and pairs of them
(arXiv 1804.11326). U is diagonal, so a state is elementwise phases and Walsh-Hadamard transforms: O(n 2^n) a row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_float, check_int
from quernel.kernels.quantum import _export
from quernel.kernels.quantum._states import coupled_pairs, phase_angles, states

Entanglement = Literal["full", "linear", "circular"]
Interactions = Literal["zz", "iqp", "z"]
ENTANGLEMENTS = ("full", "linear", "circular")
INTERACTIONS = ("zz", "iqp", "z")
DTYPES = {"complex64": torch.complex64, "complex128": torch.complex128}
# A state of 20 qubits is 8 MB in complex64.
MOST_QUBITS = 20


class AngleRangeWarning(UserWarning):
    """Rows lie outside (0, 2 pi], where the map repeats itself or turns ever faster."""


@register(
    "quantum-kernels", pillar="kernels", contract="diagnostic", paper="1804.11326", status="stable", headline=False
)
@dataclass(frozen=True)
class QuantumFeatureMap:
    """Encode rows in the states of qubits, one qubit a column, and return all amplitudes.

    Parameters
    ----------
    n_qubits : int, optional
        Columns that rows must have, at most 20; default is whatever they have.
    reps : int, default=2
        Times that Hadamards and phases are applied. With 1 the map is classically trivial.
    entanglement : {"full", "linear", "circular"}, default="full"
        Which pairs interact: all, neighbours, or neighbours and the ends.
    interactions : {"zz", "iqp", "z"}, default="zz"
        phi_ij = (pi - s x_i)(pi - s x_j), the paper's; phi_ij = s^2 x_i x_j; or no pairs. phi_i = s x_i in all.
    scale : float, default=1.0
        Bandwidth s. Kernels of many qubits concentrate at 2^-n unless it shrinks, like 1 / n or faster.
    dtype : {"complex64", "complex128"}, default="complex64"
    margin : float, default=1e-6
        How far beyond [0, 2 pi] rows may lie before it is warned about, as a share of 2 pi; the default is rounding.

    Notes
    -----
    Columns belong into (0, 2 pi]; scale them first, ``sklearn.preprocessing.MinMaxScaler((0, 2 * np.pi))``. Rows
    outside are warned about. A period of 2 pi in x exists without pairs only.

    Qubit i is bit i of an amplitude's index, as in Qiskit. Qiskit's ``zz_feature_map`` gives the complex conjugates up
    to a phase, hence the same kernel; PennyLane's ``IQPEmbedding`` halves every phase and differs from "iqp".

    References
    ----------
    Havlicek et al., "Supervised learning with quantum enhanced feature spaces", arXiv 1804.11326, 2018.

    Examples
    --------
    >>> psi = QuantumFeatureMap().transform([[0.5, 1.0, 2.0], [3.0, 1.0, 6.0]])
    >>> psi.shape, psi.dtype.name, bool(np.allclose(np.linalg.norm(psi, axis=1), 1))
    ((2, 8), 'complex64', True)
    """

    n_qubits: int | None = None
    reps: int = 2
    entanglement: Entanglement = "full"
    interactions: Interactions = "zz"
    scale: float = 1.0
    dtype: Literal["complex64", "complex128"] = "complex64"
    margin: float = 1e-6

    def __post_init__(self) -> None:
        if self.n_qubits is not None:
            check_int("n_qubits", self.n_qubits, low=1, high=MOST_QUBITS)
        check_int("reps", self.reps, low=1)
        check_choice("entanglement", self.entanglement, ENTANGLEMENTS)
        check_choice("interactions", self.interactions, INTERACTIONS)
        check_float("scale", self.scale, low=0.0, open_low=True)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_float("margin", self.margin, low=0.0)

    def transform(self, X: ArrayLike) -> NDArray[np.complexfloating[Any, Any]]:
        """Return the states of the rows of ``X``, shape (N, 2^n).

        Raises
        ------
        QuernelError
            If ``X`` is no finite (N, n) array, or n is not ``n_qubits`` or above 20.

        Warns
        -----
        AngleRangeWarning
            If values lie outside [0, 2 pi] by more than the margin.
        """
        return cast("NDArray[np.complexfloating[Any, Any]]", self.states(self.checked("X", X)).numpy())

    def checked(self, name: str, X: ArrayLike) -> NDArray[np.float64]:
        """Return rows as float64, shape (N, n), after all that ``transform`` asks of them."""
        try:
            x = np.asarray(X, np.float64)
        except (TypeError, ValueError) as error:
            raise QuernelError(f"{name} must be an array of numbers: {error}") from error
        if x.ndim != 2 or x.shape[1] == 0:
            raise QuernelError(f"{name} must have shape (N, n), one qubit a column; got {x.shape}")
        if self.n_qubits is not None and x.shape[1] != self.n_qubits:
            raise QuernelError(f"{name} must have n_qubits={self.n_qubits} columns; got {x.shape[1]}")
        if x.shape[1] > MOST_QUBITS:
            raise QuernelError(
                f"{name} must have at most {MOST_QUBITS} columns, one qubit each; got {x.shape[1]}. "
                "Reduce them first, e.g. by sklearn.decomposition.PCA"
            )
        check_finite(name, x)
        slack = 2 * math.pi * self.margin
        if x.size and not (x.min() >= -slack and x.max() <= 2 * math.pi + slack):
            outside = int(((x < -slack) | (x > 2 * math.pi + slack)).any(1).sum())
            warnings.warn(
                f"{name} reaches from {x.min():.3g} to {x.max():.3g}; angles belong into (0, 2 pi], and {outside} of "
                f"{len(x)} rows lie outside. Scale the columns, e.g. by sklearn.preprocessing.MinMaxScaler((0, 2 * "
                "np.pi)); where they are scaled, these rows are far from those of the training",
                AngleRangeWarning,
                stacklevel=3,
            )
        return x

    def states(self, x: NDArray[np.float64]) -> Tensor:
        """Return the states of checked rows as a tensor."""
        angles = phase_angles(x, self.interactions, self.entanglement, self.scale)
        return states(angles, self.reps, DTYPES[self.dtype])

    def pairs(self, n_qubits: int) -> list[tuple[int, int]]:
        """Return the pairs of qubits that interact."""
        return [] if self.interactions == "z" else coupled_pairs(n_qubits, self.entanglement)

    def to_qiskit(self, n_qubits: int | None = None) -> Any:
        """Return the map as a ``qiskit.QuantumCircuit`` with parameters x[0] .. x[n - 1].

        Parameters
        ----------
        n_qubits : int, optional
            Needed where the map has none.

        Raises
        ------
        MissingExtraError
            If Qiskit is not installed.
        """
        return _export.to_qiskit(self, self._width(n_qubits))

    def to_pennylane(self, n_qubits: int | None = None) -> Callable[..., None]:
        """Return a function ``(x, wires=range(n))`` that queues the gates of one row in PennyLane.

        Wire i is qubit i; PennyLane counts amplitudes with wire 0 as the highest bit, so its state is ours with the
        bits of the index reversed.

        Raises
        ------
        MissingExtraError
            If PennyLane is not installed.
        """
        return _export.to_pennylane(self, self._width(n_qubits))

    def _width(self, n_qubits: int | None) -> int:
        width = self.n_qubits if n_qubits is None else check_int("n_qubits", n_qubits, low=1)
        if width is None or (self.n_qubits is not None and width != self.n_qubits):
            raise QuernelError(
                f"n_qubits must be given, and be that of the map, to make a circuit; got {n_qubits}, "
                f"the map has {self.n_qubits}"
            )
        return width
