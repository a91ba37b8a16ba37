"""Random directions: their laws, sparse ones against a plain loop, dense() as what is projected with."""

import numpy as np
import pytest
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing._directions import Projections
from tests.reference import projections as oracle

KINDS = ("gaussian", "cauchy", "rademacher", "sparse")
FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_what_is_projected_with(kind):
    projections = Projections(20, 70, kind, 3, scale=0.5)
    x = np.random.default_rng(0).standard_normal((9, 20)).astype(np.float32)
    exact = x.astype(float) @ projections.dense().astype(float).T
    # Twenty products in float32, each of at most the largest entry.
    largest = np.abs(projections.dense()).max(1) * np.abs(x).max()
    assert (np.abs(projections.project(x) - exact) <= 20 * largest * 2.0**-22).all()
    assert projections.project(x).shape == (9, 70) and projections.dense().shape == (70, 20)


def test_sparse_equals_a_plain_loop():
    projections = Projections(30, 17, "sparse", 1, density=0.2)
    x = np.random.default_rng(0).standard_normal((8, 30)).astype(np.float32)
    wanted = oracle.project_sparse(x, projections.places, projections.weights)
    # The compiler may fuse a product into its sum, nothing else.
    np.testing.assert_allclose(projections.project(x), wanted, atol=6 * 2.0**-22 * np.abs(x).max() * 5**0.5)


def test_laws_of_the_entries():
    # 40 000 entries each: Kolmogorov-Smirnov for the continuous ones, a binomial for the signs.
    gaussian, cauchy, signs = (Projections(40, 1000, kind, 0).dense().ravel() for kind in KINDS[:3])
    assert stats.kstest(gaussian, "norm").pvalue > FALSE_ALARM
    assert stats.kstest(cauchy, "cauchy").pvalue > FALSE_ALARM
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert stats.binomtest(int((signs > 0).sum()), signs.size).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("density", "nnz"), [(1e-9, 1), (1 / 3, 10), (0.5, 15), (1.0, 30)])
def test_sparse_directions(density, nnz):
    matrix = Projections(30, 4000, "sparse", 0, density=density).dense()
    assert ((matrix != 0).sum(1) == nnz).all()
    assert np.allclose((matrix**2).sum(1), 30, rtol=1e-5)  # the variance of a Gaussian projection, times dim
    counts = (matrix != 0).sum(0)  # each coordinate is drawn evenly; at nnz = dim trivially
    # Draws within a direction exclude each other, which lowers the statistic: a bound from above is safe.
    assert stats.chi2.sf(((counts - counts.mean()) ** 2 / counts.mean()).sum(), 29) > FALSE_ALARM


def test_the_seed_decides():
    one, same, other = (Projections(5, 6, "gaussian", seed).dense() for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not (one == other).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be"),
        ({"kind": "normal"}, "directions must be one of"),
        ({"density": 0.0}, "density must be"),
        ({"density": 1.5}, "density must be"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(QuernelError, match=message):
        Projections(**{"dim": 4, "n": 3, "kind": "sparse", "seed": 0, **arguments})
