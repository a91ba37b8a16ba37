"""Circuits of a feature map for Qiskit and PennyLane: the same unitary in their gates, to be run on devices.

RZ(t) = e^(-i t Z / 2) in both, so a phase phi is RZ(-2 phi), and RZZ(-2 phi) for a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quernel._errors import MissingExtraError

if TYPE_CHECKING:
    from quernel.kernels.quantum.feature_map import QuantumFeatureMap


def to_qiskit(feature_map: QuantumFeatureMap, n_qubits: int) -> Any:
    """Return a ``QuantumCircuit`` with a ``ParameterVector`` x."""
    try:
        from qiskit import QuantumCircuit
        from qiskit.circuit import ParameterVector
    except ImportError as error:
        raise MissingExtraError("QuantumFeatureMap.to_qiskit", "quantum") from error
    circuit = QuantumCircuit(n_qubits)
    x = ParameterVector("x", n_qubits)
    for _ in range(feature_map.reps):
        circuit.h(range(n_qubits))
        for i in range(n_qubits):
            circuit.rz(-2 * feature_map.scale * x[i], i)
        for i, j in feature_map.pairs(n_qubits):
            circuit.rzz(-2 * _factor(feature_map, x[i]) * _factor(feature_map, x[j]), i, j)
    return circuit


def to_pennylane(feature_map: QuantumFeatureMap, n_qubits: int) -> Callable[..., None]:
    """Return a quantum function of a row; a batch of rows, shape (N, n), is broadcast."""
    try:
        import pennylane as qml
    except ImportError as error:
        raise MissingExtraError("QuantumFeatureMap.to_pennylane", "quantum") from error

    def embed(x: Any, wires: Sequence[Any] = range(n_qubits)) -> None:
        for _ in range(feature_map.reps):
            for wire in wires:
                qml.Hadamard(wire)
            for i, wire in enumerate(wires):
                qml.RZ(-2 * feature_map.scale * x[..., i], wire)
            for i, j in feature_map.pairs(n_qubits):
                angle = _factor(feature_map, x[..., i]) * _factor(feature_map, x[..., j])
                qml.IsingZZ(-2 * angle, wires=[wires[i], wires[j]])

    return embed


def _factor(feature_map: QuantumFeatureMap, x: Any) -> Any:
    """Return a qubit's factor of its pairs' angles."""
    return math.pi - feature_map.scale * x if feature_map.interactions == "zz" else feature_map.scale * x
