"""Kernels of PennyLane and Qiskit: recorded ones always, and the packages themselves where they can be installed."""

import json

import numpy as np
import pytest

from quernel.kernels.quantum import QuantumFeatureMap, QuantumKernel
from tests.reference import quantum_peers as peers

EXACT, SINGLE = 1e-12, 1e-5


def compare(cases, kernels):
    for case, wanted in zip(cases, kernels, strict=True):
        x = peers.rows(case["n"])
        options = {"n_qubits": case["n"], "reps": case["reps"], "entanglement": case["entanglement"]}
        for dtype, tolerance in (("complex128", EXACT), ("complex64", SINGLE)):
            got = QuantumKernel(QuantumFeatureMap(dtype=dtype, **options))(x)
            np.testing.assert_allclose(got, wanted, atol=tolerance, err_msg=str(case))


@pytest.mark.parametrize("package", ["pennylane", "qiskit"])
def test_recorded_kernels(package):
    recorded = json.loads(peers.RECORDED.read_text())
    assert len(recorded["settings"]) == 24
    compare(recorded["settings"], recorded[package])


def in_peer(package, function, *args):
    from benchmarks._peers import PeerUnavailable, peer_python
    from benchmarks._process import in_fresh_process

    try:
        python = peer_python(*(peers.PENNYLANE if package == "pennylane" else peers.QISKIT))
    except PeerUnavailable as error:
        pytest.skip(str(error))
    return in_fresh_process(peers.__file__, function, *args, python=python)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pennylane", "qiskit"])
def test_kernels_of_the_package(package):
    cases = peers.settings(6)
    compare(cases, in_peer(package, f"{package}_kernels", cases))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pennylane", "qiskit"])
@pytest.mark.parametrize("interactions", ["zz", "iqp", "z"])
def test_exported_circuits_make_our_states(package, interactions):
    for n in (1, 3):
        options = {"reps": 2, "entanglement": "circular", "interactions": interactions, "scale": 0.7}
        real, imaginary = in_peer(package, "exported_states", package, options, n)
        ours = QuantumFeatureMap(dtype="complex128", **options).transform(peers.rows(n))
        np.testing.assert_allclose(ours, np.array(real) + 1j * np.array(imaginary), atol=EXACT)
