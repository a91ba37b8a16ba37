"""vendi_score: known values, the definition by the logarithm of a matrix, both sizes of its matrix, errors."""

import numpy as np
import pytest
import torch
from scipy.linalg import logm

from quernel._errors import QuernelError
from quernel.kernels import vendi_score
from tests.reference import schur_entropy as oracle


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 7.0])
def test_kinds_in_equal_numbers_are_counted(order):
    x = np.eye(5, 9).repeat(6, axis=0)
    assert vendi_score(x, order=order) == pytest.approx(5.0, abs=1e-10)
    assert vendi_score(np.eye(7), kernel="precomputed", order=order) == pytest.approx(7.0, abs=1e-10)
    assert vendi_score(np.ones((4, 3)), order=order) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize(("n", "d"), [(8, 12), (30, 4)])
def test_it_is_the_von_neumann_entropy_of_the_kernel(n, d):
    x = np.random.default_rng(0).standard_normal((n, d))
    rows = oracle.cosine_features(x)
    dual = rows.T @ rows / n if n > d else rows @ rows.T / n
    wanted = float(np.exp(-np.trace(dual @ logm(dual)).real))
    assert vendi_score(x) == pytest.approx(wanted, rel=1e-9)
    assert vendi_score(torch.from_numpy(x)) == vendi_score(x)
    assert vendi_score(rows @ rows.T, kernel="precomputed") == pytest.approx(wanted, rel=1e-9)


def test_gaussian_and_callable_kernels():
    x = np.random.default_rng(0).standard_normal((25, 3))
    k = oracle.gaussian_matrix(x, 1.5)
    wanted = vendi_score(k, kernel="precomputed")
    assert vendi_score(x, kernel="gaussian", bandwidth=1.5) == pytest.approx(wanted, rel=1e-10)
    assert vendi_score(x, kernel=lambda a, b: oracle.gaussian_matrix(a, 1.5)) == pytest.approx(wanted, rel=1e-10)
    assert vendi_score(x, kernel="gaussian", bandwidth=1.5, n_features=20_000) == pytest.approx(wanted, rel=0.05)


def test_errors_name_what_is_wrong():
    with pytest.raises(QuernelError, match=r"ones on its diagonal; it is 1 off"):
        vendi_score(2 * np.eye(3), kernel="precomputed")
    with pytest.raises(QuernelError, match="not positive semi-definite"):
        vendi_score(np.array([[1.0, 2.0], [2.0, 1.0]]), kernel="precomputed")
    with pytest.raises(QuernelError, match="at least one row"):
        vendi_score(np.zeros((0, 3)))
    with pytest.raises(QuernelError, match="x must have no zero rows"):
        vendi_score(np.zeros((2, 3)))
    with pytest.raises(QuernelError, match="order must be"):
        vendi_score(np.eye(2), order=-1.0)
