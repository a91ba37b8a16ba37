"""PrivateSimilarityClassifier: class sums, a record that changes its class, accuracy, scikit-learn's manners."""

import math

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError

import quernel
from quernel._errors import BudgetExceeded, PrivacyError, QuernelError
from quernel.kernels.features import shift_invariant_kernel
from quernel.sketch import PrivateKDE, PrivateSimilarityClassifier, PublicSimilarities, dp
from quernel.testing import require_mean

SEEDED = {"insecure_noise_seed": 0}


def task(n=600, d=4, seed=0, n_classes=3):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, n_classes, n)
    x = draw.standard_normal((n, d)) + 3 * np.eye(n_classes, d)[y]
    return x / np.maximum(1, np.linalg.norm(x, axis=1, keepdims=True)), np.array(["a", "b", "c"])[y]


def make(similarity="kernel", **settings):
    settings = {"n_features": 256, **SEEDED, **settings}
    return PrivateSimilarityClassifier(["c", "a", "b"], similarity=similarity, **settings)


def exact(model):
    """Return the public object with no noise in it."""
    held = model._collected
    privacy = held._described(held.mechanism(), held.terms)
    return held._published(held._sums() * held.grain, privacy | {"mechanism": "laplace", "scale": 1e-9})


@pytest.mark.parametrize("similarity", ["kernel", "dot", "l2sq"])
def test_scores_without_noise(similarity):
    x, y = task()
    model = make(similarity, radius=2.0).set_params(n_features=4096)
    public, q = exact(model.partial_fit(x, y)), task(30, seed=1)[0]
    groups = [x[y == name] for name in ("c", "a", "b")]
    if similarity == "kernel":
        wanted = np.stack([shift_invariant_kernel("gaussian", q, g).mean(1) for g in groups], 1)
        tolerance = 5 / math.sqrt(2 * 4096)
    elif similarity == "dot":
        wanted, tolerance = np.stack([(q @ g.T).mean(1) for g in groups], 1), 1e-5
    else:
        wanted, tolerance = np.stack([-((q - g.mean(0)) ** 2).sum(1) for g in groups], 1), 1e-5
    assert np.abs(public.query(q) - wanted).max() < tolerance
    np.testing.assert_allclose(public.class_rows, [len(g) for g in groups])
    np.testing.assert_array_equal(public.predict(q), np.array(["c", "a", "b"])[public.query(q).argmax(1)])


@pytest.mark.parametrize("similarity", ["kernel", "dot", "l2sq"])
def test_shards_are_the_whole_bit_for_bit(similarity):
    x, y = task()
    whole = make(similarity).fit(x, y)
    cut = zip(np.split(x, (5, 333)), np.split(y, (5, 333)), strict=True)
    parts = [make(similarity).partial_fit(a, b) for a, b in cut]
    merged = parts[0].merge(parts[1]).merge(parts[2]).release()
    with pytest.raises(QuernelError, match="nothing was collected"):
        parts[1].release()
    np.testing.assert_array_equal(merged.public_.values, whole.public_.values)
    np.testing.assert_array_equal(merged.public_.class_rows, whole.public_.class_rows)


@pytest.mark.parametrize("neighbours", ["add_remove", "replace"])
@pytest.mark.parametrize("similarity", ["kernel", "dot"])
def test_sensitivity_by_trying(similarity, neighbours):
    x, y = task(300)
    x = np.concatenate((x / np.linalg.norm(x, axis=1, keepdims=True), -x[:9], np.eye(4)))
    y = np.concatenate((y, y[:9], y[:4]))

    def sums(rows, labels):
        return make(similarity, neighbours=neighbours, n_features=8).partial_fit(rows, labels)._collected

    held = sums(x, y).sensitivity()
    q = np.array([sums(a[None], np.array([b]))._sums() for a, b in zip(x, y, strict=True)])
    pairs = np.random.default_rng(0).integers(0, len(x), (2, 10_000))
    changes = q if neighbours == "add_remove" else q[pairs[0]] - q[pairs[1]]
    l2 = np.linalg.norm(changes, axis=1).max()
    assert l2 <= held.l2 and np.abs(changes).sum(1).max() <= held.l1
    if neighbours == "add_remove":
        assert l2 >= 0.98 * held.l2
        # Parallel composition: as much as one class alone.
        assert held.l2 == pytest.approx(math.hypot(1, 0.1) * 2**20, rel=1e-4)
    np.testing.assert_array_equal(sums(x, y)._sums() - sums(x[1:], y[1:])._sums(), q[0])


@pytest.mark.parametrize("releases", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_sums_are_unbiased(releases):
    x, y = task(60)
    held = make(n_features=8).partial_fit(x, y)._collected
    wanted = held._sums() * held.grain
    ledger = dp.PrivacyLedger(1e6, 1e-6)
    got = [held.release(ledger) for _ in range(releases)]
    require_mean(np.array([np.append(g.values, g.class_rows) for g in got]), np.append(wanted[:-3], wanted[-3:] / 0.1))


@pytest.mark.parametrize(("similarity", "least"), [("kernel", 0.85), ("dot", 0.6), ("l2sq", 0.8)])
def test_digits_are_told_apart(similarity, least):
    x, y = load_digits(return_X_y=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    model = PrivateSimilarityClassifier(range(10), similarity=similarity, bandwidth=0.4, epsilon=8.0, **SEEDED)
    assert model.fit(x[::2], y[::2]).score(x[1::2], y[1::2]) > least


def test_what_is_released_says_its_terms_and_survives_saving(tmp_path):
    x, y = task()
    model = make(neighbours="replace").fit(x, y)
    assert model.public_.privacy["neighbours"] == "replace" and model.ledger_.epsilon_spent <= 1
    twin = quernel.load(model.public_.save(tmp_path))
    assert type(twin) is PublicSimilarities and twin.config() == model.public_.config()
    np.testing.assert_array_equal(twin.predict(x), model.predict(x))
    np.testing.assert_array_equal(model.decision_function(x), twin.query(x))
    assert list(model.classes_) == ["c", "a", "b"] and model.n_features_in_ == 4


def test_two_classes_give_one_column():
    x, y = task(n_classes=2)
    model = PrivateSimilarityClassifier(n_features=64, **SEEDED).fit(x, y, classes=["a", "b"])
    scores = model.decision_function(x)
    assert scores.shape == (600,)
    np.testing.assert_array_equal(model.predict(x), np.where(scores > 0, "b", "a"))


def test_scikit_learns_manners():
    model = make(bandwidth=2.0)
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        model.predict(np.ones((1, 4)))


def test_settings_stay_those_of_the_rows_that_were_collected():
    x, y = task()
    model = make().set_params(classes=None).partial_fit(x, y, ["a", "b", "c"])
    for changed in ({"epsilon": 0.1}, {"bandwidth": 3.0}):
        before = {name: model.get_params()[name] for name in changed}
        model.set_params(**changed)
        for call in (model.release, lambda: model.partial_fit(x, y), lambda: model.merge(make())):
            with pytest.raises(QuernelError, match=f"{next(iter(changed))} changed since rows were collected"):
                call()
        model.set_params(**before)
    with pytest.raises(QuernelError, match="classes changed"):
        model.partial_fit(x, y, ["a", "b", "c", "d"])
    ledger = dp.PrivacyLedger(3.0, 1e-6)
    model.partial_fit(x, y).release(ledger, epsilon=0.5, label="half")
    assert model.public_.privacy["epsilon"] == 0.5 and ledger.spendings[0].label == "half"


def test_sites_without_rows_can_be_merged():
    x, y = task()
    total, whole = make(), make().fit(x, y)
    for site in (make(), make().partial_fit(x, y), make()):
        total.merge(site)
    np.testing.assert_array_equal(total.release().public_.values, whole.public_.values)
    other = make().set_params(classes=None).merge(make().partial_fit(x, y))
    assert other.release().classes_.tolist() == whole.classes_.tolist()


def test_a_second_fit_must_be_paid():
    x, y = task()
    model = make().fit(x, y)
    with pytest.raises(BudgetExceeded, match="PrivateSimilarityClassifier needs epsilon=1"):
        model.fit(x, y)
    ledger = dp.PrivacyLedger(3.0, 1e-6)
    model.fit(x, y, ledger=ledger)
    assert len(ledger.spendings) == 1 and model.ledger_ is ledger
    with pytest.raises(QuernelError, match="nothing was collected"):
        model.release()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: PrivateSimilarityClassifier().fit(x, y), QuernelError, "classes must be given"),
        (
            lambda x, y: make().set_params(classes=None).fit(x, y, classes=["a", "a"]),
            QuernelError,
            "two or more different",
        ),
        (
            lambda x, y: make().set_params(classes=["a", "b"]).fit(x, y),
            QuernelError,
            "labels that are not among classes",
        ),
        (lambda x, y: make().fit(x, y, classes=["a", "b"]), QuernelError, "classes must be those of the constructor"),
        (lambda x, y: make().merge(PrivateKDE()), QuernelError, "other must be PrivateSimilarityClassifier"),
        (lambda x, y: make().fit(x, y[:-1]), ValueError, "inconsistent numbers of samples"),
        (lambda x, y: make("cosine").fit(x, y), QuernelError, "similarity must be one of"),
        (lambda x, y: make("dot").fit(9 * x, y), QuernelError, "outside the declared Ball"),
        (lambda x, y: make(bandwidth="scale").fit(x, y), QuernelError, "computed from the private rows"),
        (lambda x, y: make(count_weight=0.0).fit(x, y), QuernelError, "count_weight must be positive"),
        (lambda x, y: make(delta=0.0, mechanism="gaussian").fit(x, y), PrivacyError, "needs delta > 0"),
        (lambda x, y: make().fit(x, y).predict(x[:, :2]), ValueError, "is expecting 4 features"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(*task())
