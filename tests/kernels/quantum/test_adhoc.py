"""Ad hoc data: balanced, beyond the gap, separable by the quantum kernel; unitaries that are uniform."""

import math

import numpy as np
import pytest
from sklearn.svm import SVC

from quernel._errors import QuernelError
from quernel.kernels.quantum import QuantumFeatureMap, QuantumKernel, make_adhoc
from quernel.kernels.quantum.adhoc import random_unitary
from quernel.testing import require_distribution, require_mean


def test_unitaries_are_special_and_uniform():
    draw = np.random.default_rng(0)
    made = np.array([random_unitary(3, draw) for _ in range(2000)])
    np.testing.assert_allclose(made @ made.conj().mT, np.broadcast_to(np.eye(3), made.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(made), 1, atol=1e-12)
    # |V_ij|^2 of a Haar unitary has the distribution 1 - (1 - t)^(d - 1); phases have no preference.
    require_distribution(np.abs(made[:, 0, 1]) ** 2, lambda t: 1 - (1 - t) ** 2)
    require_mean(made.view(np.float64).reshape(2000, -1), 0.0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_labels_are_certain(n):
    x, y = make_adhoc(30, n, gap=0.3, random_state=n)
    assert x.shape == (60, n) and x.min() > 0 and x.max() <= 2 * math.pi
    assert sorted(np.unique(y, return_counts=True)[1]) == [30, 30]
    # The unitary is the first draw; parity by definition.
    unitary = random_unitary(2**n, np.random.default_rng(n))
    parity = np.array([(-1) ** bin(b).count("1") for b in range(2**n)])
    psi = QuantumFeatureMap(dtype="complex128").transform(x)
    expectation = np.abs(psi @ unitary.T) ** 2 @ parity
    assert (y * expectation >= 0.3).all()


def test_the_kernel_separates_what_the_gap_allows():
    x, y = make_adhoc(100, 2, random_state=0)
    k = QuantumKernel()(x)
    assert SVC(kernel="precomputed", C=1e4).fit(k, y).score(k, y) == 1
    again, labels = make_adhoc(100, 2, random_state=0)
    np.testing.assert_array_equal(x, again)
    np.testing.assert_array_equal(y, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_per_class": 0}, "n_per_class must be an integer"),
        ({"n_qubits": 11}, "n_qubits must be an integer"),
        ({"gap": 1.0}, "gap must be"),
        ({"feature_map": "zz"}, "feature_map must be QuantumFeatureMap"),
        ({"random_state": "x"}, "random_state must be"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(QuernelError, match=message):
        make_adhoc(**arguments)


def test_a_gap_that_is_never_reached_is_said():
    # After 41 of 500 batches, since 8 * 500 / 41 < 100.
    with pytest.raises(QuernelError, match=r"only 0 of n_per_class=100 rows with gap=0.9.* among 41,984:.*near 0.12"):
        make_adhoc(100, 6, gap=0.9, random_state=0)
