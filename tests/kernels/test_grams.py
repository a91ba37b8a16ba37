"""Kernels of Gram matrices: the definitions by random draws, gradients where points coincide, refusals."""

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels import arc_cosine_gram, erf_gram, erf_slope_gram, gaussian_kernel, squared_exponential_gram
from quernel.testing import require_mean

KERNELS = (
    lambda *g: arc_cosine_gram(*g, order=0),
    arc_cosine_gram,
    erf_gram,
    erf_slope_gram,
    squared_exponential_gram,
)


def rows(n=5, dim=3, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(x, y):
    return x @ y.mT, x.square().sum(-1), y.square().sum(-1)


@pytest.mark.parametrize(
    ("kernel", "f"),
    [
        (lambda *g: arc_cosine_gram(*g, order=0) / 2, lambda z: (z > 0).double()),
        (lambda *g: arc_cosine_gram(*g) / 2, torch.relu),
        (erf_gram, torch.erf),
        (erf_slope_gram, lambda z: 2 / torch.pi**0.5 * torch.exp(-z.square())),
    ],
    ids=["step", "relu", "erf", "erf slope"],
)
def test_a_kernel_is_the_mean_of_a_wide_random_layer(kernel, f):
    x, y = rows(3), rows(2, seed=1)
    draws = torch.randn(20000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    products = f(draws @ x.T)[:, :, None] * f(draws @ y.T)[:, None, :]
    require_mean(products.numpy(), kernel(*gram(x, y)).numpy())


def test_squared_exponential_is_the_gaussian_kernel():
    x, y = rows(), rows(4, seed=1)
    torch.testing.assert_close(squared_exponential_gram(*gram(x, y)), gaussian_kernel(x, y), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_are_their_members(kernel):
    x, y = rows(8).reshape(2, 4, 3), rows(6, seed=1).reshape(2, 3, 3)
    got = kernel(*gram(x, y))
    assert got.shape == (2, 4, 3)
    for i in range(2):
        torch.testing.assert_close(got[i], kernel(*gram(x[i], y[i])))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_of_points_with_themselves_is_positive_semi_definite(kernel):
    x = rows(30)
    assert float(torch.linalg.eigvalsh(kernel(*gram(x, x))).min()) > -1e-10


def test_order_one_keeps_the_diagonal():
    x = rows(20)
    kept = arc_cosine_gram(*gram(x, x)).diagonal()
    np.testing.assert_allclose(kept, x.square().sum(1), rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_differences(kernel):
    x, y = rows(3).requires_grad_(), rows(2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: kernel(*gram(x, y)), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: kernel(*gram(x, y)), (x, y))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_finite_where_points_coincide_or_vanish(kernel):
    x = torch.cat((rows(2), rows(2), -rows(1), torch.zeros(1, 3, dtype=torch.float64))).requires_grad_()
    value = kernel(*gram(x, x))
    assert bool(value.isfinite().all())
    value.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_the_gradient_of_order_one_is_right_at_coincidence():
    # K(x, y) = |x| |y| j(t) has the derivative x at y = x.
    x = rows(1)
    y = x.clone().requires_grad_()
    arc_cosine_gram(*gram(x, y)).sum().backward()
    torch.testing.assert_close(y.grad, x, rtol=1e-7, atol=1e-7)


def test_a_point_without_length_has_no_kernel():
    zero = torch.zeros(1, 3, dtype=torch.float64)
    for order in (0, 1):
        assert arc_cosine_gram(*gram(zero, rows(2)), order=order).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes_that_do_not_fit_are_refused(kernel):
    with pytest.raises(QuernelError, match="cross, left and right"):
        kernel(torch.ones(2, 3), torch.ones(3), torch.ones(2))
    with pytest.raises(QuernelError, match="cross, left and right"):
        kernel(torch.ones(1, 1, dtype=torch.int64), torch.ones(1), torch.ones(1))


def test_another_order_is_refused():
    with pytest.raises(QuernelError, match="order must be 0 or 1; got 2"):
        arc_cosine_gram(torch.ones(1, 1), torch.ones(1), torch.ones(1), order=2)
