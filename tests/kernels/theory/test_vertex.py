"""Fluctuations at finite width against counted random networks: plain, with skip connections, of unequal widths."""

import math

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels.theory import as_activation, criticality, four_vertex
from quernel.testing import require_mean, require_same_distribution
from tests.reference import deep_learning_theory as reference


def on_arrays(name):
    act = as_activation(name).function
    return lambda z: act(torch.from_numpy(z)).numpy()


def test_the_short_way_to_draw_networks_is_the_long_one():
    """A network drawn by its law and one drawn by its matrices have one distribution, layer by layer."""
    s, shape = on_arrays("gelu"), {"width": 12, "depth": 5, "weight": 1.2, "bias": 0.1}
    long = reference.networks(s, 150, **shape, power=0.9, draw=np.random.default_rng(0), residual=0.6)
    draw = np.random.default_rng(1)
    short = list(reference.preactivations(s, 150, **shape, start=0.1 + 1.2 * 0.9, draw=draw, residual=0.6))
    logs = [np.stack([np.log(reference.mean_squares(z)) for z in layers], 1) for layers in (long, short)]
    require_same_distribution(*logs)
    firsts = [np.stack([z[:, 0] for z in layers], 1) for layers in (long, short)]
    require_same_distribution(*firsts)


def test_relu_fluctuates_exactly_as_predicted():
    """(1 + nu / n)^(l - 1) is exact for scale-invariant networks, so the means may be tested as means."""
    n, depth, relu = 64, 9, criticality("relu")
    layers = list(
        reference.preactivations(on_arrays("relu"), 20_000, n, depth, relu.C_W, relu.C_b, 1.0, np.random.default_rng(0))
    )
    for layer in (2, depth):
        z = layers[layer - 1]
        require_mean(reference.mean_squares(z), 1.0)
        require_mean(reference.pair_products(z), 1 + relu.fluctuation(layer, n))
    assert relu.fluctuation(depth, n) == pytest.approx(0.826, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "squared", "start"),
    [("linear", 0.5, 1.0), ("tanh", 0.5, 1e-6), ("relu", 0.5, 1.0), ("relu", 0.9, 1.0)],
)
def test_skip_connections_fluctuate_as_predicted(name, squared, start):
    """Within 10 % at n = 512 in layer 9; 4,000 networks leave 3 % or so to chance."""
    n, depth, c = 512, 9, math.sqrt(squared)
    point = criticality(name, residual=c)
    draw = np.random.default_rng(2)
    *_, z = reference.preactivations(on_arrays(name), 4000, n, depth, point.C_W, point.C_b, start, draw, c)
    got = reference.relative_vertex(z)
    wanted = float(four_vertex(start, depth, point.C_W, point.C_b, name, residual=c).relative[-1]) / n
    assert got == pytest.approx(wanted, rel=0.1)
    if name != "relu":
        # Odd, in the small-signal limit: no odd vertex, and so many equal steps.
        nu = (1 - squared) * (4 * squared + (1 - squared) * 2)
        assert wanted == pytest.approx(nu * (depth - 1) / n, rel=1e-3)


def test_the_odd_vertex_is_most_of_it_for_a_relu_with_skip_connections():
    c = math.sqrt(0.9)
    point = criticality("relu", residual=c)
    found = four_vertex(1.0, 400, point.C_W, point.C_b, "relu", residual=c)
    steps = found.relative.diff()
    assert float(steps[0]) == pytest.approx(0.1 * (3.6 + 0.5), rel=1e-9)
    assert float(steps[7]) == pytest.approx(0.70, abs=0.03)
    assert float(steps[-1]) == pytest.approx(point.nu, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "squared"), [("relu", 0.5), ("relu", 0.9), ("gelu", 0.5), ("tanh", 0.5), ("linear", 0.9)]
)
def test_skip_connections_at_large(name, squared):
    """30,000 networks: the vertex within 10 % (1.5 % of it chance), the mean correction within its own chance."""
    n, depth, c = 512, 9, math.sqrt(squared)
    point = criticality(name, residual=c)
    start = point.K_star or 1.0
    total, squares, products = 30_000, [], []
    for part in range(10):
        draw = np.random.default_rng([3, part])
        *_, z = reference.preactivations(on_arrays(name), total // 10, n, depth, point.C_W, point.C_b, start, draw, c)
        squares.append(reference.mean_squares(z))
        products.append(reference.pair_products(z))
    square, product = np.concatenate(squares), np.concatenate(products)
    found = four_vertex(start, depth, point.C_W, point.C_b, name, residual=c)
    got = product.mean() / square.mean() ** 2 - 1
    assert got == pytest.approx(float(found.relative[-1]) / n, rel=0.1)
    expected = float(found.kernel[-1] + found.mean_correction[-1] / n)
    # The next order of the mean is below (depth / n)^2 of it.
    error = square.std() / math.sqrt(total)
    assert abs(square.mean() - expected) < 5 * error + 2 * (depth / n) ** 2 * expected


def test_the_mean_moves_as_predicted():
    """Tanh far from its small-signal limit: E z^2 is below K by G / n, many standard errors of 20,000 networks."""
    n, depth = 32, 6
    draw = np.random.default_rng(4)
    *_, z = reference.preactivations(on_arrays("tanh"), 20_000, n, depth, 1.0, 0.0, 1.0, draw)
    found = four_vertex(1.0, depth, 1.0, 0.0, "tanh")
    square = reference.mean_squares(z)
    moved, error = float(found.mean_correction[-1]) / n, square.std() / math.sqrt(len(square))
    assert abs(moved) > 5 * error
    assert square.mean() - float(found.kernel[-1]) == pytest.approx(moved, rel=0.2, abs=4 * error)


def test_tanh_approaches_two_thirds():
    found = four_vertex(1.0, 400, 1.0, 0.0, "tanh")
    assert float(found.relative[-1]) / 400 == pytest.approx(0.661, abs=2e-3)


def test_unequal_widths_add_up_as_one_over_width():
    """Scale-invariant: V^L / n_(L-1) = 5 (1/n_1 + ... + 1/n_(L-1)) K^2, whatever the order."""
    widths = (30, 100, 50)
    found = four_vertex(1.0, 4, 2.0, 0.0, "relu", widths=widths)
    assert float(found.relative[-1]) / widths[-1] == pytest.approx(5 * sum(1 / n for n in widths))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be an integer"),
        ({"kernel": 0.0}, "kernel must be a finite number"),
        ({"widths": [4]}, "widths must name the 2 hidden layers of 3 layers; got 1"),
        ({"widths": [4, 0]}, "widths must be an integer in"),
        ({"residual": -0.5}, "residual must be a finite number"),
        ({"C_W": 0.0}, "K falls to 0 after 1 layers"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {"kernel": 1.0, "depth": 3, "C_W": 1.0, "C_b": 0.0, "activation": "tanh"} | changes
    with pytest.raises(QuernelError, match=message):
        four_vertex(**given)
