"""``ShiftLinear``: both forms against the definition, straight-through gradients, packing without loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import PackedShiftLinear, ShiftLinear
from quernel.nn.functional import shift_codes
from quernel.nn.functional.shift import decode_codes
from quernel.nn.weights import Int4TableWeight, ShiftWeight

# A packed product sums in another order, with 16 bits an activation.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def _linear(in_features: int = 40, out_features: int = 6) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[2, 3] = 0
    return linear


@pytest.mark.parametrize("channel_scale", [True, False])
@pytest.mark.parametrize("form", ["q", "ps"])
@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_forward_multiplies_by_the_rounded_weight(bits: int, form: Any, channel_scale: bool) -> None:
    linear, x = _linear(), torch.randn(3, 40)
    layer = ShiftLinear.from_linear(linear, bits, form, channel_scale)
    wanted = shift_codes(linear.weight, bits, channel_scale=channel_scale).dense()
    torch.testing.assert_close(layer.shifted_weight(), wanted)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, linear.bias))


@pytest.mark.parametrize("form", ["q", "ps"])
@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_packing_keeps_every_weight(bits: int, form: Any) -> None:
    layer = ShiftLinear.from_linear(_linear(), bits, form)
    packed = layer.pack()
    assert isinstance(packed, PackedShiftLinear) and packed.bias is layer.bias
    assert type(packed.weight) is (ShiftWeight if bits > 4 else Int4TableWeight)
    torch.testing.assert_close(packed.weight.dense(), layer.shifted_weight().detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_packed_products_are_those_of_the_decoded_weight(bits: int) -> None:
    packed = ShiftLinear.from_linear(_linear(), bits).pack()
    if bits > 4:
        x = torch.randn(7, 40)
        wanted = nn.functional.linear(x, packed.weight.dense(), packed.bias)
        torch.testing.assert_close(packed(x), wanted, **CLOSE)
        return
    # Inputs that are their own int8 codes: products are exact integers, scaled once.
    x = torch.randint(-127, 128, (7, 40)).float()
    x[:, 0] = 127
    powers = decode_codes(packed.weight.unpack(), 4).double() * 64
    wanted = (x.double() @ powers.T) * packed.weight.scale + packed.bias
    torch.testing.assert_close(packed(x), wanted.float(), rtol=1e-6, atol=1e-6)


def test_form_q_hands_gradients_through() -> None:
    layer, x = ShiftLinear(8, 5), torch.randn(3, 8)
    weight = layer.shifted_weight()
    (wanted,) = torch.autograd.grad(nn.functional.linear(x, weight, layer.bias).square().sum(), weight)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, wanted)  # type: ignore[arg-type]


def test_form_ps_has_the_gradients_of_exponent_and_sign() -> None:
    layer, x = ShiftLinear(8, 5, form="ps", channel_scale=False), torch.randn(3, 8)
    with torch.no_grad():
        layer.shift.add_(0.3 * torch.randn(5, 8))
        layer.shift[0, 0], layer.sign[1, 1] = 3.0, 0.2
    codes = layer.codes()
    assert codes.exponents[0, 0] == 0 and codes.signs[1, 1] == 0
    weight = codes.dense().requires_grad_()
    (g,) = torch.autograd.grad((x @ weight.T).square().sum(), weight)
    (layer(x) - layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.sign.grad, g)
    torch.testing.assert_close(layer.shift.grad, g * weight.detach() * math.log(2))


def test_training_changes_no_parameter_before_the_step() -> None:
    for form in ("q", "ps"):
        layer = ShiftLinear(8, 5, form=form)  # type: ignore[arg-type]
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        layer(torch.randn(2, 8)).sum().backward()
        assert all(torch.equal(before[name], p) for name, p in layer.named_parameters())


def test_it_learns_powers_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([[0.5, -0.25, 1.0, 0.125]])
    x = torch.randn(256, 4, generator=generator)
    for form, rate in (("q", 0.02), ("ps", 0.05)):
        torch.manual_seed(0)
        layer = ShiftLinear(4, 1, bias=False, form=form, channel_scale=False)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        losses = []
        for _ in range(300):
            loss = (layer(x) - x @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert min(losses) < 0.05 * losses[0]


def test_fixed_point_inputs_are_floored() -> None:
    layer = ShiftLinear(2, 1, bias=True, channel_scale=False, act_bits=8)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.5]]))
        layer.bias.fill_(0.09)  # type: ignore[union-attr]
    assert layer(torch.tensor([[0.99, -0.01]])).item() == 15 / 16 - 1 / 32 + 1 / 16
    assert layer(torch.tensor([[100.0, 0.0]])).item() == 7 + 1 / 16
    x = torch.tensor([[0.3, 0.7]], requires_grad=True)
    layer(x).backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 0.5]]
    with pytest.raises(QuernelError, match="act_bits must be None"):
        layer.pack()


def test_a_trained_layer_is_copied_and_nothing_drawn() -> None:
    linear = nn.Linear(6, 4).requires_grad_(False).eval()
    before = torch.get_rng_state()
    layer = ShiftLinear.from_linear(linear, form="ps")
    assert torch.equal(torch.get_rng_state(), before)
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    layer.bias.data.zero_()  # type: ignore[union-attr]
    assert bool(linear.bias.any())


@pytest.mark.parametrize("form", ["q", "ps"])
def test_round_trip_through_config_and_state(form: Any) -> None:
    layer = ShiftLinear(7, 5, False, 4, form, rounding="nearest")
    twin = ShiftLinear.from_config(layer.config())
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7)
    assert torch.equal(twin(x), layer(x))


def test_bad_input_is_named() -> None:
    for bits in (2, 7):
        with pytest.raises(QuernelError, match=rf"bits must be an integer in \[3, 6\]; got {bits}"):
            ShiftLinear(4, 4, bits=bits)
    with pytest.raises(QuernelError, match="form must be one of"):
        ShiftLinear(4, 4, form="sp")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="act_bits must be even"):
        ShiftLinear(4, 4, act_bits=9)
    with pytest.raises(QuernelError, match="linear must be Linear"):
        ShiftLinear.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(QuernelError, match=r"linear\.weight holds NaN"):
        ShiftLinear.from_linear(linear)
