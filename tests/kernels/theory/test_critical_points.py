"""Critical points: closed forms to 1e-6 by name, by module and by any callable; classes; refusals; bounded work."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.kernels.theory import Universality, as_activation, criticality, kernel_recursion
from quernel.kernels.theory.averages import averages
from tests.reference import deep_learning_theory as reference

# The promise of the closed forms.
EXACT = {"abs": 1e-6}
GELU_K = (3 + math.sqrt(17)) / 2

TABLE = [
    ("relu", "scale-invariant", 2.0, 0.0, None, 5.0, 0.0),
    ("linear", "scale-invariant", 1.0, 0.0, None, 2.0, 0.0),
    ("leaky_relu", "scale-invariant", 2 / (1 + 1e-4), 0.0, None, 3 * (1 + 1e-8) / 2 / ((1 + 1e-4) / 2) ** 2 - 1, 0.0),
    ("tanh", "K*=0", 1.0, 0.0, 0.0, 2 / 3, 1.0),
    ("sin", "K*=0", 1.0, 0.0, 0.0, 2 / 3, 1.0),
    ("erf", "K*=0", math.pi / 4, 0.0, 0.0, 2 / 3, 1.0),
    ("gelu", "half-stable", 1.9830583, 0.1729224, GELU_K, None, 0.0),
    ("silu", "half-stable", 1.9880047, 0.5551432, 14.3201736, None, 0.0),
]


@pytest.mark.parametrize(("name", "cls", "weight", "bias", "kernel", "nu", "p"), TABLE, ids=[row[0] for row in TABLE])
def test_closed_forms(name, cls, weight, bias, kernel, nu, p):
    found = criticality(name)
    assert found.cls == cls and found.stable
    assert pytest.approx(weight, **EXACT) == found.C_W
    assert found.C_b == pytest.approx(bias, **EXACT)
    assert found.K_star == (kernel if kernel is None else pytest.approx(kernel, **EXACT))
    assert found.p_perp == pytest.approx(p, **EXACT)
    if nu is not None:
        assert found.nu == pytest.approx(nu, **EXACT)


def test_half_stable_rates_and_drifts():
    gelu, silu = criticality("gelu"), criticality("silu")
    assert gelu.nu == pytest.approx(4.904, abs=1e-3) and silu.nu == pytest.approx(4.923, abs=1e-3)
    assert gelu.drift == pytest.approx(-1.436e-4, rel=1e-3) and silu.drift == pytest.approx(2.85e-6, rel=2e-3)
    assert "above" in gelu.note and "below" in silu.note
    # Small signals see a slope of 1/2: critical at K = 0, and left by them.
    for found in (gelu, silu):
        assert found.alternative.cls == Universality.K_ZERO and not found.alternative.stable
        assert pytest.approx(4.0, **EXACT) == found.alternative.C_W and found.alternative.C_b == 0


class Bent(nn.Module):
    """GELU as a user might write it, with a learned parameter and in float32."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, z):
        return self.scale * z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (nn.GELU(), "gelu"),
        (Bent(), "gelu"),
        (lambda z: z * torch.sigmoid(z), "silu"),
        (torch.tanh, "tanh"),
        (lambda z: torch.expm1(2 * z) / (torch.expm1(2 * z) + 2), "tanh"),
        (nn.ReLU(inplace=True), "relu"),
        (lambda z: z.relu_(), "relu"),
        (nn.LeakyReLU(), "leaky_relu"),
        ("swish", "silu"),
        ("GELU", "gelu"),
    ],
)
def test_any_callable_gives_what_the_name_gives(given, name):
    got, wanted = criticality(given), criticality(name)
    assert got.cls == wanted.cls
    for field in ("C_W", "C_b", "K_star", "p_perp", "nu", "drift"):
        a, b = getattr(got, field), getattr(wanted, field)
        assert a == (b if b is None else pytest.approx(b, **EXACT)), field


def test_a_learned_slope_counts():
    assert pytest.approx(2 / 1.25, **EXACT) == criticality(nn.PReLU(init=0.5)).C_W
    assert pytest.approx(2 / 1.01, **EXACT) == criticality(nn.PReLU(init=0.1)).C_W


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
def test_what_has_no_critical_point_says_so(name):
    found = criticality(name)
    assert found.cls == Universality.NONE and found.C_W is None and found.nu is None
    assert "tanh" in found.note
    with pytest.raises(QuernelError, match=f"{name}' has no critical initialisation"):
        found.variances()


@pytest.mark.parametrize("grows", [torch.exp, torch.sinh, torch.cosh, torch.expm1])
def test_growth_beyond_the_quadrature_gives_no_critical_point(grows):
    """For exp chi_parallel = 2 chi_perp at every K; nodes up to 12 deviations miss most of <s^2> from K = 20 on."""
    assert criticality(grows).cls == Universality.NONE


def test_a_function_of_numpy_is_named():
    with pytest.raises(QuernelError, match="must be differentiable by autograd"):
        criticality(np.tanh)


def test_a_square_has_no_critical_point():
    """Flat at 0, where only rounding gives it a slope."""
    assert criticality(lambda z: z**2).cls == Universality.NONE


def test_an_activation_that_bends_at_zero_has_a_class_and_no_rate():
    found = criticality("elu")
    assert found.cls == Universality.K_ZERO and found.stable
    assert (found.C_W, found.C_b) == (pytest.approx(1.0, **EXACT), 0.0)
    assert found.nu is None and found.p_perp is None and "Not smooth at 0" in found.note
    # K^l ~ 2 pi / l^2, with a correction like log l / l.
    kernel = kernel_recursion(1.0, 3000, found.C_W, found.C_b, "elu")
    ratios = [float(kernel[depth - 1]) * depth**2 / (2 * math.pi) for depth in (300, 3000)]
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1) and ratios[1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["selu", "hardtanh", "relu6", "hardswish", "mish", "softsign"])
def test_a_critical_point_is_one(name):
    """Where K* > 0, both susceptibilities are 1 at a fixed point; where K* = 0, they go to 1 with K."""
    found, act = criticality(name), as_activation(name)
    weight, bias = found.variances()
    assert found.cls in (Universality.HALF_STABLE, Universality.K_ZERO)
    kernel = found.K_star or 1e-9
    a = averages(act, torch.tensor(kernel, dtype=torch.float64))
    tolerance = 1e-9 if found.K_star else 1e-3
    assert weight * float(a.square_slope) == pytest.approx(1, abs=tolerance)
    assert weight * float(a.slope_square) == pytest.approx(1, abs=tolerance)
    assert bias + weight * float(a.square) == pytest.approx(kernel, rel=tolerance)


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "selu", "hardtanh", "relu6", "hardswish", "silu"])
@pytest.mark.parametrize("kernel", [0.3, 5.0])
def test_averages_are_integrals(name, kernel):
    act = as_activation(name)

    def s(z):
        return float(act(torch.tensor([z], dtype=torch.float64)))

    def slope(z):
        return float(act.slope(torch.tensor([z], dtype=torch.float64)))

    def integral(f):
        return reference.average(f, kernel, (0.0, *act.kinks))

    got = averages(act, torch.tensor(kernel, dtype=torch.float64))
    wanted = {
        "square": integral(lambda z: s(z) ** 2),
        "square_slope": integral(lambda z: s(z) * slope(z) * z) / kernel,
        "slope_square": integral(lambda z: slope(z) ** 2),
        "fourth": integral(lambda z: s(z) ** 4),
        "joint": integral(lambda z: z**2 * s(z) ** 2),
        "tilt": integral(lambda z: 2 * s(z) * slope(z)),
    }
    for field, value in wanted.items():
        assert float(getattr(got, field)) == pytest.approx(value, rel=1e-8, abs=1e-10), field
    step = 1e-4 * kernel
    near = averages(act, torch.tensor([kernel - step, kernel + step], dtype=torch.float64))
    for field, of in (("square_bend", near.square_slope), ("tilt_slope", near.tilt)):
        difference = float(of[1] - of[0]) / (2 * step)
        assert float(getattr(got, field)) == pytest.approx(difference, rel=1e-6, abs=1e-8), field


@pytest.mark.parametrize(
    ("given", "kinks"),
    [
        ("hardtanh", (-1.0, 1.0)),
        ("relu6", (6.0,)),
        (nn.Hardswish(), (-3.0, 3.0)),
        (nn.Hardshrink(0.5), (-0.5, 0.5)),
        (lambda z: (z - 1.5).abs() + 0.2 * torch.tanh(z), (1.5,)),
        (lambda z: torch.sin(3 * z), ()),
        ("elu", ()),
        ("gelu", ()),
    ],
)
def test_kinks_are_found(given, kinks):
    assert as_activation(given).kinks == pytest.approx(kinks, abs=1e-9)


def test_a_skip_connection_scales_both_variances():
    for name in ("relu", "tanh", "gelu"):
        plain, skip = criticality(name), criticality(name, residual=0.6)
        assert pytest.approx(0.64 * plain.C_W) == skip.C_W and skip.C_b == pytest.approx(0.64 * plain.C_b)
        assert skip.K_star == plain.K_star
    # Odd: (1 - c^2) (4 c^2 + (1 - c^2) (3 A4 / A2^2 - 1)).
    assert criticality("linear", residual=0.6).nu == pytest.approx(0.64 * (4 * 0.36 + 0.64 * 2))
    # ReLU has odd vertices besides: no gain over the plain network at c^2 = 1/2.
    assert criticality("relu", residual=0.5**0.5).nu == pytest.approx(5.32, abs=0.01)
    assert criticality("relu", residual=0.9**0.5).nu == pytest.approx(1.35, abs=0.01)


def test_fluctuations_of_a_width():
    relu, tanh = criticality("relu"), criticality("tanh")
    assert relu.fluctuation(9, 64) == pytest.approx((1 + 5 / 64) ** 8 - 1) == pytest.approx(0.826, abs=1e-3)
    assert tanh.fluctuation(9, 64) == pytest.approx(2 / 3 * 8 / 64)
    assert relu.fluctuation(1, 64) == 0
    with pytest.raises(QuernelError, match="has no rate nu"):
        criticality("elu").fluctuation(9, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.log, "log' is nan at z = -20"),
        (3, "activation must be a name or a callable; got int"),
        (None, "activation must be a name or a callable; got NoneType"),
        ("rleu", "activation must be a callable or one of celu.*got 'rleu'"),
        (nn.Softmax(dim=-1), "softmax' must act elementwise"),
        (nn.Linear(3, 3), "linear' cannot be applied to a float64 vector"),
        (lambda z: z.sum(), "must return a tensor of the shape it got"),
        (lambda z: z.detach() * 2 + 1, "must be differentiable by autograd"),
    ],
)
def test_bad_activations_are_refused(given, message):
    with pytest.raises(QuernelError, match=message):
        criticality(given)


@pytest.mark.parametrize("residual", [-0.1, 1.0, 2.0, math.nan])
def test_bad_skip_connections_are_refused(residual):
    with pytest.raises(QuernelError, match="residual must be a finite number in"):
        criticality("relu", residual=residual)


def test_the_work_is_bounded():
    """Half a second for the advisor and 50 ms for an initialisation leave room for a million evaluations or so."""
    seen = []

    def counted(z):
        seen.append(z.numel())
        return F.silu(z)

    criticality(counted)
    assert sum(seen) < 1_000_000 and len(seen) < 300
    # A name is worked out once.
    assert criticality("silu") is criticality("silu")
    assert np.isfinite(criticality("silu").nu)
