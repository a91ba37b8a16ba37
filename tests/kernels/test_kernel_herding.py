"""KernelHerding: the textbook's sequence, its identity with Frank-Wolfe, its quality, and what an index may do."""

import numpy as np
import pytest
from sklearn.base import clone

from quernel._errors import QuernelError
from quernel.kernels import FrankWolfe, KernelHerding, RandomFourierFeatures
from quernel.search import FlatIndex, MaxIPIndex
from tests.reference import frank_wolfe as oracle


def rows(n=400, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("init", ["mu", "zero"])
@pytest.mark.parametrize("lmo", ["exact", "index"])
def test_the_sequence_is_the_textbooks(init, lmo):
    x = rows() + 1
    index = "exact" if lmo == "exact" else oracle.Lookup()
    model = KernelHerding(50, feature_map="passthrough", lmo=index, init=init).fit(x)
    chosen, _ = oracle.herding(x, 50, init)
    np.testing.assert_array_equal(model.indices_, chosen)
    assert model.discrepancy_ == pytest.approx(np.linalg.norm(x.mean(0) - x[chosen].mean(0)), abs=1e-12)
    assert model.n_exact_scans_ == (50 if lmo == "exact" else 0)


@pytest.mark.parametrize("init", ["mu", "zero"])
def test_w_is_the_error_of_the_running_mean(init):
    # w_t = t (mu - z_t) from w_0 = 0, and mu more from w_0 = mu.
    x = rows() + 1
    asked = []

    class Watched(oracle.Lookup):
        def best(self, q):
            asked.append(np.array(q))
            return int(np.argmax(x @ q)), 0.0

    model = KernelHerding(60, feature_map="passthrough", lmo=Watched(), init=init).fit(x)
    chosen, _ = oracle.herding(x, 60, init)
    np.testing.assert_array_equal(model.indices_, chosen)
    mu = x.mean(0)
    assert len(asked) == 60
    np.testing.assert_allclose(asked[0], mu, atol=1e-12)
    for t in range(1, 60):
        z = x[model.indices_[:t]].mean(0)
        np.testing.assert_allclose(asked[t], t * (mu - z) + (mu if init == "mu" else 0), atol=1e-10)


def test_from_zero_it_is_frank_wolfe():
    # Step 1 / (t + 1) on |z - mu|^2 / 2, which starts at the atom of largest <mu, x>.
    x = rows() + 1
    model = KernelHerding(30, feature_map="passthrough", init="zero").fit(x)
    mu = x.mean(0)
    points = oracle.frank_wolfe(x, mu, int(np.argmax(x @ mu)), 29, lambda t, *_: 1 / (t + 2))
    for t in range(30):
        np.testing.assert_allclose(points[t], x[model.indices_[: t + 1]].mean(0), atol=1e-10)
    assert FrankWolfe(tol=1e-15, max_iter=3, start=int(model.indices_[0])).fit(x, mu).objective_ < 1


def test_it_beats_random_rows():
    x = rows(1000)
    model = KernelHerding(50, random_state=0).fit(x)
    features = model.feature_map_.transform(x)
    draw = np.random.default_rng(0)
    random = [
        np.linalg.norm(features.mean(0) - features[draw.choice(1000, 50, replace=False)].mean(0)) for _ in range(20)
    ]
    assert model.discrepancy_ < 0.35 * np.median(random)


@pytest.mark.parametrize("index", [FlatIndex(64, "ip"), MaxIPIndex(64)])
def test_an_index_chooses_about_as_well(index):
    x = rows(2000)
    features = RandomFourierFeatures(64, random_state=0)
    exact = KernelHerding(40, feature_map=features).fit(x)
    model = KernelHerding(40, feature_map=features, lmo=index).fit(x)
    assert model.discrepancy_ <= 1.1 * exact.discrepancy_ + 1e-3
    assert len(index) == 0 and len(model.index_) == 2000 and model.n_exact_scans_ <= 4


@pytest.mark.parametrize("answer", [-1, 10**6, 0])
def test_bad_answers_are_replaced_by_scans(answer):
    x = rows()
    model = KernelHerding(40, feature_map="passthrough", lmo=oracle.Lookup(lambda p: answer if answer < len(p) else -1))
    model.fit(x)
    exact = KernelHerding(40, feature_map="passthrough").fit(x)
    assert model.n_exact_scans_ > 0 and model.discrepancy_ < 5 * exact.discrepancy_ + 0.05


def test_equal_rows_and_few_rows():
    assert KernelHerding(5, random_state=0).fit(np.ones((3, 2))).indices_.tolist() == [0] * 5
    model = KernelHerding(9, random_state=0).fit(rows(3))
    assert model.indices_.shape == (9,) and set(model.indices_) <= {0, 1, 2}


def test_an_index_cannot_be_saved_as_a_parameter(tmp_path):
    model = KernelHerding(5, lmo=MaxIPIndex(512), random_state=0).fit(rows(50))
    with pytest.raises(QuernelError, match="lmo is a MaxIPIndex, which a file cannot hold"):
        model.save(tmp_path)
    assert len(clone(model).lmo) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples must be"),
        ({"init": "random"}, "init must be one of 'mu', 'zero'"),
        ({"lmo": "lsh"}, "lmo must be one of 'exact'"),
        ({"lmo": object()}, 'lmo must be "exact" or an index'),
        ({"feature_map": "rff"}, 'feature_map must be a transformer, "passthrough" or None'),
        ({"feature_map": 5}, "feature_map must be a transformer"),
        ({"random_state": -1}, "random_state must be"),
        ({"lmo": FlatIndex(512, "ip").add(np.ones((3, 512)))}, "lmo holds 3 items, but there are 50 atoms"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(QuernelError, match=message):
        KernelHerding(**arguments).fit(rows(50))


def test_another_mean_is_approached():
    x = rows()
    wanted = x[:30].mean(0)
    model = KernelHerding(60, feature_map="passthrough").fit(x, mean=wanted)
    assert model.discrepancy_ == pytest.approx(np.linalg.norm(wanted - x[model.indices_].mean(0)), abs=1e-12)
    assert model.discrepancy_ < 0.1 < np.linalg.norm(wanted - x.mean(0))
    for mean, message in ((np.ones(3), r"mean must have shape \(4,\)"), (np.full(4, np.nan), "mean holds NaN")):
        with pytest.raises(QuernelError, match=message):
            KernelHerding(5, feature_map="passthrough").fit(x, mean=mean)
