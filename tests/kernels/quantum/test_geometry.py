"""Diagnostics of kernels: each number by its definition, the limits of the geometric difference, what is said."""

import numpy as np
import pytest
from scipy import linalg
from sklearn.metrics.pairwise import rbf_kernel

from quernel._errors import QuernelError
from quernel.kernels.quantum import QuantumFeatureMap, QuantumKernel, kernel_geometry

ALPHA = 1e-2


def example(n=3, rows=40, seed=0):
    draw = np.random.default_rng(seed)
    x = 2 * np.pi * draw.random((rows, n))
    quantum = QuantumKernel(QuantumFeatureMap(dtype="complex128"))(x)
    return quantum, rbf_kernel(x, gamma=0.3), np.digitize(x[:, 0], [2.0, 4.0])


def test_numbers_are_their_definitions():
    kq, kc, y = example()
    found = kernel_geometry(kq, 5 * kc, y, n_qubits=3, alpha=ALPHA)  # scaled back to a mean diagonal of 1
    off = kq[~np.eye(40, dtype=bool)]
    assert found.off_diagonal_mean == pytest.approx(off.mean()) and found.off_diagonal_variance == pytest.approx(
        off.var()
    )
    assert found.haar_mean == 1 / 8 and found.n_rows == 40
    root = linalg.sqrtm(kq).real
    g = np.sqrt(np.linalg.norm(root @ np.linalg.inv(kc + ALPHA * np.eye(40)) @ root, 2))
    assert found.geometric_difference == pytest.approx(g, rel=1e-6)
    share = np.linalg.eigvalsh(kq).clip(1e-300) / 40
    assert found.effective_dimension == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    hot = np.eye(3)[y]
    centre = np.eye(40) - 1 / 40
    a, b = centre @ kq @ centre, centre @ hot @ hot.T @ centre
    assert found.alignment == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    for k, got in ((kq, found.complexity), (kc, found.classical_complexity)):
        assert got == pytest.approx(np.trace(hot.T @ np.linalg.solve(k + ALPHA * np.eye(40), hot)) / 40)


def test_a_kernel_has_no_advantage_over_itself():
    kq, _, y = example()
    found = kernel_geometry(kq, kq, y)
    assert found.geometric_difference <= 1 and not found.advantage_possible
    assert (
        "No large advantage can exist" in found.message and "the classical kernel is the simpler one" in found.message
    )


def test_room_and_concentration_are_said():
    kq, kc, _ = example()
    assert kernel_geometry(kq, kc, alpha=1e-4).advantage_possible
    flat = kernel_geometry(np.full((50, 50), 0.01) + 0.99 * np.eye(50), np.eye(50), n_qubits=7)
    assert "concentrated: overlaps are 0.01 on average, where random states give 0.0078" in flat.message
    assert flat.alignment is None and flat.complexity is None
    assert flat.effective_dimension == pytest.approx(50, rel=0.2)


def test_labels_of_one_kind_have_no_alignment():
    kq, kc, _ = example()
    assert kernel_geometry(kq, kc, np.zeros(40)).alignment == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantum": np.ones((2, 3))}, r"quantum must have shape \(N, N\)"),
        ({"quantum": np.ones((1, 1))}, "N >= 2"),
        ({"quantum": np.triu(np.ones((40, 40)))}, "quantum must be a symmetric"),
        ({"classical": np.zeros((40, 40))}, "positive diagonal"),
        ({"classical": np.full((40, 40), np.nan)}, "classical holds NaN"),
        ({"classical": np.eye(39)}, "same rows"),
        ({"y": [0, 1]}, r"y must have shape \(40,\)"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"n_qubits": 0}, "n_qubits must be"),
    ],
)
def test_bad_input_is_named(change, message):
    kq, kc, y = example()
    with pytest.raises(QuernelError, match=message):
        kernel_geometry(**({"quantum": kq, "classical": kc, "y": y} | change))
