"""Spectral samplers: the mean of paired features is the kernel, at every dimension; kernels by definition; refusals."""

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.kernels.features import SHIFT_INVARIANT, shift_invariant_kernel, spectral_directions
from quernel.testing import require_mean

DRAWS = 20000


@pytest.mark.parametrize("dim", [1, 5, 50])
@pytest.mark.parametrize("kernel", SHIFT_INVARIANT)
def test_the_mean_of_the_cosines_is_the_kernel(kernel, dim):
    draw = np.random.default_rng(dim)
    bandwidth = 1.7
    x, y = draw.standard_normal((2, 4, dim)) / np.sqrt(dim)
    w = spectral_directions(kernel, DRAWS, dim, bandwidth=bandwidth, seed=3)
    assert w.shape == (DRAWS, dim)
    # phi(x).phi(y) of paired features is the mean of cos(w.(x - y)).
    exact = shift_invariant_kernel(kernel, x, y, bandwidth=bandwidth).diagonal()
    require_mean(np.cos((x - y) @ w.T).T, exact)


@pytest.mark.parametrize(
    ("kernel", "z"),
    [
        ("gaussian", lambda x, y: ((x - y) ** 2).sum() / 4),
        ("laplacian", lambda x, y: np.abs(x - y).sum() / 2),
        ("exponential", lambda x, y: np.sqrt(((x - y) ** 2).sum()) / 2),
    ],
)
def test_kernels_are_their_definitions(kernel, z):
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((3, 4)), draw.standard_normal((2, 4))
    plain = np.array([[np.exp(-z(a, b)) for b in y] for a in x])
    np.testing.assert_allclose(shift_invariant_kernel(kernel, x, y, bandwidth=2.0), plain, rtol=1e-12)
    mixed = {"gaussian": "inverse-square", "laplacian": "inverse-l1", "exponential": "inverse-l2"}[kernel]
    np.testing.assert_allclose(shift_invariant_kernel(mixed, x, y, bandwidth=2.0), 1 / (1 - np.log(plain)), rtol=1e-12)


def test_the_seed_decides():
    first, again = (spectral_directions("inverse-l2", 4, 3, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, spectral_directions("inverse-l2", 4, 3, seed=2))


def test_bad_arguments_are_refused():
    with pytest.raises(QuernelError, match="kernel must be one of"):
        spectral_directions("cubic", 1, 1, seed=0)
    with pytest.raises(QuernelError, match="bandwidth"):
        spectral_directions("gaussian", 1, 1, bandwidth=0.0, seed=0)
    with pytest.raises(QuernelError, match="equal width"):
        shift_invariant_kernel("gaussian", np.ones((1, 2)), np.ones((1, 3)))
