"""Ridge and kernel ridge: dual equals primal equals scikit-learn; limits; gradients; kinds; bad input."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from quernel._errors import QuernelError
from quernel.kernels import Gram, JitterWarning, solve_kernel_ridge, solve_ridge

SOLVERS_AGREE = 1e-8  # two float64 solves with condition numbers up to 1e5
FLOAT32_FEATURES = 1e-4  # float32 in and out, float64 between


def problem(n, p, q=3, dtype=torch.float64, batch=()):
    generator = torch.Generator().manual_seed(n * 100 + p)
    x = torch.randn(*batch, n, p, generator=generator, dtype=dtype)
    return x, torch.randn(*batch, n, q, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("n", "p"), [(1, 1), (5, 12), (12, 5), (8, 8), (40, 3), (3, 40)])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 100.0])
def test_dual_primal_gram_and_scikit_learn_agree(n, p, alpha):
    x, y = problem(n, p)
    expected = torch.from_numpy(
        Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x, y).coef_.reshape(3, p).T
    )
    gram = Gram(p)
    gram.update(x)
    for weights in (
        solve_ridge(x, y, alpha),
        solve_ridge(x, y, alpha, solver="dual"),
        solve_ridge(x, y, alpha, solver="primal"),
        solve_ridge(gram, x.T @ y, alpha),
    ):
        torch.testing.assert_close(weights, expected, rtol=SOLVERS_AGREE, atol=SOLVERS_AGREE)


def test_float32_features_are_solved_in_float64():
    x, y = problem(60, 200, dtype=torch.float32)
    alpha = 1e-6 * float((x @ x.T).trace())
    weights = solve_ridge(x, y, alpha)
    assert weights.dtype is torch.float32
    expected = solve_ridge(x.double(), y.double(), alpha)
    torch.testing.assert_close(weights.double(), expected, rtol=FLOAT32_FEATURES, atol=FLOAT32_FEATURES)


def test_limits():
    x, y = problem(6, 20)
    torch.testing.assert_close(x @ solve_ridge(x, y, 1e-10), y, rtol=1e-6, atol=1e-6)
    assert solve_ridge(x, y, 1e12).abs().max() < 1e-9
    torch.testing.assert_close(x @ solve_ridge(x, y, 0.0), y)


def test_kernel_ridge_is_ridge_in_dual_form():
    x, y = problem(12, 5)
    kernel = x @ x.T
    coefficients = solve_kernel_ridge(kernel, y, 0.5)
    torch.testing.assert_close(x.T @ coefficients, solve_ridge(x, y, 0.5), rtol=SOLVERS_AGREE, atol=SOLVERS_AGREE)
    expected = KernelRidge(alpha=0.5, kernel="precomputed").fit(kernel.numpy(), y.numpy()).dual_coef_
    np.testing.assert_allclose(coefficients, expected, rtol=1e-6)


def test_kinds_shapes_and_dtypes():
    x, y = problem(12, 5)
    weights = solve_ridge(x.numpy(), y.numpy(), 1.0)
    assert isinstance(weights, np.ndarray)
    np.testing.assert_allclose(weights, solve_ridge(x, y, 1.0))
    assert solve_ridge(x, y[:, 0], 1.0).shape == (5,)
    assert solve_kernel_ridge(x @ x.T, y[:, 0], 1.0).shape == (12,)
    torch.testing.assert_close(solve_ridge(x, y[:, 0], 1.0), solve_ridge(x, y, 1.0)[:, 0])
    gram = Gram(5)
    gram.update(x)
    assert isinstance(solve_ridge(gram, (x.T @ y).numpy(), 1.0), np.ndarray)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_batches(shape):
    x, y = problem(*shape, batch=(2, 3))
    weights = solve_ridge(x, y, 0.1)
    assert weights.shape == (2, 3, shape[1], 3)
    torch.testing.assert_close(weights[1, 2], solve_ridge(x[1, 2], y[1, 2], 0.1))


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_gradients(solver):
    x, y = problem(5, 3, q=2)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, alpha)]
    assert torch.autograd.gradcheck(lambda x, y, alpha: solve_ridge(x, y, alpha, solver=solver), inputs)


def test_gradients_of_kernel_ridge():
    x, y = problem(4, 6, q=2)
    inputs = [t.requires_grad_() for t in (x, y)]
    assert torch.autograd.gradcheck(lambda x, y: solve_kernel_ridge(x @ x.T, y, 0.3), inputs)


def test_duplicate_rows_without_regularisation_are_said():
    x, y = problem(4, 6)
    x = torch.cat([x, x])
    with pytest.warns(JitterWarning):
        weights = solve_ridge(x, torch.cat([y, y]), 0.0, solver="dual")
    assert weights.isfinite().all()


GRAM = Gram(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 1), 1.0), r"x must have shape \(\.\.\., n, p\) with n = 4; got \(3, 2\)"),
        ((torch.zeros(3), torch.zeros(3), 1.0), "x must have shape"),
        ((torch.zeros(3, 2), torch.zeros(3, 1), -1.0), "alpha must be a finite number"),
        ((torch.zeros(3, 2), torch.zeros(3, 1), torch.ones(2)), "alpha must be one number"),
        ((torch.zeros(3, 2), torch.zeros(3, 1), torch.tensor(-1.0)), "alpha must be a finite number"),
        ((torch.full((3, 2), float("nan")), torch.zeros(3, 1), 1.0), "x holds NaN"),
        ((torch.zeros(3, 2), torch.full((3, 1), float("inf")), 1.0), "y holds NaN"),
        ((torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64), 1.0), "y must be floating point"),
        ((GRAM, torch.zeros(4, 1), 1.0), "with a Gram of 5 channels"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(QuernelError, match=message):
        solve_ridge(*arguments)


def test_bad_solver_and_kernel():
    with pytest.raises(QuernelError, match="solver must be one of"):
        solve_ridge(torch.zeros(3, 2), torch.zeros(3, 1), 1.0, solver="svd")
    with pytest.raises(QuernelError, match="needs the rows of x"):
        solve_ridge(GRAM, torch.zeros(5, 1), 1.0, solver="dual")
    with pytest.raises(QuernelError, match=r"k must have shape \(\.\.\., 3, 3\)"):
        solve_kernel_ridge(torch.zeros(2, 2), torch.zeros(3), 1.0)
