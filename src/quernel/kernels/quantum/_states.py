"""States |Phi(x)> = (U(x) H)^reps |0..0> without circuits: U is diagonal, so a state is phases and fast transforms.

theta_b(x) = sum_i phi_i z_i(b) + sum_(i,j) phi_ij z_i(b) z_j(b) with z_i(b) = 1 - 2 (bit i of b). With D the
diagonal of e^(i theta), F the normalised Walsh-Hadamard transform, the state is (D F)^(reps - 1) D 2^(-n/2) 1. Qubit i
is bit i of the index, in theta and in F alike. Cost: n 2^n additions a transform, n/2 + 2 multiply-adds, a sine and a
cosine an entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._threads import parallel_ranges
from quernel.kernels.features.hadamard import walsh_hadamard

Pairs = list[tuple[int, int]]
# Entries of states made together: their temporaries stay in a core's cache. Fixed, so that threads change no bit.
_CHUNK = 2**15


class Angles(NamedTuple):
    """Phases of a batch of rows: phi_i and, as an upper triangle, phi_ij."""

    singles: NDArray[np.float64]  # (N, n)
    pairs: NDArray[np.float64]  # (N, n, n)


def coupled_pairs(n_qubits: int, entanglement: str) -> Pairs:
    """Return the pairs (i, j), i < j, that a coupling graph joins."""
    if entanglement == "full":
        return [(i, j) for i in range(n_qubits) for j in range(i + 1, n_qubits)]
    chain = [(i, i + 1) for i in range(n_qubits - 1)]
    # On two qubits the ring would join the only pair a second time.
    return [*chain, (0, n_qubits - 1)] if entanglement == "circular" and n_qubits > 2 else chain


def phase_angles(x: NDArray[np.float64], interactions: str, entanglement: str, scale: float) -> Angles:
    """Return the phases of rows x: (N, n), between -pi and pi: whole turns of an angle change no state."""
    singles = scale * x
    factors = math.pi - singles if interactions == "zz" else singles
    pairs = np.zeros((len(x), x.shape[1], x.shape[1]))
    if interactions != "z":
        for i, j in coupled_pairs(x.shape[1], entanglement):
            pairs[:, i, j] = factors[:, i] * factors[:, j]
    # In float64 first: products of a few hundred radians would lose their digits in float32.
    return Angles(*(np.asarray(a - 2 * math.pi * np.round(a / (2 * math.pi)), np.float64) for a in (singles, pairs)))


def bit_signs(n_qubits: int) -> NDArray[np.float64]:
    """Return z_i(b), shape (2^n, n)."""
    return np.asarray(1.0 - 2.0 * (np.arange(2**n_qubits)[:, None] >> np.arange(n_qubits) & 1))


def parity_signs(n_qubits: int, subsets: Iterable[Iterable[int]]) -> NDArray[np.float64]:
    """Return the products of z_i(b) over each subset of qubits, shape (subsets, 2^n)."""
    z = bit_signs(n_qubits)
    return np.array([z[:, list(subset)].prod(1) for subset in subsets]).reshape(-1, 2**n_qubits)


def states(angles: Angles, reps: int, dtype: torch.dtype) -> Tensor:
    """Return the states of a batch, shape (N, 2^n), complex64 or complex128."""
    rows, n = angles.singles.shape
    out = torch.empty(rows, 2**n, dtype=dtype)
    real = torch.float32 if dtype is torch.complex64 else torch.float64
    halves = _Halves(n, real)
    singles, pairs = (torch.from_numpy(a).to(real) for a in angles)
    step = max(1, _CHUNK >> n)

    def work(start: int, stop: int) -> None:
        for first in range(start * step, min(stop * step, rows), step):
            part = slice(first, min(first + step, rows))
            theta = halves.theta(singles[part], pairs[part])
            turn = torch.complex(theta.cos(), theta.sin())
            psi = turn * 2.0 ** (-n * reps / 2)  # every Hadamard's 2^(-n/2) at once
            for _ in range(reps - 1):
                psi = walsh_hadamard(psi).mul_(turn)
            out[part] = psi

    parallel_ranges(work, -(-rows // step))
    return out


class _Halves:
    """theta as a product of small matrices: the sign table of all subsets would be (n + n^2 / 2) 2^n numbers.

    An index is a low and a high half. Each half's own angles give a vector of 2^(n/2) sums; a pair (i, j) across the
    halves is z_j(high) phi_ij z_i(low), a product of rank n/2 a row.
    """

    def __init__(self, n_qubits: int, dtype: torch.dtype) -> None:
        self.low = n_qubits // 2
        sizes = self.low, n_qubits - self.low
        self.signs = [torch.from_numpy(bit_signs(size)).to(dtype) for size in sizes]  # (2^size, size)
        self.inner = [torch.triu_indices(size, size, 1) for size in sizes]
        self.products = [s[:, i] * s[:, j] for s, (i, j) in zip(self.signs, self.inner, strict=True)]

    def theta(self, singles: Tensor, pairs: Tensor) -> Tensor:
        """singles: (N, n), pairs: (N, n, n) -> (N, 2^n)."""
        cut = self.low
        low = self._own(0, singles[:, :cut], pairs[:, :cut, :cut])  # (N, 2^low)
        high = self._own(1, singles[:, cut:], pairs[:, cut:, cut:])  # (N, 2^high)
        across = self.signs[0] @ pairs[:, :cut, cut:]  # (N, 2^low, high)
        theta = high[:, :, None] + low[:, None, :]
        theta.baddbmm_(self.signs[1].expand(len(singles), -1, -1), across.mT)
        return theta.flatten(1)

    def _own(self, half: int, singles: Tensor, pairs: Tensor) -> Tensor:
        i, j = self.inner[half]
        return singles @ self.signs[half].T + pairs[:, i, j] @ self.products[half].T
