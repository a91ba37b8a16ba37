"""The split of second moments: its trace, signs, limits, both of its forms, its gradient."""

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels import matrix_entropy, schur_complement
from quernel.kernels.statistics._pair_maps import CosineMap
from quernel.kernels.statistics.schur import PairSample, best_eta, kernel_root, split_of_pairs
from tests.reference import schur_entropy as oracle

ETAS = [0.0, 1e-9, 1e-3, 0.3, 100.0]
# Rows and columns of both sides: fewer pairs than features, more, as many, and one wide side only.
SIZES = [(7, 12, 12), (40, 6, 9), (12, 12, 12), (15, 4, 30), (15, 30, 4)]


def features(n, d_t, d_x, seed=0):
    """Return unit rows of which the second side follows the first in part."""
    draw = np.random.default_rng(seed)
    t = draw.standard_normal((n, d_t))
    x = t @ draw.standard_normal((d_t, d_x)) + draw.standard_normal((n, d_x))
    return tuple(torch.from_numpy(a / np.linalg.norm(a, axis=1, keepdims=True)) for a in (t, x))


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("size", SIZES)
def test_the_trace_is_split_and_nothing_is_negative(size, eta):
    t, x = features(*size)
    pairs = split_of_pairs(t @ t.T, x, eta, len(t))
    for split in (schur_complement(t, x, eta), pairs):
        assert float(split.residual.trace() + split.explained.trace()) == pytest.approx(1.0, abs=1e-10)
        for part in (split.residual, split.explained):
            assert float(torch.linalg.eigvalsh(part).min()) > -1e-12


@pytest.mark.parametrize("eta", [0.0, 1e-12, 1e-9, 1e-3])
@pytest.mark.parametrize("apart", [1e-12, 1e-7, 1e-5, 1e-3])
def test_nothing_is_negative_where_columns_are_nearly_the_same(apart, eta):
    t, x = features(60, 10, 8)
    t = t.clone()
    t[:, 5:] = t[:, :5] + apart * t[:, 5:]
    split = schur_complement(t, x + 10 * t[:, :8], eta)
    assert float(torch.linalg.eigvalsh(split.residual)[0]) > -1e-12


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("size", SIZES)
def test_both_forms_have_the_spectrum_of_the_formula(size, eta):
    t, x = features(*size)
    k_t, k_x = t @ t.T, x @ x.T
    wanted = oracle.by_features(t.numpy(), x.numpy(), eta) if eta != 1e-9 else None
    splits = [schur_complement(t, x, eta), split_of_pairs(k_t, x, eta, len(t))]
    splits.append(split_of_pairs(k_t, kernel_root(k_x), eta, len(t)))
    others = oracle.by_pairs(k_t.numpy(), k_x.numpy(), eta) if eta != 1e-9 else None
    for i, name in enumerate(("residual", "explained")):
        found = [oracle.spectrum(getattr(split, name).numpy(), size[2]) for split in splits]
        np.testing.assert_allclose(found[1], found[0], atol=1e-8)
        np.testing.assert_allclose(found[2], found[0], atol=1e-8)
        if wanted is not None and others is not None:
            np.testing.assert_allclose(found[0], oracle.spectrum(wanted[i], size[2]), atol=1e-8)
            np.testing.assert_allclose(found[0], oracle.spectrum(others[i], size[2]), atol=1e-7)
    assert splits[0].freedom == pytest.approx(splits[1].freedom, abs=1e-6 * len(t))


def test_features_are_split_as_matrices_not_only_spectra():
    t, x = features(40, 6, 9)
    residual, explained = oracle.by_features(t.numpy(), x.numpy(), 0.01)
    split = schur_complement(t, x, 0.01)
    np.testing.assert_allclose(split.residual, residual, atol=1e-12)
    np.testing.assert_allclose(split.explained, explained, atol=1e-12)
    np.testing.assert_allclose(split.total, oracle.covariance(x.numpy(), x.numpy()), atol=1e-12)


def test_residuals_of_the_regression_are_the_split_and_orthogonal_to_the_prompts():
    t, x = features(60, 7, 5)
    for eta in (0.0, 1e-3, 0.05):
        gamma = torch.from_numpy(oracle.gamma(t.numpy(), x.numpy(), eta))
        left = x - t @ gamma.T
        torch.testing.assert_close(left.T @ t / 60, eta * gamma, atol=1e-10, rtol=0)
        whole = left.T @ left / 60 + eta * gamma @ gamma.T
        split = schur_complement(t, x, eta)
        torch.testing.assert_close(split.residual, whole, atol=1e-10, rtol=0)
        # Without the second term it is another matrix, once there is a ridge.
        apart = float((split.residual - left.T @ left / 60).abs().max())
        assert (apart < 1e-10) if eta == 0 else (apart > 1e-5)


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.5])
def test_a_constant_prompt_explains_the_mean_only(eta):
    _, x = features(30, 3, 6)
    t = torch.zeros(30, 4, dtype=torch.float64)
    t[:, 1] = 1.0
    mean = x.mean(0)
    wanted = torch.outer(mean, mean) / (1 + eta)
    torch.testing.assert_close(schur_complement(t, x, eta).explained, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("eta", "one_hot"), [(0.0, True), (0.01, True), (0.01, False)])
def test_an_independent_prompt_explains_its_share_of_the_mean(eta, one_hot):
    # Every prompt with every image, once: independent exactly, so that no tolerance for chance is needed.
    images = features(30, 3, 6)[1] + 0.3
    images = images / images.norm(dim=1, keepdim=True)
    prompts = torch.eye(4, dtype=torch.float64) if one_hot else features(4, 5, 2, seed=3)[0]
    t, x = prompts.repeat_interleave(30, 0), images.repeat(4, 1)
    mean_t, mean_x = t.mean(0), x.mean(0)
    c_tt = t.T @ t / len(t) + eta * torch.eye(t.shape[1], dtype=torch.float64)
    c = float(mean_t @ torch.linalg.solve(c_tt, mean_t))
    assert 0 < c < 1 + 1e-12 and (eta or c == pytest.approx(1.0))
    split = schur_complement(t, x, eta)
    torch.testing.assert_close(split.residual, x.T @ x / len(x) - c * torch.outer(mean_x, mean_x), atol=1e-12, rtol=0)


def test_a_balanced_prompt_of_mean_zero_explains_nothing_of_independent_images():
    images = features(30, 3, 6)[1]
    t = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64).repeat_interleave(30, 0)
    split = schur_complement(t, images.repeat(2, 1), 0.0)
    assert float(split.explained.abs().max()) < 1e-15


def test_images_that_follow_from_prompts_leave_nothing():
    t, _ = features(50, 6, 2)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert float(schur_complement(t, t @ turn, 0.0).residual.abs().max()) < 1e-13


def test_a_huge_ridge_explains_nothing():
    t, x = features(50, 6, 7)
    torch.testing.assert_close(schur_complement(t, x, 1e12).residual, x.T @ x / 50, atol=1e-11, rtol=0)


@pytest.mark.parametrize("eta", [1e-3, 0.1])
def test_the_entropy_of_both_parts_has_its_gradient(eta):
    t, x = (rows.requires_grad_() for rows in features(9, 3, 5))

    def scores(t, x):
        split = schur_complement(t, x, eta)
        return matrix_entropy(split.residual), matrix_entropy(split.explained + 0.01 * torch.eye(5))

    assert torch.autograd.gradcheck(scores, (t, x))


def test_the_gradient_stands_repeated_eigenvalues():
    # Prompts that are orthogonal to all images, images in equal shares along the axes: Lam_I = I / 4.
    x = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    x[4:] *= -1
    t = torch.ones(8, 1, dtype=torch.float64)
    x.requires_grad_()
    assert torch.linalg.eigvalsh(schur_complement(t, x, 1e-3).residual).tolist() == pytest.approx([0.25] * 4)
    assert torch.autograd.gradcheck(lambda x: matrix_entropy(schur_complement(t, x, 1e-3).residual), (x,))


@pytest.mark.parametrize("form", ["dual", "features"])
def test_leave_one_out_is_what_leaving_one_out_gives(form):
    t, x = features(14, 4, 3)
    sample = PairSample(t @ t.T if form == "dual" else t, x, form == "dual", 14)
    error = sample.leave_one_out()
    for eta in (1e-4, 1e-2, 1.0):
        assert error(eta) == pytest.approx(oracle.leave_one_out(t.numpy(), x.numpy(), eta), rel=1e-8)
    best = best_eta(sample)
    assert 1e-8 <= best <= 10 and all(error(best) <= error(best * step) * (1 + 1e-9) for step in (0.5, 2.0))


@pytest.mark.parametrize("size", [(9, 20, 20), (30, 4, 5)])
def test_weights_are_repeated_rows(size):
    t, x = features(*size)
    counts = np.random.default_rng(0).multinomial(len(t), np.full(len(t), 1 / len(t)))
    rows = torch.from_numpy(np.repeat(np.arange(len(t)), counts))
    maps = CosineMap(size[1]), CosineMap(size[2])
    drawn, again = PairSample.of(maps, t, x).weighted(counts).split(0.01), schur_complement(t[rows], x[rows], 0.01)
    for name in ("residual", "explained"):
        found, wanted = (oracle.spectrum(getattr(split, name).numpy(), size[2]) for split in (drawn, again))
        np.testing.assert_allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize("size", [(9, 20, 20), (31, 4, 5)])
def test_out_of_fold_residuals_come_from_the_other_folds(size):
    t, x = features(*size)
    maps = CosineMap(size[1]), CosineMap(size[2])
    found = PairSample.of(maps, t, x).out_of_fold(0.01, 3, 7)
    fold = np.random.default_rng(7).permutation(len(t)) % 3
    left = x.numpy().copy()
    for number in range(3):
        held = fold == number
        left[held] -= t.numpy()[held] @ oracle.gamma(t.numpy()[~held], x.numpy()[~held], 0.01).T
    np.testing.assert_allclose(
        oracle.spectrum(found.numpy(), size[2]), oracle.spectrum(left.T @ left / len(t), size[2]), atol=1e-10
    )


def test_a_singular_kernel_has_a_root():
    x = features(6, 3, 4)[1][[0, 0, 1, 2, 2, 2]]
    root = kernel_root(x @ x.T)
    torch.testing.assert_close(root @ root.T, x @ x.T, atol=1e-12, rtol=0)


def test_bad_features_are_named():
    t, x = features(10, 3, 4)
    with pytest.raises(QuernelError, match="got 9 and 10 rows"):
        schur_complement(t[1:], x)
    with pytest.raises(QuernelError, match="eta must be a finite number"):
        schur_complement(t, x, -1e-3)
    with pytest.raises(QuernelError, match="phi_x holds NaN"):
        schur_complement(t, x * torch.nan)
    with pytest.raises(QuernelError, match="phi_t must be a floating-point tensor"):
        schur_complement(t.long(), x)
    with pytest.raises(QuernelError, match="take eta > 0"):
        schur_complement(t.requires_grad_(), x, 0.0)


def test_repeated_rows_have_a_root_as_wide_as_there_are_different_ones():
    t, x = features(8, 20, 30)
    rows = torch.arange(24) % 8
    maps = CosineMap(20), CosineMap(30)
    # 24 pairs: fewer than the features of one side only, and of both.
    for other in (maps, (CosineMap(40), CosineMap(30))):
        wide = torch.cat((t, torch.zeros(8, other[0].dim - 20)), 1)
        sample = PairSample.of(other, wide[rows], x[rows])
        assert sample.form == "pairs" and sample.root.shape == (24, 8) and not sample.dual
        found = sample.split(0.01)
        for name, wanted in zip(("residual", "explained"), oracle.by_features(t.numpy(), x.numpy(), 0.01), strict=True):
            np.testing.assert_allclose(
                oracle.spectrum(getattr(found, name).numpy(), 30), oracle.spectrum(wanted, 30), atol=1e-12
            )
    assert PairSample.of(maps, t, x).dual and PairSample.of(maps, t[:4], x[:4]).form == "pairs"


def test_what_is_no_kernel_has_no_root():
    with pytest.raises(QuernelError, match="not positive semi-definite"):
        kernel_root(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
