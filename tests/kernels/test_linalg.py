"""Jittered Cholesky: untouched where it works, escalating and said where not, refused when hopeless."""

import warnings

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels import JitterWarning, jittered_cholesky


def spd(n, seed=0, dtype=torch.float64, batch=()):
    a = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return a @ a.mT + n * torch.eye(n, dtype=dtype)


def rank_deficient(n=20, rank=5, dtype=torch.float32):
    a = torch.randn(n, rank, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return a @ a.T


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_cholesky_where_that_works(shape, dtype):
    a = spd(shape[-1], dtype=dtype, batch=shape[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(jittered_cholesky(a), torch.linalg.cholesky(a))


def test_empty():
    assert jittered_cholesky(torch.zeros(0, 0)).shape == (0, 0)


def test_numpy_in_numpy_out():
    a = spd(4).numpy()
    factor = jittered_cholesky(a)
    assert isinstance(factor, np.ndarray)
    np.testing.assert_allclose(factor, np.linalg.cholesky(a), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_gets_little_jitter_and_a_warning(dtype):
    a = rank_deficient(dtype=dtype)
    with pytest.warns(
        JitterWarning, match=r"a \(20 x 20\) is not positive definite in float\d\d \(condition number at"
    ):
        factor = jittered_cholesky(a)
    scale = a.diagonal().mean()
    assert (factor @ factor.T - a).abs().max() < 1e-4 * scale
    assert factor.isfinite().all()


def test_the_smallest_jitter_that_works_is_taken():
    # Smallest eigenvalue -3e-4 of the mean diagonal: 1e-6, 1e-5, 1e-4 fail, 1e-3 works.
    values = torch.ones(10, dtype=torch.float64)
    values[0] = -3e-4
    q = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    a = q @ torch.diag(values) @ q.T
    a = (a + a.T) / 2
    with pytest.warns(JitterWarning, match="1e-03 of its mean diagonal was added"):
        factor = jittered_cholesky(a, eps=1e-6)
    added = (factor @ factor.T - a).diagonal()
    torch.testing.assert_close(added, torch.full_like(added, 1e-3) * a.diagonal().mean(), rtol=1e-6, atol=0)


def test_only_failing_members_of_a_batch_are_changed():
    good, bad = spd(20, dtype=torch.float32), rank_deficient()
    with pytest.warns(JitterWarning):
        factors = jittered_cholesky(torch.stack([good, bad]))
    assert torch.equal(factors[0], torch.linalg.cholesky(good[None])[0])
    assert factors[1].isfinite().all()


def test_gradients():
    a = spd(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: jittered_cholesky((m + m.T) / 2), (a,))
    singular = rank_deficient(4, 2, torch.float64).requires_grad_()
    with pytest.warns(JitterWarning):
        jittered_cholesky(singular, eps=1e-3).sum().backward()
    assert singular.grad.isfinite().all()


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.diag(torch.tensor([1.0, 1.0, -1.5])), "even with 0.01 of its mean diagonal"),
        (-torch.eye(3), "mean of its diagonal is not positive"),
        (torch.zeros(2, 3), r"a must have shape \(\.\.\., n, n\); got \(2, 3\)"),
        (torch.zeros(3), "a must have shape"),
        (torch.eye(2, dtype=torch.bfloat16), "a must be float32 or float64; got torch.bfloat16"),
        (torch.tensor([[float("nan")]]), "a holds NaN or infinity"),
        ([[1.0]], "a must be a torch.Tensor or a numpy.ndarray; got list"),
    ],
)
def test_bad_matrices(a, message):
    with pytest.raises(QuernelError, match=message):
        jittered_cholesky(a)


@pytest.mark.parametrize("eps", [0.0, -1e-3, float("nan")])
def test_bad_eps(eps):
    with pytest.raises(QuernelError, match="eps must be"):
        jittered_cholesky(torch.eye(2), eps)
