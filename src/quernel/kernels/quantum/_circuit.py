"""The variational circuit W(theta) on state vectors, differentiable, for many settings of its angles at once.

W = U_loc^(l) U_ent ... U_ent U_loc^(0): U_loc is exp(i a Z/2) exp(i b Y/2) on each qubit, the Y rotation first, U_ent
the product of controlled Z over the coupling graph, +-1 an index. Measured is the parity of all qubits. A layer is one
small matrix product for every four qubits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quernel.kernels.quantum._states import bit_signs, coupled_pairs, parity_signs

# Qubits whose rotations become one matrix of 16 x 16.
_GROUP = 4


class Circuit(NamedTuple):
    """What of W does not depend on the angles."""

    entangler: Tensor  # (2^n,) +-1
    parity: Tensor  # (2^n,) +-1

    @classmethod
    def of(cls, n_qubits: int, entanglement: str) -> Circuit:
        """Build the circuit of a coupling graph."""
        z = torch.from_numpy(bit_signs(n_qubits))
        entangler = torch.ones(2**n_qubits, dtype=torch.float64)
        for i, j in coupled_pairs(n_qubits, entanglement):
            entangler = torch.where((z[:, i] < 0) & (z[:, j] < 0), -entangler, entangler)
        return cls(entangler, torch.from_numpy(parity_signs(n_qubits, [range(n_qubits)])[0]))

    def expectations(self, states: Tensor, angles: Tensor) -> Tensor:
        """Return <psi| W^+ parity W |psi>.

        Parameters
        ----------
        states : Tensor, shape (N, 2^n), complex128
        angles : Tensor, shape (B, l + 1, n, 2), float64
            Of B circuits; b of the Y rotation, then a of the Z rotation.

        Returns
        -------
        expectations : Tensor, shape (B, N), float64
            In [-1, 1], differentiable in the angles.
        """
        rows, size = states.shape
        # Beyond 2^n rows it is cheaper to push the basis through the circuit, and the rows through what becomes of it.
        many = rows > size
        psi = (torch.eye(size, dtype=states.dtype) if many else states)[None]
        factors = _rotations(angles)  # (B, l + 1, n, 2, 2)
        groups = [_product(part).unbind(1) for part in factors.split(_GROUP, dim=2)]
        for layer, matrices in enumerate(zip(*groups, strict=True)):
            if layer:
                psi = psi * self.entangler
            psi = _rotate(psi, matrices)
        if many:
            psi = states @ psi
        return (psi.real.square() + psi.imag.square()) @ self.parity


def _rotations(angles: Tensor) -> Tensor:
    half = angles / 2
    cos, sin = half[..., 0].cos(), half[..., 0].sin()
    turn = torch.polar(torch.ones_like(half[..., 1]), half[..., 1])
    entries = (turn * cos, turn * sin, -turn.conj() * sin, turn.conj() * cos)
    return torch.stack(entries, -1).unflatten(-1, (2, 2))


def _rotate(psi: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """psi: (1 or B, N, 2^n), matrices of groups of qubits, lowest first: (B, 2^m, 2^m) -> (B, N, 2^n)."""
    rows, size = psi.shape[-2:]
    stride = 1
    for matrix in matrices:
        side = matrix.shape[-1]
        if stride == 1:
            psi = psi.reshape(psi.shape[0], -1, side) @ matrix.mT
        else:
            psi = matrix[:, None] @ psi.reshape(len(matrix), -1, side, stride)
        psi = psi.reshape(len(matrix), rows, size)
        stride *= side
    return psi


def _product(factors: Tensor) -> Tensor:
    """factors: (B, l + 1, m, 2, 2) -> their Kronecker product, the first on the lowest bit, (B, l + 1, 2^m, 2^m)."""
    first, *others = factors.unbind(2)
    for factor in others:
        wide = factor[..., :, None, :, None] * first[..., None, :, None, :]
        first = wide.flatten(-4, -3).flatten(-2, -1)
    return first
