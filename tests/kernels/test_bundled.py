"""Bundled models: ridge on random features exactly, in shards too; probabilities; what is refused."""

import copy
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import quernel
from quernel._errors import QuernelError
from quernel.kernels import BundledClassifier, BundledRegressor

SAME = 1e-8  # float64 solves of 64 features with a condition number near 1e5
LETTERS = np.array(list("abcdefghij"))


def digits(n=600):
    x, y = load_digits(return_X_y=True)
    return x[:n] / 16, y[:n]


def absolute(model, x):
    """Return the alpha that scikit-learn adds to the diagonal where ours is relative."""
    return model.alpha * model.features_.transform(x).var(0).mean() * len(x)


def test_regression_is_ridge_on_the_features():
    x, y = load_diabetes(return_X_y=True)
    targets = np.stack([y, y**2], axis=1)
    model = BundledRegressor(64, random_state=0).fit(x, targets)
    theirs = Ridge(absolute(model, x)).fit(model.features_.transform(x), targets)
    np.testing.assert_allclose(model.predict(x), theirs.predict(model.features_.transform(x)), rtol=SAME)
    assert model.predict(x).shape == targets.shape
    assert BundledRegressor(64, random_state=0).fit(x, y).predict(x).shape == y.shape


@pytest.mark.parametrize("classes", [2, 10])
def test_classification_is_the_ridge_classifier_on_the_features(classes):
    x, y = digits()
    x, y = x[y < classes], LETTERS[y[y < classes]]
    model = BundledClassifier(64, random_state=0).fit(x, y)
    phi = model.features_.transform(x)
    theirs = RidgeClassifier(absolute(model, x)).fit(phi, y)
    np.testing.assert_allclose(model.decision_function(x), theirs.decision_function(phi), atol=SAME)
    np.testing.assert_array_equal(model.predict(x), theirs.predict(phi))
    assert not hasattr(model, "predict_proba")


def test_targets_in_the_span_come_back_exactly():
    x, _ = digits(300)
    phi = BundledRegressor(32, random_state=0).fit(x, np.zeros(300)).features_.transform(x)
    y = phi @ np.random.default_rng(0).standard_normal((32, 2)) + 3
    model = BundledRegressor(32, alpha=1e-12, random_state=0).fit(x, y)
    np.testing.assert_allclose(model.predict(x), y, rtol=1e-7)


@pytest.mark.parametrize("kind", ["relu", "urf"])
def test_shards_merge_to_one_pass(kind):
    x, y = digits()
    x = x / np.linalg.norm(x, axis=1, keepdims=True) * np.linspace(0.5, 1.5, len(x))[:, None]
    options = {"kind": kind, "center": x.mean(0), "damping": 0.02, "random_state": 0}
    whole = BundledClassifier(64, **options).fit(x, y)
    shards = [BundledClassifier(64, **options).fit(x[i::3], y[i::3]) for i in range(3)]
    merged = shards[0].merge(shards[1]).merge(shards[2])
    np.testing.assert_allclose(merged.coef_, whole.coef_, rtol=1e-6, atol=1e-9)
    assert merged.sums_.count == len(x)
    streamed = BundledClassifier(64, **options)
    for rows in np.array_split(np.random.default_rng(1).permutation(len(x)), 4):
        streamed.partial_fit(x[rows], y[rows], classes=np.arange(10))
    np.testing.assert_allclose(streamed.coef_, whole.coef_, rtol=1e-6, atol=1e-9)
    with pytest.raises(QuernelError, match="merge needs the sums of both"):
        merged.merge(copy.deepcopy(whole).forget())


def test_damping_from_the_rows_differs_between_shards():
    x, y = digits()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    one, other = (BundledClassifier(64, kind="urf", random_state=0).fit(part, y) for part in (x, 0.5 * x))
    with pytest.raises(QuernelError, match="damping= a number"):
        one.merge(other)


def test_a_copy_that_saw_other_rows_can_be_merged_back():
    x, y = digits()
    first = BundledRegressor(32, random_state=0).partial_fit(x[:100], y[:100])
    start = first.features_.center_
    away = copy.deepcopy(first)
    away.sums_ = type(away.sums_)(32, 1)
    away.partial_fit(x[100:], y[100:])
    joined = first.merge(away)
    np.testing.assert_allclose(
        joined.predict(x), BundledRegressor(32, center=start, random_state=0).fit(x, y).predict(x), rtol=1e-6
    )


def test_merging_other_features_or_classes_is_refused():
    x, y = digits()
    one = BundledClassifier(32, random_state=0).fit(x, y)
    for other, message in (
        (BundledClassifier(32, random_state=1).fit(x, y), "same random features"),
        (BundledClassifier(32, random_state=0).fit(x[:300], y[:300]), "center= an array"),
        (BundledClassifier(32, random_state=0).fit(x[y < 5], y[y < 5]), "same classes"),
    ):
        with pytest.raises(QuernelError, match=message):
            one.merge(other)
    with pytest.raises(QuernelError, match="other must be BundledClassifier"):
        one.merge(BundledRegressor(32, random_state=0).fit(x, y))


def test_logistic_loss_gives_probabilities_that_are_the_solver_s():
    x, y = digits()
    model = BundledClassifier(64, loss="logistic", random_state=0).fit(x, y)
    phi = model.features_.transform(x)
    theirs = LogisticRegression(C=1 / absolute(model, x), max_iter=1000).fit(phi, y)
    np.testing.assert_allclose(model.predict_proba(x), theirs.predict_proba(phi), atol=1e-6)
    two = BundledClassifier(64, loss="logistic", random_state=0).fit(x[y < 2], y[y < 2])
    p = two.predict_proba(x[:50])
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(p.argmax(1), two.predict(x[:50]))


def test_logistic_loss_cannot_be_continued():
    x, y = digits(100)
    model = BundledClassifier(16, loss="logistic", random_state=0)
    with pytest.raises(QuernelError, match="partial_fit needs loss='squared'"):
        model.partial_fit(x, y, classes=np.arange(10))
    model.fit(x, y)
    with pytest.raises(QuernelError, match="merge needs the sums"):
        model.merge(copy.deepcopy(model))


def test_digits_and_diabetes_are_learned_without_a_gradient_step():
    x, y = load_digits(return_X_y=True)
    assert BundledClassifier(512, random_state=0).fit(x[:1000], y[:1000]).score(x[1000:], y[1000:]) > 0.93
    x, y = load_diabetes(return_X_y=True)
    model = make_pipeline(StandardScaler(), BundledRegressor(256, alpha=1.0, random_state=0)).fit(x[:350], y[:350])
    assert model.score(x[350:], y[350:]) > 0.4


def test_forgetting_makes_files_smaller_and_predictions_the_same(tmp_path):
    x, y = digits()
    model = BundledClassifier(128, projection="hadamard", random_state=0).fit(x.astype(np.float32), y)
    whole = sum(f.stat().st_size for f in model.save(tmp_path / "whole").iterdir())
    wanted = model.decision_function(x)
    small = sum(f.stat().st_size for f in model.forget().save(tmp_path / "small").iterdir())
    twin = quernel.load(tmp_path / "small")
    np.testing.assert_array_equal(twin.decision_function(x), wanted)
    # float32: 10 coefficients and one length a feature, some signs, and the JSON.
    assert small < 4 * 128 * 11 + 3 * 128 + 4000 < whole
    with pytest.raises(QuernelError, match="forget"):
        twin.partial_fit(x, y)


SCRIPT = """
import sys, numpy as np, quernel
model = quernel.load(sys.argv[1])
x = np.load(sys.argv[2])
np.save(sys.argv[2], model.decision_function(x))
sys.stdout.write(" ".join(model.predict(x)))
"""


@pytest.mark.slow
def test_a_saved_model_works_in_a_process_of_its_own(tmp_path):
    x, y = digits()
    model = BundledClassifier(64, projection="hadamard", random_state=0).fit(x, LETTERS[y])
    folder = model.save(tmp_path / "model")
    np.save(tmp_path / "x.npy", x[:20])
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "x.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.split() == model.predict(x[:20]).tolist()
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), model.decision_function(x[:20]), rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BundledClassifier(0), "n_features must be an integer in"),
        (BundledClassifier(kind="gauss"), "kind must be one of 'relu', 'urf'"),
        (BundledClassifier(alpha=-1.0), "alpha must be"),
        (BundledClassifier(alpha=0.0, loss="logistic"), "alpha must be"),
        (BundledClassifier(loss="hinge"), "loss must be one of"),
        (BundledClassifier(kind="urf", activation="relu"), "no integrable Fourier transform"),
        (BundledClassifier(projection="none"), "projection must be one of"),
        (BundledClassifier(kind="urf", damping=-1.0), "damping must be"),
    ],
)
def test_bad_parameters_are_named(model, message):
    with pytest.raises(QuernelError, match=message):
        model.fit(*digits(50))


def test_bad_labels_are_named():
    x, y = digits(100)
    with pytest.raises(QuernelError, match="at least two classes; got 1 class"):
        BundledClassifier(16).fit(x, np.zeros(100, int))
    model = BundledClassifier(16, random_state=0)
    with pytest.raises(QuernelError, match="classes must be given to the first partial_fit"):
        model.partial_fit(x, y)
    with pytest.raises(QuernelError, match="at least two classes"):
        model.partial_fit(x, y, classes=[1])
    model.partial_fit(x, y, classes=np.arange(10))
    with pytest.raises(QuernelError, match="which is not one of the classes"):
        model.partial_fit(x, y + 5)
    with pytest.raises(QuernelError, match="classes must be those of the first"):
        model.partial_fit(x, y, classes=[1, 2])
    with pytest.raises(QuernelError, match="y must have 1 columns as before; got 2"):
        BundledRegressor(16, random_state=0).partial_fit(x, y).partial_fit(x, np.stack([y, y], 1))
