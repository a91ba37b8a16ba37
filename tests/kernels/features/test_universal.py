"""Universal random features: unbiased, of the predicted second moment, and the complex definition in real numbers."""

import math

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels.features import (
    SPECTRA,
    Spectrum,
    best_damping,
    gaussian_directions,
    universal_features,
    universal_weight_features,
)
from quernel.kernels.features.universal import check_exponents, log_scales, second_moment, slopes, spectrum_of
from tests.reference import snnk as oracle

# The estimates are means of independent terms; |mean - f| beyond 4 standard errors happens by chance once in 16,000.
STANDARD_ERRORS = 4.0
SAMPLES, DIM, LENGTH = 400_000, 16, 0.8


def pair():
    """Return x and w of length 0.8, with an angle of about 60 degrees, and a bias."""
    draw = np.random.default_rng(5)
    x, w = draw.standard_normal((2, DIM))
    w = w + 0.6 * x
    return LENGTH * x / np.linalg.norm(x), LENGTH * w / np.linalg.norm(w), 0.3


def columns(x, w, b, directions, xi, damping, ratio):
    """Return the real columns of one x and one (w, b) as the package computes them."""
    slope = slopes(xi, damping)
    scale = log_scales((directions**2).sum(1), directions.shape[1], damping)
    of_x = universal_features((directions @ x * slope)[None], np.array([[x @ x]]), xi, scale)[0]
    scaled, squares = (directions @ w * slope)[None], np.array([[w @ w]])
    of_w = universal_weight_features(scaled, squares, xi, scale, ratio, np.array([b]))[0]
    return of_x, of_w


@pytest.mark.parametrize("damping", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("name", sorted(SPECTRA))
def test_estimate_is_unbiased(name, damping):
    x, w, b = pair()
    draw = np.random.default_rng(17)
    xi = SPECTRA[name].sample(draw, SAMPLES)
    of_x, of_w = columns(x, w, b, gaussian_directions(SAMPLES, DIM, draw), xi, damping, SPECTRA[name].ratio(xi))
    terms = (of_x * of_w).reshape(2, SAMPLES).sum(0) * SAMPLES
    error = abs(terms.mean() - oracle.ACTIVATIONS[name](w @ x + b))
    assert error < STANDARD_ERRORS * terms.std() / math.sqrt(SAMPLES)


@pytest.mark.parametrize("damping", [0.0, 0.02, 0.1])
def test_second_moment_is_the_formula(damping):
    x, w, _ = pair()
    xi = np.full(SAMPLES, 1 / (2 * math.pi))
    of_x, of_w = columns(x, w, 0.0, gaussian_directions(SAMPLES, DIM, seed=2), xi, damping, np.ones(SAMPLES))
    moduli = [np.square(c.reshape(2, SAMPLES)).sum(0) * SAMPLES for c in (of_x, of_w)]
    s = math.pi * abs(xi[0]) * ((x + w) ** 2).sum()
    assert (moduli[0] * moduli[1]).mean() == pytest.approx(second_moment(s, DIM, damping), rel=0.03)


@pytest.mark.parametrize("s", [0.05, 0.5, 1.0, 4.0])
def test_best_damping_is_the_grid_s(s):
    grid = np.linspace(0, 1, 20001)
    moments = [second_moment(s, DIM, m) for m in grid]
    assert float(best_damping(s, DIM)) == pytest.approx(grid[int(np.argmin(moments))], abs=6e-5)


def test_best_damping_of_nothing_is_nothing():
    assert float(best_damping(0.0, DIM)) == 0.0
    with pytest.raises(QuernelError, match="finite and >= 0"):
        best_damping(-1.0, DIM)


@pytest.mark.parametrize("name", sorted(SPECTRA))
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_real_columns_are_the_complex_definition(name, damping):
    x, w, b = pair()
    draw = np.random.default_rng(1)
    xi = SPECTRA[name].sample(draw, 6)
    g = gaussian_directions(6, DIM, draw)
    ratio = SPECTRA[name].ratio(xi)
    of_x, of_w = columns(x, w, b, g, xi, damping, ratio)
    phi, psi = oracle.phi(x, g, xi, damping), oracle.psi(w, b, g, xi, damping, ratio)
    np.testing.assert_allclose(of_x, np.concatenate([phi.real, phi.imag]), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(of_w, np.concatenate([psi.real, -psi.imag]), rtol=1e-10, atol=1e-12)
    assert of_x @ of_w == pytest.approx((phi * psi).sum().real, rel=1e-10)


def test_opposite_frequencies_are_conjugate_and_their_sum_is_real():
    x, w, b = pair()
    g, xi = gaussian_directions(5, DIM, seed=0), np.array([0.1, 0.2, 0.15, 0.3, 0.01])
    plus, minus = (oracle.phi(x, g, f, 0.01) for f in (xi, -xi))
    np.testing.assert_allclose(minus, plus.conj(), rtol=1e-12)
    ours, _ = columns(x, w, b, g, -xi, 0.01, np.ones(5))
    np.testing.assert_allclose(ours, np.concatenate([plus.real, -plus.imag]), rtol=1e-10, atol=1e-12)
    # Two halves with the same g, each by 1 / sqrt 2: exactly the real part.
    psi = [oracle.psi(w, b, g, f, 0.01, np.ones(5)) for f in (xi, -xi)]
    both = (psi[0] * plus).sum() / 2 + (psi[1] * minus).sum() / 2
    assert abs(both.imag) < 1e-6
    assert both.real == pytest.approx((psi[0] * plus).sum().real, rel=1e-10)


def test_zero_vectors_have_exact_values():
    zero, g = np.zeros(DIM), gaussian_directions(4, DIM, seed=0)
    xi, b = SPECTRA["cos"].sample(np.random.default_rng(0), 4), 0.4
    of_x, of_w = columns(zero, zero, b, g, xi, 0.0, SPECTRA["cos"].ratio(xi))
    np.testing.assert_allclose(of_x, np.repeat([0.5, 0.0], 4), atol=1e-15)
    assert of_x @ of_w == pytest.approx(math.cos(b), abs=1e-12)


def test_a_spectrum_of_one_s_own():
    # f(z) = 2 cos(2 z): two spikes of weight one at +-1 / pi.
    def sample(draw, n):
        return (draw.integers(0, 2, n) * 2 - 1) / math.pi

    own = Spectrum("twice", sample, lambda xi: np.full(len(xi), 2.0 + 0j))
    assert spectrum_of(own) is own
    x, w, b = pair()
    xi = sample(np.random.default_rng(3), SAMPLES)
    of_x, of_w = columns(x, w, b, gaussian_directions(SAMPLES, DIM, seed=4), xi, 0.05, own.ratio(xi))
    terms = (of_x * of_w).reshape(2, SAMPLES).sum(0) * SAMPLES
    assert abs(terms.mean() - 2 * math.cos(2 * (w @ x + b))) < STANDARD_ERRORS * terms.std() / math.sqrt(SAMPLES)


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "", None])
def test_activations_without_a_transform_are_refused(name):
    with pytest.raises(QuernelError, match="no integrable Fourier transform; use kind='relu'"):
        spectrum_of(name)


def test_rows_too_long_are_refused_before_they_overflow():
    xi = torch.tensor([1 / (2 * math.pi)])
    check_exponents(torch.tensor([[14.9]]), xi, "x")
    with pytest.raises(QuernelError, match=r"x has rows of length up to 3\.89.*exp\(60\.4\).*Normalise"):
        check_exponents(torch.tensor([[15.1]]), xi, "x")
    with pytest.raises(QuernelError, match="Normalise"):
        check_exponents(torch.tensor([[float("nan")]]), xi, "x")
    check_exponents(torch.zeros(0, 1), xi, "x")


@pytest.mark.parametrize("frequency", [0.05, 1 / (2 * math.pi), 0.7])
def test_sides_that_pass_alone_cannot_exceed_the_limit_together(frequency):
    """The variance is that of |x + w|^2: 2 pi |xi| |x + w|^2 stays within 60 even for parallel rows."""
    xi = torch.tensor([frequency], dtype=torch.float64)
    squares = torch.linspace(0, 100, 4001, dtype=torch.float64)

    def passes(square):
        try:
            check_exponents(square[None, None], xi, "x")
        except QuernelError:
            return False
        return True

    longest = max(float(s) for s in squares if passes(s))
    together = 4 * 2 * math.pi * frequency * longest  # |x + w| = 2 |x| for w = x
    assert 0.98 * 60 < together <= 60
