"""Checks at the boundary: what passes comes back as a plain value, what does not is named with its value."""

import math

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel._validate import (
    check_bool,
    check_choice,
    check_finite,
    check_float,
    check_increasing,
    check_int,
    check_probability,
    check_type,
)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int32(3)])
def test_integers_pass(value):
    checked = check_int("n", value, low=3, high=3)
    assert checked == 3
    assert type(checked) is int


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (2, {"low": 3}, r"n must be an integer in \[3, inf\); got 2"),
        (4, {"high": 3}, r"n must be an integer in \(-inf, 3\]; got 4"),
        (2.0, {}, "n must be an integer; got 2.0"),
        (True, {}, "n must be an integer; got True"),
        ("2", {}, "n must be an integer; got '2'"),
        (None, {"low": 0, "high": 1}, r"n must be an integer in \[0, 1\]; got None"),
        (np.float64(2), {}, "n must be an integer"),
    ],
)
def test_other_integers_do_not(value, limits, message):
    with pytest.raises(QuernelError, match=message):
        check_int("n", value, **limits)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(1), 1])
def test_floats_pass(value):
    checked = check_float("x", value, low=0, high=1)
    assert checked == value
    assert type(checked) is float


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (math.nan, {}, "x must be a finite number; got nan"),
        (math.inf, {}, "x must be a finite number; got inf"),
        (True, {}, "x must be a finite number; got True"),
        ("1", {}, "x must be a finite number; got '1'"),
        (1 + 2j, {}, "x must be a finite number"),
        (0.0, {"low": 0.0, "open_low": True}, r"x must be a finite number in \(0.0, inf\); got 0.0"),
        (1.0, {"high": 1.0, "open_high": True}, r"x must be a finite number in \(-inf, 1.0\); got 1.0"),
        (-0.1, {"low": 0, "high": 1}, r"in \[0, 1\]; got -0.1"),
    ],
)
def test_other_floats_do_not(value, limits, message):
    with pytest.raises(QuernelError, match=message):
        check_float("x", value, **limits)


def test_open_ends_admit_the_inside():
    assert check_float("x", 1e-300, low=0.0, open_low=True) == 1e-300


def test_huge_integers_are_numbers_too_or_said_not_to_be():
    with pytest.raises(QuernelError, match="x must be a finite number"):
        check_float("x", 10**400)


def test_probability():
    assert check_probability("p", 0) == 0.0
    with pytest.raises(QuernelError, match=r"p must be a finite number in \[0.0, 1.0\]; got 1.1"):
        check_probability("p", 1.1)


def test_choice():
    assert check_choice("mode", "a", ("a", "b")) == "a"
    with pytest.raises(QuernelError, match="mode must be one of 'a', 'b'; got 'c'"):
        check_choice("mode", "c", ("a", "b"))
    with pytest.raises(QuernelError, match=r"mode must be one of 'a', 'b'; got \['a'\]"):
        check_choice("mode", ["a"], {"a": 1, "b": 2})


def test_type():
    assert check_type("x", 1, int) == 1
    with pytest.raises(QuernelError, match="x must be int or str; got float"):
        check_type("x", 1.0, (int, str))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_finite(make):
    check_finite("x", make([1.0, 2.0]))
    check_finite("x", make([1, 2]))
    check_finite("x", make([]))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(QuernelError, match="x holds NaN or infinity"):
            check_finite("x", make([1.0, bad]))
    with pytest.raises(QuernelError, match="x holds NaN or infinity"):
        check_finite("x", make([math.inf, 1.0, -math.inf]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_large_numbers_are_finite_though_their_sum_is_not(dtype):
    large = np.full((3, 2**19), np.finfo(dtype).max, dtype)
    for x in (large, torch.from_numpy(large)):
        check_finite("x", x)
    large[2, -1] = np.nan
    for x in (large, torch.from_numpy(large)):
        with pytest.raises(QuernelError, match="x holds NaN or infinity"):
            check_finite("x", x)


def test_integers_that_increase_pass():
    assert check_increasing("dims", [2, np.int64(5)], low=2, high=5) == (2, 5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([3, 3], r"dims must be integers that increase; got \[3, 3\]"),
        ([], "dims must be integers that increase"),
        (4, "dims must be integers that increase; got 4"),
        ("12", "dims must be integers that increase"),
        ([1, 3], r"dims must be an integer in \[2, 5\]; got 1"),
        ([3, 6], "got 6"),
        ([2.0], "got 2.0"),
    ],
)
def test_other_sequences_do_not(value, message):
    with pytest.raises(QuernelError, match=message):
        check_increasing("dims", value, low=2, high=5)


@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_kept(value: bool) -> None:
    assert check_bool("causal", value) is value


@pytest.mark.parametrize("value", ["no", 1, 0, None, [True]])
def test_what_is_only_true_or_false_to_python_is_refused(value: object) -> None:
    with pytest.raises(QuernelError, match=r"^causal must be True or False; got "):
        check_bool("causal", value)
