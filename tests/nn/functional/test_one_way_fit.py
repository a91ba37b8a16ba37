"""Alternating least squares for kernels: exact where it can be, never rising, near the best product, deterministic."""

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import fit_one_way, one_way_kernel
from tests.reference import factorized_conv as oracle

# Exact representations, rounded to float32.
EXACT = 1e-5
# Alternating least squares and power iteration from twenty starts may stop at different local optima.
NEAR_BEST = 1.02


def random_kernel(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(fit, kernel):
    made = one_way_kernel(fit.channel, fit.spatial)
    return float((made - kernel).norm() / kernel.norm())


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (4, 3, 5, 3), (3, 8, 7), (2, 5, 2, 3, 2), (3, 1, 3, 3), (2, 2, 1, 3)])
def test_as_many_products_as_positions_give_any_kernel(shape):
    kernel = random_kernel(*shape)
    for rank in (torch.Size(shape[2:]).numel(), torch.Size(shape[2:]).numel() + 2):
        fit = fit_one_way(kernel, rank)
        assert fit.channel.shape == (shape[0], rank, shape[1])
        assert [s.shape for s in fit.spatial] == [(shape[0], rank, k) for k in shape[2:]]
        assert error_of(fit, kernel) < EXACT
        assert float(fit.filter_errors.max()) < EXACT


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_product_is_found_again(dims):
    g = torch.Generator().manual_seed(0)
    spatial = [torch.randn(6, 1, k, generator=g) for k in (3, 5, 4)[:dims]]
    kernel = one_way_kernel(torch.randn(6, 1, 7, generator=g), spatial)
    assert error_of(fit_one_way(kernel, 1), kernel) < EXACT


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8])
def test_the_error_never_rises(rank):
    fit = fit_one_way(random_kernel(16, 12, 3, 3), rank, iters=50)
    assert all(after <= before for before, after in zip(fit.errors, fit.errors[1:], strict=False))
    assert len(fit.errors) > 2
    assert fit.errors[-1] < fit.errors[0]


def test_errors_fall_with_the_rank_and_are_the_truth():
    kernel = random_kernel(8, 6, 3, 3)
    errors = []
    for rank in range(1, 10):
        fit = fit_one_way(kernel, rank)
        assert fit.error == pytest.approx(error_of(fit, kernel), rel=1e-4, abs=1e-6)
        whole = (fit.filter_errors.square() * kernel.double().flatten(1).square().sum(1)).sum().sqrt()
        assert fit.error == pytest.approx(float(whole / kernel.double().norm()), rel=1e-6, abs=1e-9)
        errors.append(fit.error)
    assert errors == sorted(errors, reverse=True)


def test_one_product_is_about_the_best_there_is():
    kernel = random_kernel(6, 5, 3, 3, seed=3)
    fit = fit_one_way(kernel, 1, iters=100)
    for filters, error in zip(kernel, fit.filter_errors, strict=True):
        assert float(error) <= NEAR_BEST * oracle.best_product(filters.double().numpy(), sweeps=60)


def test_scale_is_in_the_channel_filters_and_does_not_matter():
    kernel = random_kernel(4, 5, 3, 3)
    one, big = fit_one_way(kernel, 2), fit_one_way(1e4 * kernel, 2)
    assert big.error == pytest.approx(one.error, rel=1e-6)
    for filters in big.spatial:
        torch.testing.assert_close(filters.norm(dim=2), torch.ones(4, 2))


def test_zero_filters_are_exact():
    kernel = random_kernel(3, 4, 3, 3)
    kernel[1] = 0
    fit = fit_one_way(kernel, 2)
    assert float(fit.filter_errors[1]) == 0.0
    assert bool(one_way_kernel(fit.channel, fit.spatial)[1].eq(0).all())
    assert fit_one_way(torch.zeros(2, 2, 3, 3), 1).error == 0.0


def test_it_draws_nothing_and_repeats():
    kernel, before = random_kernel(4, 5, 3, 3), torch.get_rng_state()
    one, two = fit_one_way(kernel, 2), fit_one_way(kernel, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.channel, two.channel)
    assert fit_one_way(kernel.bfloat16(), 2).channel.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (torch.ones(3, 3), {}, "kernel must be a non-empty floating tensor"),
        (torch.ones(3, 3, 3, 3, dtype=torch.int64), {}, "kernel must be"),
        (torch.full((2, 2, 3), torch.nan), {}, "kernel holds NaN"),
        (torch.ones(2, 2, 3), {"rank": 0}, "rank must be an integer"),
        (torch.ones(2, 2, 3), {"iters": -1}, "iters must be"),
        (torch.ones(2, 2, 3), {"ridge": 0.0}, "ridge must be"),
    ],
)
def test_bad_input_is_named(kernel, options, message):
    with pytest.raises(QuernelError, match=message):
        fit_one_way(kernel, **({"rank": 1} | options))
