"""Slow and obvious quantum circuits: dense matrices of 2^n x 2^n, gate by gate, qubit i being bit i of an index."""

from __future__ import annotations

import itertools

import numpy as np

H = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
Z = np.diag([1.0, -1.0])


def on_qubits(n: int, gates: dict[int, np.ndarray]) -> np.ndarray:
    """Return the Kronecker product of gates on some of n qubits, the identity on the others."""
    matrix = np.eye(1)
    for i in range(n):
        matrix = np.kron(gates.get(i, np.eye(2)), matrix)
    return matrix


def pairs(n: int, entanglement: str) -> list[tuple[int, int]]:
    """Return the pairs of a coupling graph."""
    if entanglement == "full":
        return list(itertools.combinations(range(n), 2))
    found = [(i, i + 1) for i in range(n - 1)]
    return found + ([(n - 1, 0)] if entanglement == "circular" and n > 2 else [])


def state(x: np.ndarray, reps: int = 2, entanglement: str = "full", interactions: str = "zz", s: float = 1.0):
    """Return the state of one row by matrix products."""
    n = len(x)
    generator = sum(s * x[i] * on_qubits(n, {i: Z}) for i in range(n))
    for i, j in pairs(n, entanglement) if interactions != "z" else []:
        phi = (np.pi - s * x[i]) * (np.pi - s * x[j]) if interactions == "zz" else s * x[i] * s * x[j]
        generator = generator + phi * on_qubits(n, {i: Z, j: Z})
    layer = np.diag(np.exp(1j * generator.diagonal())) @ on_qubits(n, dict.fromkeys(range(n), H))
    psi = np.eye(2**n)[0].astype(complex)
    for _ in range(reps):
        psi = layer @ psi
    return psi


def kernel(x: np.ndarray, y: np.ndarray, **options) -> np.ndarray:
    """Return |<psi(y)|psi(x)>|^2 pair by pair."""
    left, right = ([state(row, **options) for row in rows] for rows in (x, y))
    return np.array([[abs(np.vdot(b, a)) ** 2 for b in right] for a in left])


def expectation(psi: np.ndarray, angles: np.ndarray, entanglement: str) -> float:
    """Return the parity of one state behind the circuit with angles (l + 1, n, 2), Y before Z."""
    n = angles.shape[1]
    for layer, rotations in enumerate(angles):
        if layer:
            for i, j in pairs(n, entanglement):
                psi = (np.eye(2**n) - 2 * on_qubits(n, {i: np.diag([0, 1]), j: np.diag([0, 1])})) @ psi
        for i, (b, a) in enumerate(rotations):
            about_y = np.array([[np.cos(b / 2), np.sin(b / 2)], [-np.sin(b / 2), np.cos(b / 2)]])
            about_z = np.diag(np.exp([0.5j * a, -0.5j * a]))
            psi = on_qubits(n, {i: about_z @ about_y}) @ psi
    return float(np.real(np.vdot(psi, on_qubits(n, dict.fromkeys(range(n), Z)) @ psi)))
