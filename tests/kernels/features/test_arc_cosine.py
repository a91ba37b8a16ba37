"""Arc-cosine kernels against Cho and Saul's formula, and their features against the kernels."""

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels.features import (
    arc_cosine_features,
    arc_cosine_kernel,
    gaussian_directions,
    orthogonal_directions,
)
from tests.reference import snnk as oracle

STANDARD_ERRORS = 5.0  # two-sided, false alarm 6e-7
DRAWS = 50


def vectors(n=6, dim=5):
    return np.random.default_rng(3).standard_normal((n, dim))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_kernel_is_the_published_one(order):
    x, y = vectors()[:4], vectors()[4:]
    wanted = [[oracle.arc_cosine(a, b, order) for b in y] for a in x]
    np.testing.assert_allclose(arc_cosine_kernel(x, y, order), wanted, rtol=1e-12)


def test_kernel_at_its_ends():
    x = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(arc_cosine_kernel(x, x, 1), [[1, 0, 0], [0, 4, 0], [0, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(arc_cosine_kernel(x, x, 0), [[1, 0, 0], [0, 1, 0], [0, 0, 0]], atol=1e-12)
    # The same direction twice: rounding may push the cosine past 1.
    row = np.full((1, 7), 0.1)
    assert arc_cosine_kernel(row, row * 3, 1)[0, 0] == pytest.approx(3 * 0.07)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_features_estimate_the_kernel(order):
    x, y = vectors()[0], vectors()[1]
    n = 60000
    p = gaussian_directions(n, 5, seed=order) @ np.stack([x, y]).T  # (n, 2)
    a, b = arc_cosine_features(p.T, order)
    terms = a * b * n
    error = abs(terms.mean() - oracle.arc_cosine(x, y, order))
    assert error < STANDARD_ERRORS * terms.std() / np.sqrt(n)


def test_snnk_features_are_those_of_order_one_without_the_two():
    x = vectors()
    g = gaussian_directions(9, 5, seed=0)
    ours = arc_cosine_features(x @ g.T)
    np.testing.assert_allclose(ours, [np.sqrt(2) * oracle.relu_features(row, g) for row in x])


def mean_squared_error(maker, n, seeds):
    x = vectors(8, 16)
    exact = arc_cosine_kernel(x, x)
    errors = []
    for seed in seeds:
        z = arc_cosine_features(x @ maker(n, 16, seed).T)
        errors.append(((z @ z.T - exact) ** 2).mean())
    return np.array(errors)


def test_error_falls_like_one_over_the_square_root():
    small, large = (mean_squared_error(gaussian_directions, n, range(30)).mean() ** 0.5 for n in (64, 1024))
    assert small / large == pytest.approx(4.0, rel=0.25)


def test_orthogonal_directions_are_not_worse():
    # The same seeds for both, 50 draws: a paired comparison of mean squared errors.
    gaussian = mean_squared_error(gaussian_directions, 64, range(DRAWS))
    orthogonal = mean_squared_error(orthogonal_directions, 64, range(DRAWS))
    difference = orthogonal - gaussian
    assert difference.mean() <= 2 * difference.std() / np.sqrt(DRAWS)
    assert orthogonal.mean() < gaussian.mean()


def test_threshold_is_a_floor():
    p = torch.tensor([[-1.0, 0.2, 2.0]])
    torch.testing.assert_close(arc_cosine_features(p, 1, 0.5), torch.tensor([[0.5, 0.5, 2.0]]) * (2 / 3) ** 0.5)


def test_bad_input_is_named():
    with pytest.raises(QuernelError, match="order must be one of 0, 1, 2"):
        arc_cosine_features(torch.zeros(1, 2), 3)
    with pytest.raises(QuernelError, match="threshold needs order=1"):
        arc_cosine_features(torch.zeros(1, 2), 2, 0.5)
    with pytest.raises(QuernelError, match="equal width"):
        arc_cosine_kernel(torch.zeros(1, 2), torch.zeros(1, 3))
