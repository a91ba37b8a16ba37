"""Random directions: orthogonal in blocks, and each row alone as a Gaussian one."""

import numpy as np
import pytest
from scipy import stats

from quernel._errors import QuernelError
from quernel.kernels.features import gaussian_directions, orthogonal_directions

# Kolmogorov-Smirnov and chi-square tests at fixed seeds; false alarms once in a million draws of the seed.
ALARM = 1e-6


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (3, 8), (8, 8), (19, 8)])
def test_rows_of_a_block_are_orthogonal(n, dim):
    g = orthogonal_directions(n, dim, seed=0)
    assert g.shape == (n, dim)
    same_block = np.arange(n)[:, None] // dim == np.arange(n) // dim
    products = g @ g.T
    off = same_block & ~np.eye(n, dtype=bool)
    np.testing.assert_allclose(products[off], 0, atol=1e-12 * dim)


@pytest.mark.parametrize("maker", [gaussian_directions, orthogonal_directions])
def test_lengths_and_directions_are_those_of_gaussian_rows(maker):
    dim = 12
    g = maker(6000, dim, seed=1)
    squares = (g**2).sum(1)
    assert stats.kstest(squares, stats.chi2(dim).cdf).pvalue > ALARM
    # One row a block, so that the entries tested are independent.
    assert stats.kstest(g[::dim, 0], "norm").pvalue > ALARM
    assert stats.kstest((g[::dim] @ np.full(dim, dim**-0.5)), "norm").pvalue > ALARM


def test_blocks_are_uniform_over_rotations_not_only_over_what_qr_prefers():
    # Without the sign correction the first entry of the first row is almost never positive.
    first = np.array([orthogonal_directions(3, 3, seed)[0, 0] for seed in range(400)])
    assert stats.binomtest(int((first > 0).sum()), 400).pvalue > ALARM


def test_the_seed_decides():
    np.testing.assert_array_equal(orthogonal_directions(5, 3, 7), orthogonal_directions(5, 3, 7))
    assert not np.array_equal(orthogonal_directions(5, 3, 7), orthogonal_directions(5, 3, 8))


def test_bad_input_is_named():
    with pytest.raises(QuernelError, match="n must be an integer in"):
        gaussian_directions(0, 3, seed=0)
    with pytest.raises(QuernelError, match="seed must be"):
        orthogonal_directions(2, 3, seed="x")  # type: ignore[arg-type]
