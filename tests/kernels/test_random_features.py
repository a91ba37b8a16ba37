"""The transformers: kernels in the mean, all projections, parameters refused by name."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline

from quernel._errors import QuernelError
from quernel.kernels import ArcCosineFeatures, RandomFourierFeatures
from quernel.kernels.features import arc_cosine_kernel
from quernel.kernels.features.orthogonal import PROJECTIONS

# Kernel values of size one from 8,192 columns: a standard error of about 0.01, 45 of them compared.
CLOSE = 0.06
# A term of order p is 2 (g.x)^2p on half the directions: standard deviations 1, 2.2 and 14 for unit vectors.
SPREAD = {0: 1, 1: 2.2, 2: 14}


def rows(n=10, d=48):
    # Wide enough for Hadamard-structured directions, which in a few dimensions are visibly not Gaussian.
    return np.random.default_rng(1).standard_normal((n, d)) / d**0.5


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_fourier_features_estimate_the_gaussian_kernel(projection):
    x = rows()
    z = RandomFourierFeatures(8192, gamma=0.5, projection=projection, random_state=0).fit_transform(x)
    np.testing.assert_allclose(z @ z.T, RBF(1.0)(x), atol=CLOSE)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_features_estimate_their_kernel(projection, order):
    x = rows() / np.linalg.norm(rows(), axis=1, keepdims=True)
    maps = ArcCosineFeatures(8192, order=order, center=False, projection=projection, random_state=0)
    z = maps.fit_transform(x)
    np.testing.assert_allclose(z @ z.T, arc_cosine_kernel(x, x, order), atol=SPREAD[order] * CLOSE)


def test_centre_is_the_mean_nothing_or_what_is_given():
    x = rows() + 5
    mean = ArcCosineFeatures(32, random_state=0).fit(x)
    np.testing.assert_allclose(mean.center_, x.mean(0))
    given = ArcCosineFeatures(32, center=x.mean(0).tolist(), random_state=0).fit(x[:3])
    np.testing.assert_array_equal(given.transform(x), mean.transform(x))
    assert not ArcCosineFeatures(32, center=False, random_state=0).fit(x).center_.any()


def test_scale_is_scikit_learn_s():
    x = rows()
    fitted = RandomFourierFeatures(4, random_state=0).fit(x)
    assert fitted.gamma_ == pytest.approx(1 / (48 * x.var()))
    assert RandomFourierFeatures(4, random_state=0).fit(np.ones((3, 2))).gamma_ == 1.0


def test_hadamard_directions_store_signs_instead_of_numbers():
    x = np.zeros((2, 500))
    held = {p: ArcCosineFeatures(512, projection=p, random_state=0).fit(x).arrays() for p in ("orthogonal", "hadamard")}
    sizes = {p: sum(a.nbytes for a in arrays.values()) for p, arrays in held.items()}
    assert sizes["orthogonal"] == 8 * 512 * 500 + 8 * 500
    assert sizes["hadamard"] == 3 * 512 + 8 * 512 + 8 * 500


def test_a_pipeline_beats_a_linear_model():
    x, y = load_digits(return_X_y=True)
    model = make_pipeline(ArcCosineFeatures(512, random_state=0), RidgeClassifier(1e-2)).fit(x[:900], y[:900])
    assert model.score(x[900:], y[900:]) > RidgeClassifier(1e-2).fit(x[:900], y[:900]).score(x[900:], y[900:]) + 0.02
    assert model[0].get_feature_names_out()[0] == "arccosinefeatures0"


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (RandomFourierFeatures(7), "n_features must be even"),
        (RandomFourierFeatures(0), "n_features must be an integer in"),
        (RandomFourierFeatures(gamma=0.0), "gamma must be a finite number in"),
        (RandomFourierFeatures(gamma="auto"), 'gamma must be "scale" or'),
        (RandomFourierFeatures(projection="dense"), "projection must be one of"),
        (RandomFourierFeatures(random_state=-1), "random_state must be"),
        (ArcCosineFeatures(order=3), "order must be one of"),
        (ArcCosineFeatures(order=2, threshold=1.0), "threshold needs order=1"),
        (ArcCosineFeatures(center=np.zeros(3)), r"center must have shape \(48,\)"),
        (ArcCosineFeatures(center="mean"), "center must be True, False or"),
        (ArcCosineFeatures(center=[[1.0]]), r"got shape \(1, 1\)"),
        (ArcCosineFeatures(center=[np.inf] * 48), "center holds NaN or infinity"),
    ],
)
def test_bad_parameters_are_named_by_fit(estimator, message):
    with pytest.raises(QuernelError, match=message):
        estimator.fit(rows())
