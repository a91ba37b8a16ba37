"""The sparse machine as a module: outputs, bounds, the copy trap, and what it is in the limits."""

import numpy as np
import pytest
import torch

from quernel.kernels import FullDeepKernel
from quernel.kernels._deep_kernel_network import (
    CategoricalLikelihood,
    DeepKernelNetwork,
    GaussianLikelihood,
    OutputSums,
    class_probabilities,
)
from quernel.kernels._deep_kernel_training import Plan, Trainer, chosen_inducing, judged, passes
from quernel.kernels.deep_kernel_layers import free_numbers, input_gram
from tests.reference import deep_kernel_machines as reference

P, N, D = 6, 25, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def data(n=N):
    x = draw(n, D)
    return x, torch.stack((torch.sin(2 * x[:, 0]), x[:, 1] * x[:, 2]), 1)


def network(nus=(0.7, 1.3), scale=0.3, **options):
    """Return a network whose parameters are all somewhere."""
    made = DeepKernelNetwork(draw(P, D, seed=1), 2, nus, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters(), start=2):
            if parameter is not made.inducing:
                parameter.copy_(scale * draw(*parameter.shape, seed=seed))
    return made


def solved(net, x, y, noise):
    sums = OutputSums(net)
    with torch.no_grad():
        for rows, found in passes(net, x):
            sums.update(found, y[rows])
    return sums.solve(noise)


@pytest.mark.parametrize("kernel", ["arccos", "rbf"])
def test_the_whole_bound_is_that_of_the_definition(kernel):
    net, (x, y) = network(kernel=kernel, jitter=1e-3), data()
    with torch.no_grad():
        found = net.train()(x)
    k = reference.kernel(
        *(net.log_scales[0].exp().item() * p.detach().numpy() for p in input_gram(x, net.inducing)), kernel, 1e-3
    )
    penalty = 0.0
    for number, nu in ((1, 0.7), (2, 1.3)):
        g = found.grams[number - 1].ii.numpy()
        penalty += nu * reference.kl(g, k[0])
        ii, ti, t = reference.layer(*k, g)
        inner, outer, scale = np.trace(ii) / P, t.mean(), net.log_scales[number].exp().item()
        scaled = (scale * ii / inner, scale * ti / np.sqrt(inner * outer), scale * t / outer)
        k = reference.kernel(*scaled, kernel, 1e-3)
    k = [net.log_scales[3].exp().item() * part for part in k]
    chol = np.linalg.cholesky(k[0])
    root = net.root.detach()
    root = (root.tril(-1) / P**0.5 + torch.diag(root.diagonal().exp())).numpy()
    mu, cov = chol @ net.weights.detach().numpy(), chol @ root @ root.T @ chol.T
    mean, variance = reference.outputs(*k, mu, cov)
    np.testing.assert_allclose(found.mean, mean, atol=1e-8)
    np.testing.assert_allclose(found.variance, variance, atol=1e-8)
    noise = torch.full((2,), 0.3, dtype=torch.float64)
    bound = GaussianLikelihood(noise, learned=False)(found, y).sum() - found.penalty - found.output_kl
    wanted = reference.gaussian_bound(y.numpy(), mean, variance, 0.3, mu, cov, k[0], penalty)
    assert float(bound.detach()) == pytest.approx(wanted, abs=1e-6)


# Check 3.
@pytest.mark.parametrize("learned", [False, True])
def test_a_huge_nu_gives_the_fixed_kernel_after_training_too(learned):
    x, y = data(60)
    answers = []
    for nu in (1e8, float("inf")):
        net = DeepKernelNetwork(x[:P].clone(), 2, (nu, nu))
        net.inducing.requires_grad_(learned)
        likelihood = GaussianLikelihood(torch.full((2,), 0.1, dtype=torch.float64), learned)
        trainer = Trainer(net, likelihood, x, y, Plan(10, 20, 1e-2), np.random.default_rng(0))
        trainer.run()
        trainer.solve_outputs()
        answers.append(torch.cat([f.mean for _, f in passes(net.requires_grad_(False), draw(30, D, seed=9))]))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-4)


# Check 4. The full objective has no scale layer, so that with the default jitter the kernels differ by multiples of it.
@pytest.mark.parametrize(("jitter", "close"), [(1e-9, 1e-5), (1e-4, 5e-3)])
def test_with_all_points_inducing_the_posterior_is_the_full_one(jitter, close):
    x, y = data()
    full = FullDeepKernel(1, nu=0.5, noise=0.05, jitter=jitter, max_iter=60).fit(x, y)
    g = torch.from_numpy(full.gram_(1))
    net = DeepKernelNetwork(x, 2, (0.5,), jitter=jitter).requires_grad_(False)
    k = reference.kernel(x.numpy() @ x.numpy().T / D, np.zeros((0, N)), np.zeros(0), "arccos", jitter)[0]
    white = np.linalg.solve(np.linalg.cholesky(k), np.linalg.cholesky(g.numpy()))
    net.gram_layers[0].free.copy_(free_numbers(torch.from_numpy(white)))
    # The full objective has no scale layer: its mean squared length is put back, before the kernel's jitter.
    length = g.diagonal().mean()
    net.gram_scales[0].running.copy_(length)
    net.log_scales[1] = length.log()
    noise = torch.full((2,), 0.05, dtype=torch.float64)
    solved(net, x, y, noise)
    new = draw(40, D, seed=9)
    found = net.eval()(new)
    mean, std = full.predict(new, return_std=True)
    np.testing.assert_allclose(found.mean, mean, atol=close)
    np.testing.assert_allclose((found.variance + 0.05).sqrt(), std, atol=close)
    # What the full model says is in turn the textbook's posterior.
    cross = reference.kernel(full.gram_(0), *(p.numpy() for p in input_gram(new, x)[1:]), "arccos", jitter)
    top = reference.kernel(*reference.layer(*cross, full.gram_(1)), "arccos", jitter)
    wanted_mean, wanted_variance = reference.posterior(*top, y.numpy(), 0.05)
    np.testing.assert_allclose(mean, wanted_mean, atol=1e-6)
    np.testing.assert_allclose(std**2, wanted_variance + 0.05, atol=1e-6)


# Check 5.
def test_without_layers_the_best_outputs_give_titsias_bound():
    x, y = data()
    net = DeepKernelNetwork(x[:P], 2, (), jitter=1e-6).requires_grad_(False)
    noise = torch.full((2,), 0.1, dtype=torch.float64)
    solved(net, x, y, noise)
    bound, _ = judged(net, GaussianLikelihood(noise, learned=False), x, y, y)
    k = reference.kernel(*(p.numpy() for p in input_gram(x, x[:P])), "arccos", 1e-6)
    assert bound == pytest.approx(reference.titsias(*k, y.numpy(), 0.1), abs=1e-3)
    # The best noise for these outputs is where the bound is level in it.
    best = solved(net, x, y, noise)
    held = GaussianLikelihood(best, learned=False)
    held.log_noise.requires_grad_()
    held(net.eval()(x), y).sum().backward()
    assert float(held.log_noise.grad.abs().max()) < 1e-8
    # It is an optimum: the gradient in mu and A_o is nothing.
    net.requires_grad_(True)
    found = net(x)
    (GaussianLikelihood(noise, learned=False)(found, y).sum() - found.output_kl).backward()
    assert float(net.weights.grad.abs().max()) < 1e-8
    assert float(net.root.grad.abs().max()) < 1e-8


@pytest.mark.slow
def test_steps_alone_come_to_the_same_bound():
    x, y = data()
    net = DeepKernelNetwork(x[:P], 2, ())
    net.inducing.requires_grad_(False)
    net.log_scales.requires_grad_(False)
    likelihood = GaussianLikelihood(torch.full((2,), 0.1, dtype=torch.float64), learned=False)
    trainer = Trainer(net, likelihood, x, y, Plan(600, N, 2e-2), np.random.default_rng(0))
    for epoch in range(600):
        trainer.epoch(epoch)
    climbed, _ = judged(net, likelihood, x, y, y)
    trainer.solve_outputs()
    best, _ = judged(net, likelihood, x, y, y)
    assert best - 1e-3 * abs(best) <= climbed <= best + 1e-9


def test_two_copies_with_twice_the_noise_are_the_same_objective_up_to_a_constant():
    (x, y), differences = data(), []
    for scale in (0.1, 0.4):
        net, values = network(scale=scale), []
        for copies in (1, 2):
            noise = torch.full((2,), 0.3 * copies, dtype=torch.float64)
            with torch.no_grad():
                found = net.train()(x.repeat(copies, 1))
                fit = GaussianLikelihood(noise, learned=False)(found, y.repeat(copies, 1)).sum()
                values.append(float(fit - found.penalty - found.output_kl))
        differences.append(values[1] - values[0])
    assert differences[0] == pytest.approx(differences[1], abs=1e-8)
    # The best outputs are the same too.
    answers = []
    for copies in (1, 2):
        net = network()
        solved(net, x.repeat(copies, 1), y.repeat(copies, 1), torch.full((2,), 0.3 * copies, dtype=torch.float64))
        answers.append(net.weights.detach())
    torch.testing.assert_close(*answers)


# Check 6, the outputs.
@pytest.mark.parametrize("kernel", ["arccos", "rbf"])
def test_gradients_flow_from_the_bound_to_every_parameter(kernel):
    net = network(kernel=kernel)
    names = [name for name, _ in net.named_parameters()]

    def bound(x, *values):
        found = torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))
        return found.mean, found.variance, found.penalty, found.output_kl

    inputs = [draw(4, D, seed=7), *(p.detach().clone() for p in net.parameters())]
    assert torch.autograd.gradcheck(bound, [value.requires_grad_() for value in inputs])


def test_class_probabilities_and_expectations_are_means_over_draws():
    mean, variance = draw(5, 3), draw(5).square() + 0.1
    probabilities = class_probabilities(mean, variance)
    noise = np.random.default_rng(0).standard_normal((200_000, 5, 3))
    f = mean.numpy() + np.sqrt(variance.numpy())[:, None] * noise
    exact = np.exp(f - np.logaddexp.reduce(f, -1, keepdims=True))
    # 512 draws in pairs: a standard error of at most 0.5 / sqrt(512) = 0.02.
    np.testing.assert_allclose(probabilities, exact.mean(0), atol=0.08)
    torch.testing.assert_close(class_probabilities(mean[2:4], variance[2:4]), probabilities[2:4])
    found = network()(draw(5, D))._replace(mean=mean, variance=variance)
    labels = torch.tensor([0, 1, 2, 0, 1])
    got = CategoricalLikelihood(20_000)(found, labels, torch.Generator().manual_seed(0))
    wanted = np.log(exact)[:, np.arange(5), labels].mean(0)
    np.testing.assert_allclose(got.detach(), wanted, atol=0.1)


def test_tempering_divides_the_divergence_of_the_outputs_by_their_number():
    x = draw(3, D)
    plain, tempered = network()(x), network(tempered=True)(x)
    torch.testing.assert_close(tempered.output_kl, plain.output_kl / 2)


def test_alignment_is_that_of_the_kernel_within_the_span_of_the_inducing_points():
    net, (x, y) = network(), data()
    with torch.no_grad():
        found = net.train()(x)
        found = net.eval()(x)
        _, alignments = judged(net, GaussianLikelihood(torch.full((2,), 0.3).double(), False), x, y, y)
    grams = [g.ti.numpy() @ np.linalg.inv(g.ii.numpy()) @ g.ti.numpy().T for g in found.grams]
    wanted = [reference.alignment(k, y.numpy()) for k in (x.numpy() @ x.numpy().T, *grams)]
    np.testing.assert_allclose(alignments, wanted, rtol=1e-8)


def test_inducing_inputs_are_different_rows_and_as_many_as_asked_for():
    x = draw(50, D)
    found = chosen_inducing(x, 7, np.random.default_rng(0))
    assert found.shape == (7, D) and len(found.unique(dim=0)) == 7
    assert bool((found[:, None] == x).all(-1).any(1).all())
    same = chosen_inducing(torch.ones(10, 2, dtype=torch.float64), 4, np.random.default_rng(0))
    torch.testing.assert_close(same, torch.ones(4, 2, dtype=torch.float64))
    every = chosen_inducing(x, 50, np.random.default_rng(0))
    torch.testing.assert_close(every.sort(0)[0], x.sort(0)[0])
