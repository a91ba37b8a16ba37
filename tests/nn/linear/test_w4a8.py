"""``W4A8Linear``: exact integers, static scales, what it stores and shows, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._intrinsics import portable
from quernel.nn import W4A8Linear
from quernel.nn.functional import int8_linear
from quernel.nn.weights import Int4GroupWeight, Int8Weight
from tests.reference import dgq as reference

EXACT = {"rtol": 0, "atol": 0}
# One float32 product after integers, in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def layer(inputs=128, out=13, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, out, bias=bias).requires_grad_(False)
    linear.weight.copy_(torch.randn(out, inputs, generator=generator) / inputs**0.5)
    if bias:
        linear.bias.copy_(torch.linspace(-1, 1, out))
    return linear


def rows(n, inputs=128, seed=1):
    return torch.randn(n, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("inputs", [128, 384, 4096])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_fused_product_is_the_int64_formula(inputs, tokens):
    linear = layer(inputs)
    ours = W4A8Linear.from_linear(linear, group_size=128, grid=(2, 4))
    x = rows(tokens, inputs)
    step = x.abs().amax(1, keepdim=True) / 127
    x8 = (x * (127 / x.abs().amax(1, keepdim=True))).round()
    weight, groups = ours.weight, inputs // 128
    scales, zeros = (part[:13, :groups].numpy() for part in (weight.group_scale, weight.group_zero))
    sums = reference.multiply(weight.unpack().numpy(), scales, zeros, x8.numpy(), 128)
    np.testing.assert_array_equal(sums, x8.long().numpy() @ ours.unpack_int8().long().numpy().T)
    wanted = torch.from_numpy(sums).float() * (step * weight.scale) + linear.bias
    torch.testing.assert_close(ours(x), wanted, **ROUNDING)
    exact = int8_linear(x, ours.unpack_int8(), weight.scale, ours.bias)
    torch.testing.assert_close(ours(x), exact, **(ROUNDING if portable() else EXACT))


def test_dequantize_is_the_layers_weight():
    linear, X = layer(bias=False), rows(500)
    for act in ("token", "static", None):
        ours = W4A8Linear.from_linear(linear, X, act=act)
        wanted = X @ ours.dequantize().T
        # 8-bit activations on one factor; none of it without them.
        assert (ours(X) - wanted).norm() <= (1e-6 if act is None else 0.02) * wanted.norm()
        assert (wanted - X @ linear.weight.T).norm() < 0.12 * wanted.norm()


def test_inputs_help_and_feedback_helps_more():
    few = rows(2000, 16)
    X = few @ rows(16, 128, seed=5) + rows(2000) / 2
    linear = layer(out=64)
    wanted = X @ linear.weight.T
    lost = [
        float((X @ (W4A8Linear.from_linear(linear, *known).dequantize() - linear.weight).T).norm() / wanted.norm())
        for known in ((), (X,))
    ]
    plain = W4A8Linear.from_linear(linear, X, compensate=False).dequantize()
    assert lost[1] < float((X @ (plain - linear.weight).T).norm() / wanted.norm()) < lost[0]


def test_static_scale_is_the_largest_input_and_clips_beyond_it():
    linear, X = layer(), rows(200)
    top = float(X.abs().max())
    ours = W4A8Linear.from_linear(linear, X, act="static")
    torch.testing.assert_close(ours.inverse, torch.full((128,), 1 / top))
    torch.testing.assert_close(ours(X * 100), ours((X * 100).clamp(-top, top)), **ROUNDING)
    small = X / 50  # a static step does not adapt: tiny rows lose their small values
    token = W4A8Linear.from_linear(linear, X)
    wanted = F.linear(small, linear.weight, linear.bias)
    assert (ours(small) - wanted).norm() > 2 * (token(small) - wanted).norm()


@pytest.mark.parametrize("act", ["token", "static", None])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation_is_part_of_the_layer(act, activation):
    X = rows(40)
    apart = W4A8Linear.from_linear(layer(), X, act=act)
    fused = W4A8Linear.from_linear(layer(), X, act=act, activation=activation)
    function = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}.get(activation) or getattr(F, activation)
    torch.testing.assert_close(fused(X), function(apart(X)), **ROUNDING)


def test_scales_survive_a_cast_and_outputs_follow_the_input():
    X = rows(60)
    ours = W4A8Linear.from_linear(layer(), X, act="static")
    cast = copy.deepcopy(ours).bfloat16()
    assert cast.weight.scale.dtype == cast.inverse.dtype == cast.bias.dtype == torch.float32
    assert cast(X.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(cast(X), ours(X), **EXACT)
    assert ours(X.double()).dtype == torch.float64


def test_bytes_are_an_eighth_and_are_shown():
    ours = W4A8Linear(1024, 512)
    assert ours.weight.nbytes <= 0.14 * 4 * 1024 * 512
    assert "group_size=128, bits/weight=4.16, act='token'" in repr(ours)
    assert ours.weight.bits_per_weight == pytest.approx(4 + 16 / 128 + 32 / 1024)


def test_default_groups_depend_on_the_inputs():
    assert W4A8Linear.from_linear(layer(512), grid=(1, 2)).weight.group_size == 32
    assert W4A8Linear.from_float(layer(1024), grid=(1, 2)).weight.group_size == 128


def test_inputs_that_are_always_zero_are_harmless():
    ours = W4A8Linear.from_linear(layer(), torch.zeros(10, 128), act="static")
    assert ours(rows(3)).isfinite().all()
    torch.testing.assert_close(ours(torch.zeros(2, 128)), layer().bias.expand(2, -1), **EXACT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: W4A8Linear.from_linear(nn.Conv2d(1, 1, 1)), "linear must be Linear; got Conv2d"),
        (lambda: W4A8Linear.from_linear(layer(), act="static"), "takes its scale from X"),
        (lambda: W4A8Linear.from_linear(layer(), rows(4, 127)), r"x must have shape \(..., 128\)"),
        (lambda: W4A8Linear.from_linear(layer(), rows(4) * torch.nan), "x holds NaN or infinity"),
        (lambda: W4A8Linear.from_linear(layer(96), group_size=64, strict=True), "must divide the 96 inputs"),
        (lambda: W4A8Linear.from_linear(layer(), group_size=16), "group_size must be one of 32, 64, 128"),
        (lambda: W4A8Linear(128, 8, act="row"), "act must be one of 'token', 'static', None"),
        (lambda: W4A8Linear(128, 8, activation="tanh"), "activation must be one of"),
        (lambda: W4A8Linear(133145, 1), "in_features must be an integer"),
        (lambda: W4A8Linear.from_weight(Int8Weight((4, 128))), "weight must be Int4GroupWeight"),
        (lambda: W4A8Linear.from_weight(Int4GroupWeight((4, 8, 3, 3))), r"weight must be a matrix \(out, in\)"),
        (lambda: W4A8Linear.from_weight(Int4GroupWeight((4, 128)), torch.ones(5)), r"bias must have shape \(4,\)"),
        (lambda: W4A8Linear.from_weight(Int4GroupWeight((4, 128)), act="static"), "needs inverse"),
        (lambda: W4A8Linear.from_weight(Int4GroupWeight((4, 128)), None, torch.ones(4)), r"inverse must .*\(128,\)"),
        (lambda: W4A8Linear(128, 4)(torch.ones(2, 127)), r"x must be of shape \(..., 128\).*\(2, 127\)"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(QuernelError, match=message):
        make()


def test_bad_weights_are_refused():
    linear = layer()
    linear.weight[0, 0] = torch.inf
    with pytest.raises(QuernelError, match=r"linear\.weight holds NaN or infinity"):
        W4A8Linear.from_linear(linear)
