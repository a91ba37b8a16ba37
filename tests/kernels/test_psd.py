"""Spectra, entropies, projectors and the simplex problem of positive semi-definite matrices."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from quernel._errors import QuernelError
from quernel.kernels import (
    matrix_entropy,
    nearest_psd,
    psd_eigenvalues,
    ridge_projector,
    simplex_qp,
    spectral_entropy,
)


def low_rank(n=12, rank=4, seed=0):
    a = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n


def test_eigenvalues_have_no_negatives_and_keep_the_kind():
    values = psd_eigenvalues(low_rank().numpy())
    assert isinstance(values, np.ndarray) and values.min() == 0.0 and (values > 1e-6).sum() == 4
    assert psd_eigenvalues(torch.eye(3)).dtype is torch.float64


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(QuernelError, match="not positive semi-definite: its least eigenvalue is -1"):
        psd_eigenvalues(torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_entropy_of_equal_eigenvalues_is_tau_log_k(k):
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[:k, :k] = torch.eye(k, dtype=torch.float64) * 0.7 / k
    assert float(matrix_entropy(matrix)) == pytest.approx(0.7 * np.log(k), abs=1e-12)
    for order in (0.5, 2.0, 5.0):
        assert float(spectral_entropy(psd_eigenvalues(matrix), order)) == pytest.approx(0.7 * np.log(k), abs=1e-12)


def test_entropy_is_the_limit_of_its_orders_and_falls_with_them():
    values = psd_eigenvalues(low_rank())
    assert float(spectral_entropy(values, 1.0001)) == pytest.approx(float(spectral_entropy(values)), rel=1e-3)
    entropies = [float(spectral_entropy(values, order)) for order in (0.5, 1.0, 2.0, 4.0)]
    assert entropies == sorted(entropies, reverse=True) and entropies[0] > entropies[-1]


def test_nothing_has_no_entropy():
    assert float(matrix_entropy(torch.zeros(3, 3))) == 0.0
    assert spectral_entropy(torch.zeros(2, 3), 2.0).tolist() == [0.0, 0.0]


def test_the_gradient_of_entropy_stands_repeated_eigenvalues():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matrix_entropy(x @ x.T), (x,))
    # A multiple of the identity plus rank one: an eigenvalue of multiplicity three.
    v = torch.ones(4, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: matrix_entropy(2 * eye + torch.outer(v, v)), (v,))


def test_entropy_of_a_batch_is_that_of_its_members():
    batch = torch.stack((low_rank(seed=0), low_rank(seed=1)))
    assert matrix_entropy(batch).tolist() == pytest.approx([float(matrix_entropy(m)) for m in batch])


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 10.0])
def test_ridge_projector_is_its_formula(alpha):
    k = low_rank().numpy()
    wanted = k @ np.linalg.inv(k + alpha * np.eye(len(k)))
    np.testing.assert_allclose(ridge_projector(k, alpha), wanted, atol=1e-9)


def test_without_a_ridge_it_projects_on_the_range():
    k = low_rank()
    h = ridge_projector(k, 0.0)
    torch.testing.assert_close(h @ h, h)
    torch.testing.assert_close(h @ k, k)
    assert float(h.trace()) == pytest.approx(4.0)


def test_nearest_psd_clips_and_keeps_the_dtype():
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    a = (a + a.T) / 2
    b = nearest_psd(a)
    assert b.dtype is torch.float32
    assert float(torch.linalg.eigvalsh(b.double()).min()) > -1e-6
    torch.testing.assert_close(nearest_psd(b), b, rtol=1e-5, atol=1e-5)


def problem(m, seed):
    draw = np.random.default_rng(seed)
    points, targets = draw.standard_normal((m, 3)), draw.standard_normal((40, 3)) * 0.7
    gauss = lambda x, y: np.exp(-0.5 * ((x[:, None] - y[None]) ** 2).sum(-1))  # noqa: E731
    return gauss(points, points), gauss(points, targets).mean(1)


def objective(k, c, b):
    return b @ k @ b - 2 * c @ b


@pytest.mark.parametrize("m", [1, 2, 7, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_simplex_qp_meets_the_conditions_of_an_optimum(m, seed):
    k, c = problem(m, seed)
    b = simplex_qp(k, c)
    assert b.min() >= 0.0 and abs(b.sum() - 1) < 1e-12
    slope = c - k @ b
    # Slopes are equal on the support, and not larger outside of it.
    assert np.abs(slope[b > 0] - b @ slope).max() < 1e-9
    assert (slope - b @ slope).max() < 1e-9


def test_simplex_qp_is_what_a_general_solver_finds():
    k, c = problem(12, 3)
    rule = {"type": "eq", "fun": lambda b: b.sum() - 1}
    found = minimize(
        lambda b: objective(k, c, b),
        np.full(12, 1 / 12),
        jac=lambda b: 2 * (k @ b - c),
        bounds=[(0, 1)] * 12,
        constraints=rule,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert objective(k, c, simplex_qp(k, c)) <= found.fun + 1e-9


def test_simplex_qp_from_a_good_start_is_the_same_point():
    k, c = problem(20, 4)
    b = simplex_qp(k, c)
    near = np.maximum(b + 1e-3, 0)
    np.testing.assert_allclose(simplex_qp(k, c, start=near / near.sum()), b, atol=1e-9)


def test_bad_problems_are_refused():
    k, c = problem(3, 0)
    with pytest.raises(QuernelError, match=r"k and c must have shapes"):
        simplex_qp(k, c[:2])
    with pytest.raises(QuernelError, match="start must be 3 numbers"):
        simplex_qp(k, c, start=np.ones(3))
    with pytest.raises(QuernelError, match="c holds NaN"):
        simplex_qp(k, c * np.nan)
    with pytest.raises(QuernelError, match="not solved after max_steps=1"):
        simplex_qp(np.eye(9), np.ones(9), max_steps=1)
    with pytest.raises(QuernelError, match=r"a must have shape \(..., n, n\)"):
        psd_eigenvalues(torch.ones(2, 3))
    with pytest.raises(QuernelError, match="alpha"):
        ridge_projector(torch.eye(2), -1.0)
    with pytest.raises(QuernelError, match="order"):
        spectral_entropy(torch.ones(2), 0.0)


def test_what_is_negative_beside_the_terms_of_a_difference_is_rounding():
    difference = torch.diag(torch.tensor([-3e-17, 1e-17], dtype=torch.float64))
    assert psd_eigenvalues(difference, rounding=1e-12).tolist() == [0.0, 1e-17]
    with pytest.raises(QuernelError, match="not positive semi-definite"):
        psd_eigenvalues(difference)
    with pytest.raises(QuernelError, match="not positive semi-definite"):
        psd_eigenvalues(difference * 1e10, rounding=1e-12)
