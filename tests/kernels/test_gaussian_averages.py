"""Gaussian averages: closed forms of smooth, kinked and discontinuous functions at every width, gradients, refusals."""

import math

import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels import arc_cosine_gram, erf_gram, gaussian_average, gaussian_product_average

VARIANCES = torch.tensor([1e-6, 0.01, 1.0, 9.0, 1e4], dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        (lambda z: z**2, lambda v: v),
        (lambda z: z**4, lambda v: 3 * v**2),
        (torch.relu, lambda v: (v / (2 * torch.pi)).sqrt()),
        (lambda z: (z > 0).double(), lambda v: torch.full_like(v, 0.5)),
        (torch.cos, lambda v: torch.exp(-v / 2)),
        (lambda z: torch.erf(z) ** 2, lambda v: 2 / math.pi * torch.asin(2 * v / (1 + 2 * v))),
        (lambda z: torch.abs(z) ** 3, lambda v: 2 * math.sqrt(2 / math.pi) * v**1.5),
    ],
    ids=["square", "fourth power", "relu", "step", "cosine", "erf squared", "cubed length"],
)
def test_one_variable_equals_its_closed_form(f, wanted):
    # A cosine of a wide variable oscillates faster than any rule follows; the bound is absolute there.
    variances = VARIANCES[:4] if f is torch.cos else VARIANCES
    torch.testing.assert_close(gaussian_average(f, variances), wanted(variances), rtol=1e-10, atol=1e-10)


def test_a_narrow_step_of_a_wide_variable_is_resolved():
    # E tanh^2 = 1 - E sech^2, and sech^2 of a wide z is a spike of area 2 under a density of 1 / sqrt(2 pi v).
    v = torch.tensor(1e6, dtype=torch.float64)
    got = gaussian_average(lambda z: torch.tanh(z) ** 2, v)
    assert float(got) == pytest.approx(1 - 2 / math.sqrt(2 * math.pi * 1e6), abs=1e-8)


def pairs():
    a = torch.tensor([1.0, 2.0, 0.3, 1.0, 1.0, 4.0], dtype=torch.float64)
    b = torch.tensor([1.0, 0.5, 3.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    share = torch.tensor([0.0, 0.6, -0.8, 1.0, -1.0, 0.999999], dtype=torch.float64)
    return a, b, share * (a * b).sqrt()


@pytest.mark.parametrize(
    ("f", "kernel", "tolerance"),
    [
        (torch.relu, lambda *g: arc_cosine_gram(*g) / 2, 1e-9),
        (lambda z: (z > 0).double(), lambda *g: arc_cosine_gram(*g, order=0) / 2, 1e-9),
        (torch.erf, erf_gram, 1e-7),
    ],
    ids=["relu", "step", "erf"],
)
def test_two_variables_equal_the_kernels(f, kernel, tolerance):
    a, b, c = pairs()
    wanted = torch.stack([kernel(c[i, None, None], a[i, None], b[i, None])[0, 0] for i in range(len(a))])
    torch.testing.assert_close(gaussian_product_average(f, f, a, b, c), wanted, rtol=0, atol=tolerance)


def test_two_functions_of_two_variables():
    a, b, c = pairs()
    got = gaussian_product_average(lambda u: u, lambda v: v**3, a, b, c)
    torch.testing.assert_close(got, 3 * b * c, rtol=1e-9, atol=1e-9)


def test_shapes_broadcast_and_large_ones_go_in_blocks():
    a = torch.linspace(0.5, 2, 30, dtype=torch.float64)
    got = gaussian_product_average(torch.tanh, torch.tanh, a[:, None], a, 0.5 * (a[:, None] * a).sqrt())
    assert got.shape == (30, 30)
    torch.testing.assert_close(got, got.T)
    assert gaussian_product_average(torch.tanh, torch.tanh, a[:0], a[:0], a[:0]).shape == (0,)


def test_gradients_are_those_of_differences():
    v = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: gaussian_average(torch.tanh, v), (v,))
    c = torch.tensor([0.1, -0.4], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, c: gaussian_product_average(torch.tanh, torch.sin, v, w, c), (v, c))


def test_bad_input_is_refused():
    one = torch.tensor(1.0)
    with pytest.raises(QuernelError, match="variance must be >= 0"):
        gaussian_average(torch.tanh, -one)
    with pytest.raises(QuernelError, match="left and right must be >= 0"):
        gaussian_product_average(torch.tanh, torch.tanh, one, one * torch.nan, one)
    with pytest.raises(QuernelError, match="a tensor of the shape it got"):
        gaussian_average(lambda z: z.sum(), one)


def clipped(z):
    return z.clamp(-1, 1)


def jump(z):
    return (z > 0.7).double()


def tail(x):
    return 0.5 * torch.erfc(x / math.sqrt(2))


def test_kinks_elsewhere_are_exact_where_they_are_named():
    v = torch.tensor([1e-4, 0.3, 1.0, 40.0, 1e4], dtype=torch.float64)
    a = v.rsqrt()
    # E min(z^2, 1) = v (1 - 2 Q(a) - 2 a phi(a)) + 2 Q(a), with a = 1 / sqrt(v).
    density = torch.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    wanted = v * (1 - 2 * tail(a) - 2 * a * density) + 2 * tail(a)
    torch.testing.assert_close(
        gaussian_average(lambda z: clipped(z) ** 2, v, (-1.0, 1.0)), wanted, rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(gaussian_average(jump, v, (0.7,)), tail(0.7 * a), rtol=1e-10, atol=1e-12)
    # Unnamed, the rule steps over them: the argument is needed.
    assert float((gaussian_average(jump, v) - tail(0.7 * a)).abs().max()) > 1e-4


def test_pairs_with_kinks_elsewhere():
    a, b, c = pairs()
    got = gaussian_product_average(clipped, clipped, a, b, c, (-1.0, 1.0))
    # Price: d/dc E f(u) g(v) = E f'(u) g'(v), the probability that both lie within the kinks.
    inside = gaussian_product_average(
        lambda u: (u.abs() < 1).double(), lambda v: (v.abs() < 1).double(), a, b, c, (-1.0, 1.0)
    )
    step = 1e-4
    ends = [gaussian_product_average(clipped, clipped, a, b, c + s, (-1.0, 1.0)) for s in (-step, step)]
    inner = (c.abs() < 0.99 * (a * b).sqrt()).nonzero()[:, 0]
    torch.testing.assert_close(((ends[1] - ends[0]) / (2 * step))[inner], inside[inner], rtol=0, atol=1e-6)
    # Coincident and opposite points are one variable.
    alone = gaussian_average(lambda z: clipped(z) ** 2, a, (-1.0, 1.0))
    assert float(got[3]) == pytest.approx(float(alone[3]), abs=1e-10)
    assert float(got[4]) == pytest.approx(-float(alone[4]), abs=1e-10)
    # Independent ones are a product; a kink that is none changes nothing.
    assert float(got[0]) == pytest.approx(0, abs=1e-12)
    plain = gaussian_product_average(torch.relu, torch.tanh, a, b, c)
    torch.testing.assert_close(
        gaussian_product_average(torch.relu, torch.tanh, a, b, c, (0.3,)), plain, rtol=0, atol=1e-8
    )


def test_both_probabilities_at_once_are_those_of_the_rectangle():
    from scipy import stats

    a, b, c = (torch.tensor([x], dtype=torch.float64) for x in (1.5, 0.8, 0.6))
    got = gaussian_product_average(jump, jump, a, b, c, (0.7,))
    law = stats.multivariate_normal([0, 0], [[1.5, 0.6], [0.6, 0.8]])
    assert float(got) == pytest.approx(float(law.cdf([-0.7, -0.7])), abs=1e-6)


def test_gradients_with_kinks_and_bad_kinks():
    v = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: gaussian_average(clipped, v, (-1.0, 1.0)), (v,))
    c = torch.tensor([0.1, -0.4], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 1.0], dtype=torch.float64)
    average = gaussian_product_average
    assert torch.autograd.gradcheck(lambda v, c: average(clipped, torch.tanh, v, w, c, (-1.0, 1.0)), (v, c))
    with pytest.raises(QuernelError, match="kinks must be a finite number"):
        gaussian_average(clipped, v, (math.nan,))
    nothing = gaussian_product_average(clipped, clipped, w[:0], w[:0], w[:0], (1.0,))
    assert nothing.shape == (0,)
