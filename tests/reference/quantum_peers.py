"""Kernels by PennyLane and Qiskit, each in a process with its own packages, and our circuits run by them.

``python -m tests.reference.quantum_peers`` computes ``tests/kernels/quantum/peer_kernels.json`` anew: kernels that
PennyLane 0.45.1 and Qiskit 2.6 gave for a few settings.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

PENNYLANE, QISKIT = ("pennylane==0.45.1",), ("qiskit==2.6.2", "qiskit-machine-learning==0.9.1")
RECORDED = Path(__file__).parents[1] / "kernels" / "quantum" / "peer_kernels.json"
ROWS = 4


def settings(largest: int) -> list[dict[str, Any]]:
    """Return every combination of qubits up to the largest, repetitions and coupling."""
    found = itertools.product(range(1, largest + 1), (1, 2, 3), ("full", "linear", "circular"))
    return [{"n": n, "reps": reps, "entanglement": entanglement} for n, reps, entanglement in found]


def rows(n: int) -> np.ndarray:
    """Return some angles, the same in every process."""
    return 2 * np.pi * np.random.default_rng(n).random((ROWS, n))


def pennylane_kernels(cases: list[dict[str, Any]]) -> list[list[list[float]]]:
    """Return kernels from RZ(-2x) and IsingZZ(-2 phi)."""
    import pennylane as qml

    from tests.reference.quantum_kernels import pairs

    def circuit(x: Any, case: dict[str, Any]) -> Any:
        for _ in range(case["reps"]):
            for i in range(case["n"]):
                qml.Hadamard(i)
                qml.RZ(-2 * x[i], i)
            for i, j in pairs(case["n"], case["entanglement"]):
                qml.IsingZZ(-2 * (np.pi - x[i]) * (np.pi - x[j]), wires=[i, j])
        return qml.state()

    kernels = []
    for case in cases:
        node = qml.QNode(circuit, qml.device("default.qubit", wires=case["n"]))
        kernels.append(_kernel([np.asarray(node(x, case)) for x in rows(case["n"])]))
    return kernels


def qiskit_kernels(cases: list[dict[str, Any]]) -> list[list[list[float]]]:
    """Return kernels from Qiskit's own feature map."""
    from qiskit.circuit.library import z_feature_map, zz_feature_map
    from qiskit.quantum_info import Statevector

    kernels = []
    for case in cases:
        n, reps = case["n"], case["reps"]
        own = zz_feature_map(n, reps=reps, entanglement=case["entanglement"]) if n > 1 else z_feature_map(1, reps=reps)
        kernels.append(_kernel([Statevector(own.assign_parameters(x)).data for x in rows(n)]))
    return kernels


def exported_states(package: str, options: dict[str, Any], n: int) -> list[list[list[float]]]:
    """Return states (real, imaginary) of our exported circuit, in our order of amplitudes."""
    from quernel.kernels.quantum import QuantumFeatureMap

    feature_map = QuantumFeatureMap(**options)
    if package == "qiskit":
        from qiskit.quantum_info import Statevector

        circuit = feature_map.to_qiskit(n)
        found = np.array([Statevector(circuit.assign_parameters(x)).data for x in rows(n)])
    else:
        import pennylane as qml

        embed = feature_map.to_pennylane(n)

        @qml.qnode(qml.device("default.qubit", wires=n))
        def node(x: Any) -> Any:
            embed(x)
            return qml.state()

        # All rows in one broadcast call; wire 0 is PennyLane's highest bit.
        found = np.asarray(node(rows(n))).reshape(ROWS, *(2,) * n)
        found = found.transpose(0, *range(n, 0, -1)).reshape(ROWS, -1)
    return [found.real.tolist(), found.imag.tolist()]


def _kernel(states: list[np.ndarray]) -> list[list[float]]:
    psi = np.array(states)
    return (np.abs(psi @ psi.conj().T) ** 2).tolist()


def main() -> None:
    """Record kernels of a few settings."""
    from benchmarks._peers import peer_python
    from benchmarks._process import in_fresh_process

    cases = [case for case in settings(4) if case["n"] > 2 or case["entanglement"] == "full"]
    content: dict[str, Any] = {"settings": cases}
    for name, requirements in (("pennylane", PENNYLANE), ("qiskit", QISKIT)):
        python = peer_python(*requirements)
        content[name] = in_fresh_process(__file__, f"{name}_kernels", cases, python=python)
    RECORDED.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
