"""Paired Fourier features: unit length, the Gaussian kernel in the mean, and less noise than offsets give."""

import numpy as np
import pytest
import torch
from sklearn.kernel_approximation import RBFSampler

from quernel._errors import QuernelError
from quernel.kernels.features import fourier_features, gaussian_directions

STANDARD_ERRORS = 5.0  # two-sided, false alarm 6e-7


def test_pairs_have_unit_length_and_the_shape_says_so():
    z = fourier_features(torch.randn(5, 7, dtype=torch.float64))
    assert z.shape == (5, 14)
    torch.testing.assert_close(z.square().sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_kind_are_kept(dtype):
    assert fourier_features(torch.ones(2, 3, dtype=dtype)).dtype is dtype
    assert fourier_features(np.ones((2, 3), np.float32)).dtype == np.float32


def test_dot_products_estimate_the_gaussian_kernel():
    x, y, gamma, n = np.array([0.3, -0.2, 0.5]), np.array([-0.1, 0.4, 0.2]), 0.7, 40000
    g = gaussian_directions(n, 3, seed=0) * np.sqrt(2 * gamma)
    terms = np.cos(g @ (x - y))  # what a pair of columns adds up to
    estimate = fourier_features(g @ x) @ fourier_features(g @ y)
    assert estimate == pytest.approx(terms.mean(), abs=1e-12)
    error = abs(estimate - np.exp(-gamma * ((x - y) ** 2).sum()))
    assert error < STANDARD_ERRORS * terms.std() / np.sqrt(n)


def test_pairs_are_less_noisy_than_offsets_at_equal_columns():
    points = np.random.default_rng(0).standard_normal((20, 4)) * 0.5
    exact = np.exp(-0.5 * ((points[:, None] - points) ** 2).sum(2))
    ours, theirs = [], []
    for seed in range(40):
        z = fourier_features(points @ gaussian_directions(32, 4, seed).T)
        ours.append(((z @ z.T - exact) ** 2).mean())
        z = RBFSampler(gamma=0.5, n_components=64, random_state=seed).fit_transform(points)
        theirs.append(((z @ z.T - exact) ** 2).mean())
    assert np.mean(ours) < 0.8 * np.mean(theirs)


def test_bad_input_is_named():
    with pytest.raises(QuernelError, match="projections must be floating point"):
        fourier_features(torch.zeros(2, 0))
