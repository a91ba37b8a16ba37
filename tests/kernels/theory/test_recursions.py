"""Kernel and tangent kernel: susceptibilities, asymptotics, pairs of inputs, refusals; and real networks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.kernels.theory import (
    as_activation,
    criticality,
    kernel_recursion,
    layer_rates,
    ntk_recursion,
    susceptibilities,
)
from quernel.kernels.theory.recursions import products, slope_products
from tests.reference import deep_learning_theory as reference

SMOOTH = ["tanh", "gelu", "sin", "silu"]


def step(kernel, weight, bias, name):
    return float(kernel_recursion((kernel - bias) / weight, 2, weight, bias, name)[1])


@pytest.mark.parametrize("name", [*SMOOTH, "relu", "selu", "hardtanh"])
@pytest.mark.parametrize("kernel", [0.2, 2.0])
def test_parallel_susceptibility_is_the_slope_of_the_recursion(name, kernel):
    weight, bias, h = 1.7, 0.1, 1e-4
    difference = (step(kernel + h, weight, bias, name) - step(kernel - h, weight, bias, name)) / (2 * h)
    assert float(susceptibilities(kernel, weight, name)[0]) == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("kernel", [0.2, 2.0])
def test_perpendicular_susceptibility_is_the_growth_of_a_small_angle(name, kernel):
    weight = 1.7
    ratios = []
    for share in (1e-3, 2e-3):
        gram = torch.tensor([[1.0, 1 - share], [1 - share, 1.0]], dtype=torch.float64) * kernel / weight
        layers = kernel_recursion(gram, 2, weight, 0.0, name)
        distance = layers[:, 0, 0] + layers[:, 1, 1] - 2 * layers[:, 0, 1]
        ratios.append(float(distance[1] / distance[0]))
    # The first order in the angle is taken out.
    assert float(susceptibilities(kernel, weight, name)[1]) == pytest.approx(2 * ratios[0] - ratios[1], abs=1e-5)


def test_tanh_falls_as_the_theory_says():
    for start, wanted in ((0.5, 1.006), (1.0, 1.007)):
        kernel = kernel_recursion(start, 400, 1.0, 0.0, "tanh")
        assert 2 * 400 * float(kernel[-1]) == pytest.approx(wanted, abs=5e-4)


def test_gelu_creeps_towards_its_fixed_point():
    gelu = criticality("gelu")
    first = (1.5 * gelu.K_star - gelu.C_b) / gelu.C_W
    away = kernel_recursion(first, 5001, gelu.C_W, gelu.C_b, "gelu") - gelu.K_star
    for after, wanted in ((0, 1.781), (50, 1.728), (500, 1.373), (5000, 0.518)):
        assert float(away[after]) == pytest.approx(wanted, abs=1e-3)
    # From below it stops half a unit short, at a second fixed point, which lies between these two.
    for short, moves in ((0.52, 1), (0.54, -1)):
        kernel = gelu.K_star - short
        below = kernel_recursion((kernel - gelu.C_b) / gelu.C_W, 500, gelu.C_W, gelu.C_b, "gelu")
        assert float(below[0] - below[-1]) * moves > 0


@pytest.mark.parametrize(("name", "weight", "bias"), [("tanh", 2.0, 0.0), ("tanh", 0.8, 0.0), ("gelu", 1.5, 0.3)])
def test_away_from_criticality_it_converges_exponentially(name, weight, bias):
    kernel = kernel_recursion(1.0, 400, weight, bias, name)
    end = float(kernel[-1])
    if end < 1e-9:
        rate = float(kernel[60] / kernel[59])
        end = 1e-12
    else:
        rate = float((kernel[13] - kernel[-1]) / (kernel[12] - kernel[-1]))
    assert rate < 0.95
    assert rate == pytest.approx(float(susceptibilities(end, weight, name)[0]), abs=5e-3)


def numpy_of(f):
    return lambda z: f(torch.from_numpy(z)).numpy()


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "hardtanh"])
def test_pairs_are_integrals(name):
    act = as_activation(name)
    kernel = torch.tensor([[1.0, 0.9, -0.4], [0.9, 2.0, 0.1], [-0.4, 0.1, 0.6]], dtype=torch.float64)
    for got, f in ((products(act, kernel), act), (slope_products(act, kernel), act.slope)):
        torch.testing.assert_close(got, got.T)
        for i, j in ((0, 1), (0, 2)):
            args = (float(kernel[i, i]), float(kernel[j, j]), float(kernel[i, j]))
            wanted = reference.pair_average(numpy_of(f), numpy_of(f), *args)
            # A grid of 801 points sees a jump of the slope to half a step.
            assert float(got[i, j]) == pytest.approx(wanted, abs=1e-2 if f is not act else 1e-4)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_a_vector_is_the_diagonal_of_a_matrix(name):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x @ x.T / 8
    whole = ntk_recursion(gram, 4, 1.9, 0.1, name, 0.3, [0.1, 0.2, 0.3, 0.4])
    alone = ntk_recursion(gram.diagonal(), 4, 1.9, 0.1, name, 0.3, [0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(whole.kernel.diagonal(dim1=1, dim2=2), alone.kernel)
    torch.testing.assert_close(whole.ntk.diagonal(dim1=1, dim2=2), alone.ntk)
    torch.testing.assert_close(whole.kernel, kernel_recursion(gram, 4, 1.9, 0.1, name))
    for layer in whole.kernel:
        assert float(torch.linalg.eigvalsh(layer).min()) > -1e-9


def test_layers_share_the_tangent_kernel_equally():
    """With the rates of ``layer_rates`` no layer dominates, and the sum does not depend on depth."""
    for name, start in (("relu", 1.0), ("tanh", 1.0), ("gelu", None)):
        point, sums = criticality(name), []
        for depth in (10, 40):
            rates = layer_rates(point, depth)
            gram = (point.K_star - point.C_b) / point.C_W if start is None else start
            whole = ntk_recursion(
                gram, depth, point.C_W, point.C_b, name, [r.bias for r in rates], [r.weight for r in rates]
            )
            sums.append(float(whole.ntk[-1]))
            shares = []
            for layer in range(depth // 4, depth, depth // 5):
                one = [r.weight if r.layer == layer + 1 else 0.0 for r in rates]
                held = ntk_recursion(gram, depth, point.C_W, point.C_b, name, 0.0, one)
                shares.append(float(held.ntk[-1]))
            assert max(shares) < 1.6 * min(shares), name
        assert sums[1] == pytest.approx(sums[0], rel=0.15), name


def empirical_ntk(net, x):
    """Return sums over parameters of products of gradients of the first output; biases count 1, weights 1 / fan-in."""
    rows = []
    for one in x:
        net.zero_grad()
        net(one)[0].backward()
        rows.append(torch.cat([p.grad.flatten() / (p.shape[1] ** 0.5 if p.ndim == 2 else 1) for p in net.parameters()]))
    grads = torch.stack(rows)
    return grads @ grads.T


def test_the_tangent_kernel_is_that_of_networks():
    """Mean over 60 networks of width 128; a few percent is what that leaves to chance and to 1 / width."""
    n, depth, x = 128, 3, torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    from quernel.nn import critical_init_

    generator, found = torch.Generator().manual_seed(2), []
    for _ in range(60):
        net = nn.Sequential(nn.Linear(32, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 1))
        critical_init_(net, generator=generator)
        found.append(empirical_ntk(net, x))
    wanted = ntk_recursion(x @ x.T / 32, depth, 1.0, 0.0, "tanh").ntk[-1].float()
    torch.testing.assert_close(torch.stack(found).mean(0), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be an integer in"),
        ({"C_W": -1.0}, "C_W must be a finite number"),
        ({"C_b": math.nan}, "C_b must be a finite number"),
        ({"x_gram": torch.zeros(2, 3)}, r"x_gram must be a number, or have the shape \(n,\) or \(n, n\)"),
        ({"x_gram": torch.tensor([[1.0, 0.5], [0.1, 1.0]])}, "x_gram must be symmetric"),
        ({"x_gram": torch.tensor([-1.0])}, "x_gram must hold mean squares >= 0"),
        ({"x_gram": torch.tensor([math.inf])}, "x_gram holds NaN or infinity"),
        ({"activation": torch.log}, "is nan at z"),
        ({"residual": 1.0}, "residual must be a finite number"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {"x_gram": 1.0, "depth": 3, "C_W": 1.0, "C_b": 0.0, "activation": "tanh"} | changes
    for recursion in (kernel_recursion, ntk_recursion):
        with pytest.raises(QuernelError, match=message):
            recursion(**given)


def test_rates_must_fit_the_depth():
    with pytest.raises(QuernelError, match="lW must be a number or one number for each of 3 layers; got 2"):
        ntk_recursion(1.0, 3, 1.0, 0.0, "tanh", 1.0, [1.0, 2.0])
    with pytest.raises(QuernelError, match="kernel must be > 0"):
        susceptibilities(0.0, 1.0, "tanh")
    assert np.isclose(sum(rate.weight for rate in layer_rates(criticality("relu"), 7)), 1)
    with pytest.raises(QuernelError, match="no critical initialisation"):
        layer_rates(criticality("sigmoid"), 4)
