"""Straight-through functions: exact values, the gradient of the stand-in, leaves untouched."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional import (
    floor_through,
    heaviside_through,
    pass_through,
    power_of_two,
    round_through,
    sign_through,
)
from tests.reference import shiftaddvit as reference

HALF_STEP = 2**0.5 * (1 + 1e-6)  # the turning point itself is a rounded number


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    weights = torch.linspace(1, 2, x.numel()).view_as(x)
    (function(leaf) * weights).sum().backward()
    assert torch.equal(leaf.detach(), x), "the leaf was edited"
    assert leaf.grad is not None
    return leaf.grad / weights


X = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.5])


@pytest.mark.parametrize(
    ("function", "value", "stand_in"),
    [
        (round_through, torch.round, lambda x: x),
        (floor_through, torch.floor, lambda x: x),
        (sign_through, torch.sign, lambda x: x.clamp(-1, 1)),
        (heaviside_through, lambda x: (x > 0).float(), lambda x: x.clamp(0, 1)),
        (lambda x: heaviside_through(x, 0.4), lambda x: (x > 0.4).float(), lambda x: x.clamp(0, 1)),
        (
            lambda x: power_of_two(x, -2, 1),
            lambda x: x.new_tensor([-2, -1, -0.5, 0, 0, 0.25, 0.5, 1, 2, 2]),
            lambda x: x,
        ),
    ],
)
def test_values_are_exact_and_gradients_those_of_the_stand_in(
    function: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], stand_in: Callable[[Tensor], Tensor]
) -> None:
    assert torch.equal(function(X), value(X))
    assert torch.equal(_gradient(function, X), _gradient(stand_in, X))


def test_threshold_is_a_constant_and_broadcasts() -> None:
    x = torch.tensor([[0.1, 0.9], [0.6, -0.2]], requires_grad=True)
    threshold = torch.tensor([[0.5], [0.7]], requires_grad=True)
    codes = heaviside_through(x, threshold)
    codes.sum().backward()
    assert codes.tolist() == [[0, 1], [0, 0]]
    assert threshold.grad is None


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-30, 0),
    st.integers(0, 8),
    st.sampled_from(["log", "nearest"]),
)
def test_powers_are_those_of_the_definition(x: float, low: int, span: int, rounding: str) -> None:
    got = float(power_of_two(torch.tensor(x), low, low + span, rounding=rounding))
    wanted = reference.power_of_two(x, low, low + span, rounding)
    if got != wanted:  # only where x lies at the turning point, to rounding
        assert abs(x) / 2 ** math.floor(math.log2(abs(x))) == pytest.approx(1.5 if rounding == "nearest" else 2**0.5)


def test_powers_stay_within_half_a_step_and_are_kept_by_a_second_rounding() -> None:
    x = torch.cat([torch.linspace(2**-14, 1, 5001), -torch.logspace(-4, 0, 5001)])
    for rounding in ("log", "nearest"):
        powers = power_of_two(x, -14, 0, rounding=rounding)
        assert torch.equal(power_of_two(powers, -14, 0, rounding=rounding), powers)
        mantissa, _ = torch.frexp(powers.abs())
        assert bool((mantissa == 0.5).all()), "not a power of two"
    ratio = power_of_two(x, -14, 0) / x
    assert float(ratio.max()) <= HALF_STEP
    assert float(ratio.min()) >= 1 / HALF_STEP


def test_bits_are_those_of_the_number() -> None:
    powers = power_of_two(torch.tensor([0.25, -1.0, 0.0]), -14, 0).view(torch.int32).tolist()
    assert powers == [(127 - 2) << 23, (1 << 31 | 127 << 23) - 2**32, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_nan_passes(dtype: torch.dtype) -> None:
    powers = power_of_two(torch.tensor([0.3, float("nan"), float("inf")], dtype=dtype), -4, 0)
    assert powers.dtype == dtype
    assert powers[0] == 0.25 and powers[1].isnan() and powers[2] == 1


def test_they_compile_and_vectorise() -> None:
    def function(x: Tensor) -> Tensor:
        return power_of_two(x, -3, 0) + heaviside_through(x) + round_through(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(_gradient(compiled, X), _gradient(function, X))
    assert torch.equal(torch.vmap(function)(X.view(2, 5)), function(X).view(2, 5))


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match="rounding must be one of"):
        power_of_two(X, rounding="up")
    with pytest.raises(QuernelError, match="low must be an integer"):
        power_of_two(X, -200)
    with pytest.raises(QuernelError, match="high must be an integer"):
        power_of_two(X, 0, -1)
    with pytest.raises(QuernelError, match="x and value must have one shape"):
        pass_through(X, X[:2])
