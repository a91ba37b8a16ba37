"""NTKernel: the recursion by its definition, gradients of real networks, blocks, shapes, precision, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.base import clone

import quernel
from quernel._errors import QuernelError
from quernel.kernels import NTKernel
from quernel.kernels.ntk import kernel as module
from quernel.testing import require_mean
from tests.reference import ntk_permutations as reference

AVERAGES = {"relu": reference.relu_averages, "erf": reference.erf_averages}
# Quadrature of the reference; the closed forms are exact.
QUADRATURE = 1e-6


def points(n=4, dim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_both_kernels_follow_the_recursion(activation, depth):
    x, y = points(3), points(2, seed=1)
    kernel = NTKernel(depth, activation, sigma_w=1.3, sigma_b=0.4)
    wanted = [[reference.kernels(p, q, depth, AVERAGES[activation], 1.3, 0.4) for q in y] for p in x]
    got = kernel.both(x, y)
    np.testing.assert_allclose(np.stack((got.nngp, got.ntk), -1), wanted, rtol=QUADRATURE)
    np.testing.assert_array_equal(kernel.nngp(x, y), got.nngp)
    np.testing.assert_array_equal(kernel.ntk(x, y), got.ntk)


def test_one_hidden_layer_of_relu_is_the_formula_of_the_arc_cosine():
    x, y = points(5), points(4, seed=1)
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    u = x @ y.T / lengths
    k0 = (np.pi - np.arccos(u)) / np.pi
    k1 = (np.sqrt(1 - u**2) + u * (np.pi - np.arccos(u))) / np.pi
    q = 1.5**2 * lengths / 3
    kernel = NTKernel(sigma_w=1.5)
    np.testing.assert_allclose(kernel.nngp(x, y), 1.5**2 * q * k1 / 2, rtol=1e-13)
    np.testing.assert_allclose(kernel.ntk(x, y), 1.5**2 * q * (k1 + u * k0) / 2, rtol=1e-12)


def test_no_hidden_layer_is_a_linear_model():
    x = points()
    kernel = NTKernel(0, sigma_w=2.0, sigma_b=0.5)
    np.testing.assert_allclose(kernel.ntk(x), 0.25 + 4 * x @ x.T / 3, rtol=1e-14)
    np.testing.assert_array_equal(kernel.ntk(x), kernel.nngp(x))


def network(weights, x, act, sw, sb):
    for i, (w, b) in enumerate(weights):
        x = (act(x) if i else x) @ w.mT * sw / math.sqrt(w.shape[1]) + sb * b
    return x[..., 0]


def drawn(widths, draw):
    return [
        tuple(torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((m, n), (m,)))
        for n, m in itertools.pairwise(widths)
    ]


def tangents(widths, x, act, draw):
    """Return the Gram matrix of the gradients of one network at the points x."""
    jacobians = torch.func.jacrev(lambda w: network(w, x, act, 1.2, 0.3))(drawn(widths, draw))
    rows = torch.cat([part.flatten(1) for layer in jacobians for part in layer], dim=1)
    return rows @ rows.mT


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_the_tangent_kernel_is_that_of_wide_networks(activation):
    act = {"relu": torch.relu, "erf": torch.erf}[activation]
    x, draw = torch.from_numpy(points(5)), torch.Generator().manual_seed(0)
    wanted = NTKernel(activation=activation, sigma_w=1.2, sigma_b=0.3).ntk(x)
    # With one hidden layer the kernel is the expectation at any width ...
    narrow = torch.stack([tangents((3, 32, 1), x, act, draw) for _ in range(200)])
    require_mean(narrow.numpy(), wanted.numpy())
    # ... and one network scatters about it by sqrt(5 / width) for ReLU, 2.5 % here, four of them by half that.
    wide = sum(tangents((3, 8192, 1), x, act, draw) for _ in range(4)) / 4
    assert float((wide - wanted).norm() / wanted.norm()) < 0.03


def test_the_tangent_kernel_of_two_hidden_layers_is_that_of_wide_networks():
    x, draw = torch.from_numpy(points(4)), torch.Generator().manual_seed(0)
    wanted = NTKernel(2, sigma_w=1.2, sigma_b=0.3).ntk(x)
    wide = sum(tangents((3, 512, 512, 1), x, torch.relu, draw) for _ in range(8)) / 8
    assert float((wide - wanted).norm() / wanted.norm()) < 0.05


def test_the_nngp_kernel_is_the_covariance_of_wide_networks():
    # Of width 256: the output's covariance is exact at any width for one hidden layer.
    x = torch.from_numpy(points(3))
    draw = torch.Generator().manual_seed(0)
    outputs = torch.stack([network(drawn((3, 256, 1), draw), x, torch.relu, 1.2, 0.3) for _ in range(3000)])
    products = outputs[:, :, None] * outputs[:, None, :]
    require_mean(products.numpy(), NTKernel(sigma_w=1.2, sigma_b=0.3).nngp(x).numpy())


def test_in_the_standard_parametrisation_the_last_layer_moves_alone():
    # Drawn with the standard deviations, gradients of the last layer's weights are larger by the root of the width.
    x = torch.from_numpy(points(4))
    width, draw = 1024, torch.Generator().manual_seed(1)
    (w1, b1), (w2, b2) = drawn((3, width, 1), draw)
    scaled = [(w1 * 1.2 / math.sqrt(3), 0.3 * b1), (w2 * 1.2 / math.sqrt(width), 0.3 * b2)]

    def plain(weights):
        (w1, b1), (w2, b2) = weights
        return (torch.relu(x @ w1.mT + b1) @ w2.mT + b2)[:, 0]

    jacobians = torch.func.jacrev(plain)(scaled)
    rows = torch.cat([part.flatten(1) for layer in jacobians for part in layer], dim=1)
    wanted = NTKernel(sigma_w=1.2, sigma_b=0.3, parametrization="standard").ntk(x) / 1.2**2
    assert float((rows @ rows.mT / width - wanted).norm() / wanted.norm()) < 0.15


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_blocks_change_nothing(activation, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    x, y = points(7), points(5, seed=1)
    kernel = NTKernel(2, activation, sigma_b=0.2)
    tensors = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
    whole, half = kernel.ntk(*tensors).detach(), kernel.ntk(tensors[0]).detach()  # with gradients: in one piece
    np.testing.assert_allclose(kernel.ntk(x, y), whole, rtol=1e-13)
    np.testing.assert_allclose(kernel.ntk(x), half, rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(kernel.ntk(x), kernel.ntk(x).T)


def test_kernels_are_positive_semi_definite_and_know_their_diagonal():
    x = points(60, 5)
    x = np.concatenate((x, x[:5], 2 * x[:5], -x[:5], np.zeros((1, 5))))
    for kernel in (NTKernel(), NTKernel(3, sigma_b=0.1), NTKernel(2, "erf"), NTKernel(parametrization="standard")):
        both = kernel.both(x)
        for part in (both.nngp, both.ntk):
            assert np.linalg.eigvalsh(part).min() > -1e-10 * part.max()
        np.testing.assert_allclose(kernel.nngp_diag(x), both.nngp.diagonal(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("depth", [1, 3])
def test_equal_points_have_equal_kernels_whatever_stands_beside_them(depth):
    x = points(30, 40)
    kernel = NTKernel(depth)
    np.testing.assert_allclose(kernel.ntk(x[7:8], x[3:11]), kernel.ntk(x)[7:8, 3:11], rtol=1e-13)


def test_batches_are_their_members():
    x, y = points(24).reshape(2, 3, 4, 3), points(12, seed=1).reshape(2, 3, 2, 3)
    kernel = NTKernel(2, sigma_b=0.3)
    got = kernel.both(x, y)
    assert got.ntk.shape == (2, 3, 4, 2) and kernel.nngp_diag(x).shape == (2, 3, 4)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(got.ntk[i, j], kernel.ntk(x[i, j], y[i, j]), rtol=1e-13)
        np.testing.assert_allclose(got.nngp[i, j], kernel.nngp(x[i, j], y[i, j]), rtol=1e-13)
    assert kernel.ntk(np.empty((0, 3)), y[0, 0]).shape == (0, 2)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_kind_and_precision_are_those_of_the_input(make):
    x = points(6)
    kernel = NTKernel(2)
    single = kernel.ntk(make(x.astype(np.float32)))
    assert type(single) is type(make(x)) and str(single.dtype).endswith("float32")
    # Only the input is rounded: it is computed in float64.
    np.testing.assert_array_equal(single, kernel.ntk(x.astype(np.float32).astype(np.float64)).astype(np.float32))
    integers = make(np.eye(3, dtype=np.int64))
    assert str(kernel.nngp(integers).dtype).endswith("float64")
    np.testing.assert_array_equal(kernel.nngp(integers), kernel.nngp(np.eye(3)))


def test_gradients_are_those_of_differences_and_finite_where_points_coincide():
    x, y = (torch.from_numpy(points(3, 2, seed)).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(NTKernel(2, sigma_b=0.3).ntk, (x, y))
    same = torch.cat((x.detach(), x.detach(), torch.zeros(1, 2).double())).requires_grad_()
    NTKernel(2).ntk(same).sum().backward()
    assert bool(same.grad.isfinite().all())


def test_any_activation_can_be_given():
    x = points(4)
    by_name = NTKernel(2, "erf", sigma_b=0.2).ntk(x)
    np.testing.assert_allclose(NTKernel(2, torch.erf, sigma_b=0.2).ntk(x), by_name, rtol=1e-6)
    smooth = NTKernel(1, "gelu").nngp(x)
    assert np.linalg.eigvalsh(smooth).min() > 0


def test_a_kernel_is_a_parameter(tmp_path):
    kernel = NTKernel(3, "erf", 1.5, 0.1)
    assert clone(kernel).get_params() == kernel.get_params()
    loaded = quernel.load(kernel.save(tmp_path))
    assert type(loaded) is NTKernel and loaded.get_params() == kernel.get_params()
    with pytest.raises(QuernelError, match="which a file cannot hold"):
        NTKernel(activation=torch.tanh).save(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "depth must be an integer"),
        ({"activation": "no such"}, "activation must be a callable or one of"),
        ({"sigma_w": 0.0}, "sigma_w must be a finite number"),
        ({"sigma_b": -1.0}, "sigma_b must be a finite number"),
        ({"parametrization": "mup"}, "parametrization must be one of 'ntk', 'standard'; got 'mup'"),
        ({"depth": 0, "parametrization": "standard"}, "needs a hidden layer"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(QuernelError, match=message):
        NTKernel(**options).ntk(points())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[1.0]], None, "X must be a torch.Tensor or a numpy.ndarray; got list"),
        (np.ones(3), None, r"shape \(\*batch, n, d\)"),
        (np.ones((2, 3)), np.ones((2, 4)), r"got \(2, 3\), \(2, 4\)"),
        (np.ones((2, 2, 3)), np.ones((2, 3)), r"got \(2, 2, 3\), \(2, 3\)"),
        (np.array([[np.nan, 1.0]]), None, "X holds NaN"),
        (np.ones((2, 3)), np.full((2, 3), np.inf), "Y holds NaN or infinity"),
        (np.array([["a"]]), None, "real numbers"),
        (np.ones((2, 3), complex), None, "real numbers"),
    ],
)
def test_bad_points_are_refused(x, y, message):
    with pytest.raises(QuernelError, match=message):
        NTKernel().ntk(x, y)
