"""The variational classifier: its circuit gate by gate, two kinds of gradient, the risk, what it can reach."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError

import quernel
from quernel._errors import QuernelError
from quernel.kernels.quantum import QuantumFeatureMap, QuantumKernel, VariationalQuantumClassifier, make_adhoc
from quernel.kernels.quantum._circuit import Circuit
from quernel.kernels.quantum._training import measured, paper_risk
from quernel.testing import require_mean
from tests.reference import quantum_kernels as oracle

EXACT = 1e-12  # complex128 sums of at most 64 terms


def setting(n, rows, depth=2, circuits=2, seed=0):
    draw = np.random.default_rng(seed)
    psi = torch.from_numpy(QuantumFeatureMap(dtype="complex128").transform(6 * draw.random((rows, n))))
    return psi, torch.from_numpy(draw.uniform(-3, 3, (circuits, depth + 1, n, 2)))


@pytest.mark.parametrize("entanglement", ["full", "linear", "circular"])
@pytest.mark.parametrize(("n", "rows"), [(1, 3), (2, 3), (3, 20), (5, 4)])
def test_expectations_are_the_circuits(n, rows, entanglement):
    # 20 rows of 3 qubits are pushed through the whole unitary, the others row by row; 5 qubits are two groups.
    psi, angles = setting(n, rows)
    got = Circuit.of(n, entanglement).expectations(psi, angles)
    wanted = [[oracle.expectation(p, a, entanglement) for p in psi.numpy()] for a in angles.numpy()]
    np.testing.assert_allclose(got, wanted, atol=EXACT)


@pytest.mark.parametrize("rows", [3, 20])
def test_autograd_is_the_parameter_shift(rows):
    psi, angles = setting(3, rows, circuits=1)
    circuit = Circuit.of(3, "full")
    gradient = torch.autograd.functional.jacobian(lambda a: circuit.expectations(psi, a)[0], angles)
    for place in np.ndindex(*angles.shape):
        ends = []
        for shift in (np.pi / 2, -np.pi / 2):
            moved = angles.clone()
            moved[place] += shift
            ends.append(circuit.expectations(psi, moved)[0])
        torch.testing.assert_close(gradient[(slice(None), *place)], (ends[0] - ends[1]) / 2, atol=1e-10, rtol=0)


def test_decisions_are_linear_in_the_features_of_the_kernel():
    x, y = make_adhoc(25, random_state=0)
    model = VariationalQuantumClassifier(2, n_steps=30, n_restarts=1, rescale=False, random_state=0).fit(x, y)
    k = QuantumKernel(QuantumFeatureMap(dtype="complex128"))
    assert np.linalg.matrix_rank(k(x), tol=1e-9) == 16  # so 50 decisions in its range are no accident
    decision = model.decision_function(x) - model.intercept_
    coefficients = np.linalg.lstsq(k(x), decision, rcond=1e-12)[0]
    np.testing.assert_allclose(k(x) @ coefficients, decision, atol=1e-8)
    new = make_adhoc(10, random_state=1)[0]
    np.testing.assert_allclose(k(new, x) @ coefficients + model.intercept_, model.decision_function(new), atol=1e-7)


def test_risk_is_the_probability_of_a_wrong_label():
    # Decide y = 1 iff p_1 > p_-1 - b: the risk must fall with y (E + b), and be 1/2 where that is 0.
    e, y, b = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.3, -0.2, 0.4], [1, -1, 1, -1], [0.1, 0.1, 0.2, -0.5])
    )
    risk = paper_risk(e, y, b, shots=100)
    np.testing.assert_array_equal(np.sign(0.5 - risk.numpy()), np.sign((y * (e + b)).numpy().round(12)))
    draws = measured(e.expand(20_000, 4), 100, np.random.default_rng(0))
    wrong = (y * (draws + b) <= 0).double().mean(0)
    # The sigmoid is flatter than the normal distribution it stands for; with the sign as printed it is far off.
    np.testing.assert_allclose(risk, wrong, atol=0.16)
    assert (paper_risk(e, y, -b, shots=100) - wrong).abs().max() > 0.5
    assert torch.isfinite(paper_risk(torch.tensor([1.0, -1.0]), torch.ones(2), torch.zeros(2), 2000)).all()


def test_measured_expectations_are_unbiased():
    e = torch.tensor([-1.0, -0.4, 0.0, 0.9, 1.0], dtype=torch.float64)
    samples = measured(e.expand(3000, 5), 20, np.random.default_rng(0)).numpy()
    require_mean(samples, e.numpy())
    require_mean((samples - e.numpy()) ** 2, (1 - e.numpy() ** 2) / 20)
    assert measured(e, None, np.random.default_rng(0)) is e


@pytest.mark.parametrize("options", [{}, {"loss": "logistic"}, {"optimizer": "spsa", "shots": 2000}])
def test_its_own_data_are_learned(options):
    x, y = make_adhoc(60, random_state=0)
    labels = np.where(y > 0, "up", "down")
    model = VariationalQuantumClassifier(rescale=False, n_steps=120, n_restarts=2, random_state=0, **options)
    model.fit(x[:40], labels[:40])
    assert model.score(x[40:], labels[40:]) >= 0.9
    share = model.predict_proba(x)
    np.testing.assert_allclose(share.sum(1), 1)
    np.testing.assert_array_equal(model.classes_[share.argmax(1)], model.predict(x))


def test_several_classes_are_one_against_the_rest():
    x, y = load_iris(return_X_y=True)
    options = {"scale": 0.1, "n_steps": 60, "n_restarts": 2, "learning_rate": 0.2, "random_state": 0}
    model = VariationalQuantumClassifier(2, loss="logistic", **options).fit(x, y)
    assert model.angles_.shape == (3, 3, 4, 2) and model.score(x, y) > 0.9
    scores, share = model.decision_function(x), model.predict_proba(x)
    np.testing.assert_array_equal(scores.argmax(1), model.predict(x))
    np.testing.assert_array_equal(share.argmax(1), model.predict(x))
    np.testing.assert_allclose(share.sum(1), 1)


def test_restarts_lower_the_risk():
    x, y = make_adhoc(20, random_state=2)
    risks = [
        VariationalQuantumClassifier(1, n_steps=20, n_restarts=r, rescale=False, random_state=0).fit(x, y).risk_[0]
        for r in (1, 6)
    ]
    assert risks[1] < risks[0]


def test_it_travels(tmp_path):
    x, y = make_adhoc(10, random_state=0)
    model = VariationalQuantumClassifier(1, optimizer="spsa", shots=100, n_steps=5, rescale=False, random_state=0)
    wanted = model.fit(x, y).decision_function(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).decision_function(x), wanted)
    np.testing.assert_array_equal(quernel.load(model.save(tmp_path / "model")).decision_function(x), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "depth must be an integer"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adam', 'spsa'"),
        ({"loss": "hinge"}, "loss must be one of 'paper', 'logistic'"),
        ({"shots": 0, "optimizer": "spsa"}, "shots must be an integer"),
        ({"shots": 100}, "shots=100 needs optimizer='spsa'"),
        ({"n_steps": 0}, "n_steps must be an integer"),
        ({"n_restarts": 0}, "n_restarts must be an integer"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"reps": 0}, "reps must be an integer"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(QuernelError, match=message):
        VariationalQuantumClassifier(**options).fit(*make_adhoc(5, random_state=0))


def test_bad_rows_are_named():
    x, y = make_adhoc(5, random_state=0)
    with pytest.raises(QuernelError, match="got 1 class"):
        VariationalQuantumClassifier().fit(x, np.ones(10))
    with pytest.raises(ValueError, match="continuous"):
        VariationalQuantumClassifier().fit(x, x[:, 0])
    with pytest.raises(QuernelError, match="at most 20 columns"):
        VariationalQuantumClassifier().fit(np.ones((4, 21)), [0, 0, 1, 1])
    with pytest.raises(NotFittedError):
        VariationalQuantumClassifier().predict(x)
    model = VariationalQuantumClassifier(0, n_steps=1, n_restarts=1).fit(x, y)
    with pytest.raises(ValueError, match="expecting 2 features"):
        model.predict(x[:, :1])
