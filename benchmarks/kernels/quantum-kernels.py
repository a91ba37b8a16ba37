"""Quantum kernels: whole matrices against simulators that run circuits, and against the product of ready states.

PennyLane's way of a kernel is a circuit a pair, so a few pairs stand against our whole matrix: its target says that we
are 10,000 times faster a pair. Qiskit's statevector kernel makes a state a row by gates, and loops over pairs. The last
peer of the first case is what a user of PennyLane can do by hand: all states in one broadcast call, and a product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.linalg import hadamard

from benchmarks import _machine
from benchmarks._process import in_fresh_process, resident_bytes
from benchmarks._runner import Case, Isolated, allowed
from quernel.kernels.quantum import QuantumFeatureMap, QuantumKernel

PENNYLANE = ("pennylane==0.45.1",)
QISKIT = ("qiskit==2.6.2", "qiskit-machine-learning==0.9.1")
SIDE = 3  # PennyLane's kernel of 3 rows with 3 others
LIMIT_MS, LARGE_LIMIT_S = 100.0, 12.0


def angles(rows: int, n: int) -> np.ndarray:
    return 2 * np.pi * np.random.default_rng(0).random((rows, n))


def kernel(rows: int, n: int) -> SimpleNamespace:
    states = QuantumFeatureMap().transform(angles(rows, n))
    return SimpleNamespace(x=angles(rows, n), n=n, kernel=QuantumKernel(), states=states)


def dense_states(x: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    z = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    theta = x @ z.T
    for i in range(n):
        for j in range(i + 1, n):
            theta = theta + ((np.pi - x[:, i]) * (np.pi - x[:, j]))[:, None] * (z[:, i] * z[:, j])
    turn, h = np.exp(1j * theta), hadamard(2**n) / 2 ** (n / 2)
    return (turn * 2 ** (-n / 2)) @ h * turn


def entries_are_right(s: SimpleNamespace) -> None:
    k = s.kernel(s.x)
    rows = np.random.default_rng(1).choice(len(s.x), 16, replace=False)
    psi = dense_states(s.x[rows]) if s.n < 11 else QuantumFeatureMap(dtype="complex128").transform(s.x[rows])
    np.testing.assert_allclose(k[np.ix_(rows, rows)], np.abs(psi @ psi.conj().T) ** 2, atol=1e-5)


def large_is_right(s: SimpleNamespace) -> None:
    start = time.perf_counter()
    s.kernel(s.x)
    seconds = time.perf_counter() - start
    if seconds > LARGE_LIMIT_S:
        raise ValueError(f"{seconds:.1f} s are more than {LARGE_LIMIT_S} s")
    entries_are_right(s)
    s.peak = in_fresh_process(Path(__file__), "peak_bytes", len(s.x), s.n, threads=2)
    if s.peak > 2 * s.states.nbytes:
        raise ValueError(f"{s.peak / 1e6:.0f} MB are more than twice the states' {s.states.nbytes / 1e6:.0f}")


def peak_bytes(rows: int, n: int) -> int:
    """Return what a kernel adds to the resident memory at most."""
    x = angles(rows, n)
    QuantumKernel()(x[:8])  # compiled kernels and thread pools are no part of it
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    before = resident_bytes()
    QuantumKernel()(x)
    return resident_bytes("VmHWM") - before


def product(s: SimpleNamespace) -> np.ndarray:
    return np.abs(s.states @ s.states.conj().T) ** 2


def bound(rows: int, n: int, state: Any, threads: int) -> float:
    # Real and imaginary part of half of the pairs.
    return 4 * rows**2 * 2**n / (_machine.FLOAT32_OPS * threads) * 1e3


def pennylane_pairs(side: int, n: int) -> Callable[[], Any]:
    import pennylane as qml

    embed = QuantumFeatureMap().to_pennylane(n)

    @qml.qnode(qml.device("lightning.qubit", wires=n))
    def overlap(x: Any, y: Any) -> Any:
        embed(x)
        qml.adjoint(embed)(y)
        return qml.probs(wires=range(n))

    x = angles(2 * side, n)
    return lambda: qml.kernels.kernel_matrix(x[:side], x[side:], lambda a, b: overlap(a, b)[0])


def pennylane_broadcast(rows: int, n: int) -> Callable[[], Any]:
    import pennylane as qml

    embed = QuantumFeatureMap().to_pennylane(n)

    @qml.qnode(qml.device("default.qubit", wires=n))
    def states(x: Any) -> Any:
        embed(x)
        return qml.state()

    x = angles(rows, n)

    def matrix() -> np.ndarray:
        psi = np.asarray(states(x))
        return np.abs(psi @ psi.conj().T) ** 2

    return matrix


def qiskit_kernel(rows: int, n: int) -> Callable[[], Any]:
    from qiskit.circuit.library import zz_feature_map
    from qiskit_machine_learning.kernels import FidelityStatevectorKernel

    x = angles(rows, n)
    theirs = FidelityStatevectorKernel(feature_map=zz_feature_map(n, reps=2, entanglement="full"))
    return lambda: theirs.evaluate(x)


_BOUND = "half of 8 N^2 2^n operations at the speed of a float32 matrix product"
_PAIRS = f"PennyLane lightning, {SIDE**2} pairs"

CASES = [
    Case(
        name="400 x 400 kernel, 8 qubits",
        setup=partial(kernel, 400, 8),
        ours=lambda s: s.kernel(s.x),
        peers={
            _PAIRS: Isolated("pennylane_pairs", SIDE, 8, requires=PENNYLANE),
            "PennyLane, broadcast states and a product": Isolated("pennylane_broadcast", 400, 8, requires=PENNYLANE),
            f"{LIMIT_MS:.0f} ms": allowed(LIMIT_MS * 1e-3),
        },
        gate=entries_are_right,
        target={_PAIRS: round(1e4 * SIDE**2 / (400 * 399 / 2), 2), f"{LIMIT_MS:.0f} ms": 1.0},
        bound_ms=partial(bound, 400, 8),
        bound=_BOUND,
    ),
    Case(
        name="100 x 100 kernel, 8 qubits",
        setup=partial(kernel, 100, 8),
        ours=lambda s: s.kernel(s.x),
        peers={"Qiskit FidelityStatevectorKernel": Isolated("qiskit_kernel", 100, 8, requires=QISKIT)},
        gate=entries_are_right,
        target={"Qiskit FidelityStatevectorKernel": 100.0},
        bound_ms=partial(bound, 100, 8),
        bound=_BOUND,
    ),
    Case(
        name="2,000 x 2,000 kernel, 12 qubits",
        setup=partial(kernel, 2000, 12),
        ours=lambda s: s.kernel(s.x),
        peers={"NumPy's complex product of ready states": product},
        gate=large_is_right,
        bound_ms=partial(bound, 2000, 12),
        bound=_BOUND,
        facts=lambda s: f"{s.peak / 1e6:.0f} MB at most beside {s.states.nbytes / 1e6:.0f} MB of states",
    ),
]
