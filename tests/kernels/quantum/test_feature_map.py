"""Exact states: gate by gate, phases only where nothing couples, the order of bits, exports, and what is refused."""

import math
import pickle
import sys

import numpy as np
import pytest

from quernel._errors import MissingExtraError, QuernelError
from quernel._timing import threads
from quernel.kernels.quantum import AngleRangeWarning, QuantumFeatureMap, _states
from tests.reference import quantum_kernels as oracle

EXACT = 1e-13  # float64 sums of at most a thousand terms of a state of length 1
SINGLE = 5e-6  # phases of some ten radians in float32


def angles(n, rows=3, seed=0):
    return 2 * math.pi * np.random.default_rng(seed).random((rows, n))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("reps", [1, 2, 3])
@pytest.mark.parametrize("interactions", ["zz", "iqp", "z"])
def test_states_are_the_circuits(n, reps, interactions):
    x = angles(n)
    for entanglement in ("full", "linear", "circular"):
        options = {"reps": reps, "entanglement": entanglement, "interactions": interactions}
        wanted = np.array([oracle.state(row, s=0.7, **options) for row in x])
        for dtype, tolerance in (("complex128", EXACT * 10), ("complex64", SINGLE)):
            psi = QuantumFeatureMap(n, scale=0.7, dtype=dtype, **options).transform(x)
            assert psi.dtype == dtype
            np.testing.assert_allclose(psi, wanted, atol=tolerance)


def test_ten_qubits_and_batches_of_any_size():
    x = angles(10, rows=70)
    psi = QuantumFeatureMap(dtype="complex128").transform(x)
    np.testing.assert_allclose(psi[-1], oracle.state(x[-1]), atol=EXACT * 100)
    assert len(x) > _states._CHUNK >> 10  # more than one chunk
    for part in (x[:0], x[:1], x[30:66]):
        np.testing.assert_allclose(QuantumFeatureMap(dtype="complex128").transform(part), psi[np.isin(x, part).all(1)])


def test_threads_change_no_bit():
    x, states = angles(8, rows=300), []
    for count in (1, 2):
        with threads(count):
            states.append(QuantumFeatureMap().transform(x))
    np.testing.assert_array_equal(*states)


def test_two_qubits_in_a_ring_are_coupled_once():
    assert _states.coupled_pairs(2, "circular") == [(0, 1)]
    assert _states.coupled_pairs(4, "circular") == [(0, 1), (1, 2), (2, 3), (0, 3)]


def test_a_permutation_of_columns_permutes_the_bits():
    x = np.array([[0.3, 2.9, 5.1]])
    psi = QuantumFeatureMap(dtype="complex128").transform(x)[0].reshape(2, 2, 2)
    turned = QuantumFeatureMap(dtype="complex128").transform(x[:, ::-1])[0].reshape(2, 2, 2)
    np.testing.assert_allclose(turned, psi.T, atol=EXACT)
    assert np.abs(turned - psi).max() > 0.1


@pytest.mark.filterwarnings("ignore::quernel.kernels.quantum.AngleRangeWarning")
def test_only_maps_without_pairs_repeat_themselves():
    x = angles(3)
    for interactions, same in (("z", True), ("zz", False)):
        feature_map = QuantumFeatureMap(interactions=interactions, dtype="complex128")
        psi, turned = feature_map.transform(x), feature_map.transform(x + np.array([0, 2 * math.pi, 0]))
        overlap = np.abs((psi.conj() * turned).sum(1))
        assert np.allclose(overlap, 1, atol=1e-12) is same


@pytest.mark.parametrize(("package", "method"), [("qiskit", "to_qiskit"), ("pennylane", "to_pennylane")])
def test_exports_name_the_extra(package, method, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"quernel\[quantum\]"):
        getattr(QuantumFeatureMap(), method)(2)
    with pytest.raises(QuernelError, match="n_qubits must be given"):
        getattr(QuantumFeatureMap(), method)()
    with pytest.raises(QuernelError, match="the map has 3"):
        getattr(QuantumFeatureMap(3), method)(2)


def test_maps_are_values():
    feature_map = QuantumFeatureMap(3, scale=0.5)
    assert pickle.loads(pickle.dumps(feature_map)) == feature_map
    assert len({feature_map, QuantumFeatureMap(3, scale=0.5)}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_qubits": 0}, r"n_qubits must be an integer in \[1, 20\]"),
        ({"n_qubits": 21}, "n_qubits must be an integer"),
        ({"reps": 0}, "reps must be an integer"),
        ({"entanglement": "star"}, "entanglement must be one of 'full', 'linear', 'circular'"),
        ({"interactions": "yy"}, "interactions must be one of"),
        ({"scale": 0.0}, "scale must be a finite number"),
        ({"dtype": "float32"}, "dtype must be one of 'complex64', 'complex128'"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(QuernelError, match=message):
        QuantumFeatureMap(**options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 21)), "at most 20 columns, one qubit each; got 21"),
        (np.ones(3), r"shape \(N, n\)"),
        (np.ones((2, 0)), r"shape \(N, n\)"),
        ([[1.0, math.nan]], "X holds NaN"),
        ([["a", "b"]], "X must be an array of numbers"),
    ],
)
def test_bad_rows_are_named(x, message):
    with pytest.raises(QuernelError, match=message):
        QuantumFeatureMap().transform(x)
    with pytest.raises(QuernelError, match="n_qubits=3 columns; got 2"):
        QuantumFeatureMap(3).transform(np.ones((2, 2)))


def test_angles_out_of_range_are_warned_about():
    with pytest.warns(AngleRangeWarning, match="from -1 to 1; angles belong into"):
        QuantumFeatureMap().transform([[-1.0, 1.0]])
