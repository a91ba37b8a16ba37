"""The support vector machine on quantum kernels: scikit-learn's numbers, shots, saving, the report, what is refused."""

import math
import pickle

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.svm import SVC

import quernel
from quernel._errors import QuernelError
from quernel.kernels.quantum import (
    AngleRangeWarning,
    QuantumFeatureMap,
    QuantumKernel,
    QuantumKernelClassifier,
    make_adhoc,
)
from quernel.kernels.quantum.kernel import positive_projector

SAME = 1e-9  # float64 sums in another order


def iris(classes=3):
    x, y = load_iris(return_X_y=True)
    return x[y < classes], np.array(["setosa", "versicolor", "virginica"])[y[y < classes]]


def scaled(x):
    return (x - x.min(0)) / (x.max(0) - x.min(0)) * 2 * math.pi


@pytest.mark.filterwarnings("ignore::quernel.kernels.quantum.AngleRangeWarning")
@pytest.mark.parametrize("classes", [2, 3])
def test_decisions_are_those_of_scikit_learn(classes):
    x, y = iris(classes)
    model = QuantumKernelClassifier(C=2.0, scale=0.2).fit(x[::2], y[::2])
    angles = (x - model.low_) / model.span_ * 2 * math.pi
    kernel = QuantumKernel(QuantumFeatureMap(scale=0.2, dtype="complex128"))
    theirs = SVC(C=2.0, kernel="precomputed", break_ties=True).fit(kernel(angles[::2]), y[::2])
    wanted = kernel(angles, angles[::2])
    np.testing.assert_allclose(model.decision_function(x), theirs.decision_function(wanted), atol=SAME)
    np.testing.assert_array_equal(model.predict(x), theirs.predict(wanted))
    assert len(model.vectors_) == len(theirs.support_) < len(x) // 2


def test_columns_are_scaled_to_angles():
    x, y = iris(2)
    shifted = QuantumKernelClassifier(scale=0.2).fit(100 - 3 * x[:, ::-1], y)
    plain = QuantumKernelClassifier(scale=0.2, rescale=False).fit(scaled(-x[:, ::-1]), y)
    np.testing.assert_allclose(shifted.vectors_, plain.vectors_, atol=1e-9)
    assert shifted.vectors_.min() >= 0 and shifted.vectors_.max() <= 2 * math.pi + 1e-9
    x[:, 1] = 7.0
    assert QuantumKernelClassifier(scale=0.2).fit(x, y).score(x, y) == 1


def test_its_own_data_are_learned():
    x, y = make_adhoc(60, random_state=3)
    model = QuantumKernelClassifier(C=1e3, rescale=False).fit(x[:40], y[:40])
    assert model.score(x[40:], y[40:]) >= 0.9
    assert SVC(C=1e3, gamma=1.0).fit(x[:40], y[:40]).score(x[40:], y[40:]) < 0.85


def test_float32_uses_single_states():
    x, y = iris()
    models = [QuantumKernelClassifier(scale=0.2).fit(x.astype(dtype), y) for dtype in (np.float32, np.float64)]
    assert models[0].vectors_.dtype == np.float32
    decisions = [m.decision_function(x.astype(m.vectors_.dtype)) for m in models]
    assert decisions[0].dtype == np.float32
    np.testing.assert_allclose(*decisions, atol=1e-3)
    forced = QuantumKernelClassifier(scale=0.2, precision="complex64").fit(x, y)
    np.testing.assert_allclose(forced.decision_function(x), decisions[1], atol=1e-3)


def test_new_rows_of_a_clipped_kernel_are_projected():
    x, y = make_adhoc(30, random_state=0)
    model = QuantumKernelClassifier(10.0, rescale=False, shots=100, random_state=0).fit(x[:40], y[:40])
    raw = QuantumKernel(QuantumFeatureMap(dtype="complex128"), 100, random_state=0).estimate(x[:40])
    projector = positive_projector(raw)
    assert np.linalg.matrix_rank(projector) < 40
    machine = SVC(C=10.0, kernel="precomputed").fit(projector @ raw, y[:40])
    new = QuantumKernel(QuantumFeatureMap(dtype="complex128"), 100, random_state=np.random.SeedSequence([0, 1]))
    wanted = machine.decision_function(new.estimate(x[40:], x[:40]) @ projector)
    np.testing.assert_allclose(model.decision_function(x[40:]), wanted, atol=1e-6)
    np.testing.assert_array_equal(model.decision_function(x[40:]), model.decision_function(x[40:]))


@pytest.mark.parametrize("psd", ["clip", "shift", "none"])
def test_many_shots_are_the_exact_classifier(psd):
    x, y = make_adhoc(30, random_state=0)
    sharp = QuantumKernelClassifier(rescale=False, shots=10**8, psd=psd, random_state=0).fit(x[:40], y[:40])
    exact = QuantumKernelClassifier(rescale=False).fit(x[:40], y[:40])
    np.testing.assert_allclose(sharp.decision_function(x[40:]), exact.decision_function(x[40:]), atol=0.01)
    rough = QuantumKernelClassifier(C=10.0, rescale=False, shots=1000, psd=psd, random_state=0).fit(x[:40], y[:40])
    assert rough.score(x[40:], y[40:]) >= 0.85


def test_the_report_speaks_plainly():
    x, y = iris()
    report = QuantumKernelClassifier(scale=0.03).fit(x, y).report_
    assert "No large advantage can exist" in report.message and not report.advantage_possible
    assert report.n_rows == 150 and report.haar_mean == 2**-4
    rng = np.random.default_rng(0)
    flat = QuantumKernelClassifier(random_state=0).fit(rng.random((320, 10)), rng.integers(0, 2, 320)).report_
    assert "concentrated" in flat.message and flat.n_rows == 300


def test_it_travels(tmp_path):
    x, y = iris()
    model = QuantumKernelClassifier(scale=0.2, shots=500, random_state=0).fit(x, y)
    wanted = model.decision_function(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).decision_function(x), wanted)
    twin = quernel.load(model.save(tmp_path / "model"))
    np.testing.assert_array_equal(twin.decision_function(x), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0.0}, "C must be a finite number"),
        ({"shots": 0}, "shots must be an integer"),
        ({"psd": "flip"}, "psd must be one of"),
        ({"noise": -0.1}, "noise must be"),
        ({"precision": "half"}, "precision must be one of 'auto', 'complex64', 'complex128'"),
        ({"scale": -1.0}, "scale must be"),
        ({"entanglement": "star"}, "entanglement must be one of"),
        ({"rescale": 1}, "rescale must be True or False"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(QuernelError, match=message):
        QuantumKernelClassifier(**options).fit(*iris())


def test_bad_rows_are_named():
    x, y = iris()
    with pytest.raises(QuernelError, match="at most 20 columns, one qubit each; got 21"):
        QuantumKernelClassifier().fit(np.ones((4, 21)), [0, 0, 1, 1])
    with pytest.raises(QuernelError, match="got 1 class"):
        QuantumKernelClassifier().fit(x[:50], y[:50])
    with pytest.raises(ValueError, match="NaN"):
        QuantumKernelClassifier().fit(np.full((4, 2), np.nan), [0, 0, 1, 1])
    model = QuantumKernelClassifier(scale=0.2).fit(x, y)
    with pytest.raises(ValueError, match="expecting 4 features"):
        model.predict(x[:, :3])
    with pytest.warns(AngleRangeWarning):
        model.predict(x + 1)
