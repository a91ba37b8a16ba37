"""``PackedShiftLinear``: bytes, the shared bias, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import PackedShiftLinear
from quernel.nn.linear.packed_shift import packed_bytes
from quernel.nn.weights import Int8Weight

# What the formats promise for large layers, factors included, as shares of float32.
SHARES = {3: 0.13, 4: 0.13, 5: 0.16, 6: 0.19}
# Relative error of Gaussian weights at 4 bits, and int8 activations beside it.
ERROR = 0.25


@pytest.mark.parametrize("bits", SHARES)
def test_bytes(bits: int) -> None:
    linear = nn.Linear(1024, 512, bias=False)
    packed = PackedShiftLinear.from_linear(linear, bits)
    assert packed.weight.nbytes <= SHARES[bits] * linear.weight.nbytes
    for shape in ((512, 1024), (7, 130), (1, 1)):
        weight = PackedShiftLinear.from_linear(nn.Linear(shape[1], shape[0]), bits).weight
        assert weight.nbytes == packed_bytes(shape, bits)


@pytest.mark.parametrize("bits", [4, 5])
def test_outputs_are_near_those_of_the_layer(bits: int) -> None:
    linear, x = nn.Linear(256, 128), torch.randn(9, 256)
    packed = PackedShiftLinear.from_linear(linear, bits)
    assert packed.bias is linear.bias
    assert float(((packed(x) - linear(x)).norm() / linear(x).norm()).detach()) < ERROR
    for rows in (x[0], x[:0], x.view(3, 3, 256)):
        assert packed(rows).shape == linear(rows).shape


def test_nearest_rounding_is_another_code() -> None:
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data[0, :3] = torch.tensor([1.0, 0.71 * 0.5, 0.73])
    codes = [PackedShiftLinear.from_linear(linear, rounding=r).weight.unpack()[0, 2] & 7 for r in ("log", "nearest")]
    assert math.prod(map(int, codes)) == 7 * 6  # 0.73 goes to 1 in the logarithm and to 1/2 in value


def test_gradients_reach_input_and_bias() -> None:
    for bits in (4, 5):
        packed, x = PackedShiftLinear.from_linear(nn.Linear(20, 6), bits), torch.randn(3, 20, requires_grad=True)
        packed(x).sum().backward()
        torch.testing.assert_close(x.grad, packed.weight.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)
        assert packed.bias is not None and packed.bias.grad is not None and packed.bias.grad.tolist() == [3.0] * 6


def test_bad_input_is_named() -> None:
    for bits in (2, 7):
        with pytest.raises(QuernelError, match=rf"bits must be an integer in \[3, 6\]; got {bits}"):
            PackedShiftLinear.from_linear(nn.Linear(4, 4), bits)
    with pytest.raises(QuernelError, match="weight must be Int4TableWeight or ShiftWeight"):
        PackedShiftLinear(Int8Weight((4, 4)))  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match=r"x must have shape \(\.\.\., 70\)"):
        PackedShiftLinear.from_linear(nn.Linear(70, 4), 4)(torch.zeros(1, 71))
