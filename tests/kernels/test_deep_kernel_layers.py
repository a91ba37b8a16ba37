"""Layers of deep kernel machines: divergences, the map of a layer, gradients, noise, against their definitions."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from quernel._errors import QuernelError
from quernel.kernels import GramLayer, StructGram, gram_kl, propagate
from quernel.kernels.deep_kernel_layers import GramScale, apply_kernel, free_numbers, input_gram, lower_factor
from quernel.testing import require_mean
from tests.reference import deep_kernel_machines as reference

P, B, D = 6, 9, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(seed=0, size=P):
    root = draw(size, size + 3, seed=seed)
    return root @ root.T / size


def struct(seed=0):
    return input_gram(draw(B, D, seed=seed), draw(P, D, seed=seed + 1))


def moved(k, amount, seed=5):
    direction = draw(P, P, seed=seed)
    return k + amount * (direction + direction.T) / 2


# Check 1.
@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_is_that_of_two_normals(seed):
    g, k = gram(seed), gram(seed + 10)
    normals = [MultivariateNormal(torch.zeros(P, dtype=torch.float64), m) for m in (g, k)]
    assert float(gram_kl(g, k)) == pytest.approx(float(kl_divergence(*normals)), abs=1e-8)
    assert float(gram_kl(g, k)) == pytest.approx(reference.kl(g.numpy(), k.numpy()), abs=1e-8)
    for form in ("exact", "taylor", "taylor_frobenius"):
        assert float(gram_kl(g, k, form)) > 0
        assert float(gram_kl(k, k, form)) == pytest.approx(0, abs=1e-10)
    assert float(gram_kl(g, k, "taylor_frobenius")) >= float(gram_kl(g, k, "taylor"))


def test_the_symmetric_expansion_agrees_to_second_order_and_the_other_one_does_not():
    k = gram(3)
    errors, frobenius = [], []
    for amount in (1e-2, 1e-3):
        exact = float(gram_kl(moved(k, amount), k))
        errors.append(abs(float(gram_kl(moved(k, amount), k, "taylor")) - exact))
        frobenius.append(float(gram_kl(moved(k, amount), k, "taylor_frobenius")) / exact)
    # A tenth of the distance leaves a thousandth of the error: third order.
    assert errors[1] == pytest.approx(1e-3 * errors[0], rel=0.3)
    assert min(frobenius) > 1.05
    commuting = float(gram_kl(k * 1.001, k, "taylor_frobenius"))
    assert commuting == pytest.approx(float(gram_kl(k * 1.001, k)), rel=1e-2)


@pytest.mark.parametrize("kernel", ["arccos", "rbf"])
@pytest.mark.parametrize("jitter", [0.0, 1e-4])
def test_kernel_and_layer_are_those_of_the_definition(kernel, jitter):
    g, below = gram(7), struct()
    k = reference.kernel(*(part.numpy() for part in below), kernel, jitter)
    for got, wanted in zip(apply_kernel(below, kernel, jitter), k, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(propagate(below, g, kernel, jitter), reference.layer(*k, g.numpy()), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-8)


# Check 7.
@pytest.mark.parametrize("kernel", ["arccos", "rbf"])
def test_inducing_points_as_a_batch_come_out_as_themselves(kernel):
    z = draw(P, D)
    current = input_gram(z, z)
    for seed in (1, 2, 3):
        current = propagate(current, gram(seed), kernel, jitter=0.0)
        torch.testing.assert_close(current.ti, current.ii, rtol=0, atol=1e-6)
        torch.testing.assert_close(current.t, current.ii.diagonal(), rtol=0, atol=1e-6)


def test_variances_of_points_equal_to_inducing_ones_stay_positive_with_the_jitter_and_without():
    z = draw(P, D)
    for jitter in (0.0, 1e-4):
        small = 1e-12 * torch.eye(P, dtype=torch.float64)
        found = propagate(input_gram(z, z), small, "arccos", jitter)
        assert bool((found.t >= 0).all())


def free_layer(form="exact", noise=None, seed=0):
    layer = GramLayer(P, kl=form, noise=noise, nu=0.7)
    with torch.no_grad():
        layer.free.copy_(0.3 * draw(P, P, seed=seed))
    return layer


@pytest.mark.parametrize("form", ["exact", "taylor", "taylor_frobenius"])
def test_a_layer_s_penalty_is_that_of_its_gram_matrix(form):
    layer, k = free_layer(form), apply_kernel(struct(), "arccos")
    with torch.no_grad():
        found, penalty = layer(k)
    assert float(penalty) == pytest.approx(0.7 * float(gram_kl(found.ii, k.ii, form)), rel=1e-8)
    wanted = reference.layer(*(part.numpy() for part in k), found.ii.numpy())
    for got, value in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-8, atol=1e-10)


def test_a_fresh_layer_is_the_kernel_below_at_no_cost():
    k = apply_kernel(struct(), "arccos")
    with torch.no_grad():
        found, penalty = GramLayer(P)(k)
    assert float(penalty) == 0
    for got, wanted in zip(found, k, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


# Check 6.
@pytest.mark.parametrize("kernel", ["arccos", "rbf"])
@pytest.mark.parametrize("form", ["exact", "taylor", "taylor_frobenius"])
def test_gradients_flow_through_kernel_and_layer(kernel, form):
    layer = free_layer(form)

    def whole(x, z, free):
        k = apply_kernel(input_gram(x, z), kernel)
        found, penalty = torch.func.functional_call(layer, {"free": free}, (k,))
        return *apply_kernel(found, kernel), penalty

    inputs = [draw(3, D), draw(P, D, seed=1), 0.3 * draw(P, P, seed=2)]
    assert torch.autograd.gradcheck(whole, [value.requires_grad_() for value in inputs])


def test_gradients_are_finite_where_points_coincide():
    z = draw(P, D)
    z[1] = z[0]
    z.requires_grad_()
    x = z.detach()[:3].clone().requires_grad_()
    found, penalty = free_layer()(apply_kernel(input_gram(x, z), "arccos"))
    (found.t.sum() + found.ti.sum() + penalty).backward()
    assert bool(z.grad.isfinite().all()) and bool(x.grad.isfinite().all())


def test_wishart_draws_are_right_on_average_and_only_in_training():
    layer, k = free_layer(noise="wishart"), apply_kernel(struct(), "arccos")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.train()
        drawn = [layer(k, generator) for _ in range(400)]
        shifted, _ = layer.eval()(k)
        plain, penalty = free_layer()(k)
    wanted = plain.ii + 0.1 * torch.eye(P, dtype=torch.float64)
    torch.testing.assert_close(shifted.ii, wanted)
    # c = ceil(P / 4) degrees of freedom: a draw has rank 2 before 0.1 I is added.
    values = torch.linalg.eigvalsh(drawn[0][0].ii)
    assert int((values > 0.1 + 1e-9).sum()) == 2
    require_mean(torch.stack([found.ii.diagonal() for found, _ in drawn]).numpy(), wanted.diagonal().numpy())
    require_mean(torch.stack([found.ti[:, 0] for found, _ in drawn]).numpy(), shifted.ti[:, 0].numpy())
    require_mean(torch.stack([found.t for found, _ in drawn]).numpy(), shifted.t.numpy())
    for got, value in zip(shifted, reference.layer(*(part.numpy() for part in k), shifted.ii.numpy()), strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-8, atol=1e-10)
    assert all(float(cost) == pytest.approx(float(penalty)) for _, cost in drawn[:3])


def test_scales_divide_by_mean_lengths_and_remember_those_of_batches():
    scale, one = GramScale(), struct()
    found = scale(one)
    assert float(found.ii.diagonal().mean()) == pytest.approx(1)
    assert float(found.t.mean()) == pytest.approx(1)
    scale.eval()
    half = scale(StructGram(one.ii, one.ti[:1], one.t[:1]))
    torch.testing.assert_close(half.ti, found.ti[:1])
    torch.testing.assert_close(half.t, found.t[:1])


def test_factors_and_free_numbers_are_each_other_s_inverse():
    free = draw(P, P)
    factor = lower_factor(free)
    assert bool((factor.diagonal() > 0).all())
    torch.testing.assert_close(free_numbers(factor), free.tril())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram_kl(gram(), gram(size=5)), "one size"),
        (lambda: gram_kl(gram(), gram(), "series"), "form must be one of"),
        (lambda: gram_kl(gram(), -gram()), "positive"),
        (lambda: propagate(struct(), gram(), "poly"), "kernel must be one of"),
        (lambda: propagate(struct(), gram(size=5)), r"\(6, 6\) like ii; got \(5, 5\)"),
        (lambda: GramLayer(0), "n_inducing"),
        (lambda: GramLayer(3, nu=0.0), "nu"),
        (lambda: GramLayer(3, noise="gauss"), "noise"),
    ],
)
def test_what_is_no_good_is_named(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
