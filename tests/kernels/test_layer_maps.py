"""Layer maps: every activation by random draws and by differences, closed forms against quadrature, refusals."""

import pytest
import torch
from scipy import stats

from quernel._errors import QuernelError
from quernel.kernels.gaussian_averages import gaussian_product_average
from quernel.kernels.layer_maps import layer_map, pair_map, variance_map
from quernel.kernels.theory.activations import ACTIVATIONS, as_activation
from quernel.testing import require_mean


def gram(n=3, m=2, dim=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, dim, generator=draw, dtype=torch.float64) for rows in (n, m))
    return x @ y.mT, x.square().sum(-1), y.square().sum(-1)


def drawn(cross, left, right, count=20000):
    """Return draws of (u, v), shapes (count, n, m), for every pair of points."""
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(2, count, *cross.shape, generator=draw, dtype=torch.float64)
    u = left[:, None].sqrt() * z[0]
    along = cross / left[:, None]
    return u, along * u + (right[None, :] - along * cross).sqrt() * z[1]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_values_are_means_of_draws_and_slopes_their_derivative_in_the_covariance(name):
    value_map, slope_map = layer_map(name)
    cross, left, right = gram()
    u, v = drawn(cross, left, right)
    f = ACTIVATIONS[name]
    require_mean((f(u) * f(v)).numpy(), value_map(cross, left, right).numpy())
    # Price's theorem: the derivative of E[f(u) f(v)] in the covariance is E[f'(u) f'(v)].
    step = 1e-4
    change = value_map(cross + step, left, right) - value_map(cross - step, left, right)
    torch.testing.assert_close(slope_map(cross, left, right), change / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "erf", "linear"])
def test_closed_forms_equal_quadrature(name):
    cross, left, right = gram()
    act = as_activation(name)
    for closed, f in zip(layer_map(name), (act, act.slope), strict=True):
        by_sums = gaussian_product_average(f, f, left[:, None], right[None, :], cross)
        torch.testing.assert_close(closed(cross, left, right), by_sums, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["relu", "erf", "identity", "tanh", "leaky_relu"])
def test_both_at_once_are_each_alone(name):
    cross, left, right = gram()
    value, slope = pair_map(name)(cross, left, right)
    alone = layer_map(name)
    torch.testing.assert_close(value, alone[0](cross, left, right), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(slope, alone[1](cross, left, right), rtol=1e-13, atol=1e-14)
    first, nothing = pair_map(name, slopes=False)(cross, left, right)
    assert torch.equal(first, value) and nothing is None


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_variances_are_the_values_of_points_with_themselves(name):
    _, left, _ = gram()
    own = layer_map(name)[0](left[:, None, None], left[:, None], left[:, None])[:, 0, 0]
    torch.testing.assert_close(variance_map(name)(left), own, rtol=1e-8, atol=1e-9)


def test_a_point_is_at_no_angle_to_itself_whatever_the_order_of_sums():
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gram = (x @ x.mT, (x * x).sum(-1), (x * x).flip(-1).sum(-1))
    for slope in (layer_map("relu")[1](*gram), pair_map("relu")(*gram)[1]):
        assert bool((slope.diagonal() == 0.5).all())
    gram = (-gram[0], *gram[1:])
    for slope in (layer_map("relu")[1](*gram), pair_map("relu")(*gram)[1]):
        assert bool((slope.diagonal() == 0).all())


def test_a_point_without_length_has_no_slope():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for made in (pair_map("relu")(torch.zeros(1, 2).double(), zero, one), layer_map("relu")):
        parts = [
            part if isinstance(part, torch.Tensor) else part(torch.zeros(1, 2).double(), zero, one) for part in made
        ]
        assert [part.tolist() for part in parts] == [[[0.0, 0.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize("activation", ["tanh", torch.tanh])
def test_gradients_flow_through_both_maps(activation):
    cross, left, right = (part.requires_grad_() for part in gram(2, 2))
    for made in layer_map(activation):
        assert torch.autograd.gradcheck(made, (cross, left, right), atol=1e-6)


def test_one_dtype_in_is_the_same_out():
    single = [part.float() for part in gram()]
    assert all(part.dtype == torch.float32 for part in pair_map("tanh")(*single))


def test_a_function_of_yours_is_taken():
    cross, left, right = gram()
    f = torch.nn.functional.leaky_relu
    wanted = gaussian_product_average(f, f, left[:, None], right[None, :], cross)
    torch.testing.assert_close(layer_map(f)[0](cross, left, right), wanted)


def test_bad_activations_and_shapes_are_refused():
    with pytest.raises(QuernelError, match=r"activation must be a callable or one of .*relu"):
        layer_map("no such")
    with pytest.raises(QuernelError, match="differentiable by autograd"):
        layer_map(lambda z: (z > 0).double())
    with pytest.raises(QuernelError, match="cross, left and right"):
        layer_map("tanh")[0](torch.ones(2, 2), torch.ones(3), torch.ones(2))


@pytest.mark.parametrize(("name", "ends"), [("hardtanh", (-1.0, 1.0)), ("relu6", (0.0, 6.0)), ("hardswish", None)])
def test_kinks_away_from_0_are_found(name, ends):
    a, b, c, h = 2.0, 1.5, 0.7, 1e-4
    value, slope = layer_map(getattr(torch.nn.functional, name))

    def at(map_of, cross):
        return float(map_of(*(torch.tensor(part, dtype=torch.float64) for part in ([[cross]], [a], [b]))))

    # The slope in the covariance of E f(u) f(v) is E f'(u) f'(v).
    assert (at(value, c + h) - at(value, c - h)) / (2 * h) == pytest.approx(at(slope, c), abs=1e-6)
    if ends is not None:
        # Slopes of 1 between the kinks and 0 outside: the probability of a square.
        joint = stats.multivariate_normal([0, 0], [[a, c], [c, b]])
        square = joint.cdf([ends[1]] * 2, lower_limit=[ends[0]] * 2)
        assert at(slope, c) == pytest.approx(square, abs=1e-6)
