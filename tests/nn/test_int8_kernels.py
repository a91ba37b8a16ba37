"""The passes around the int8 product: exact codes, bfloat16 rounding, activations near the true ones, no slow calls."""

import re

import numpy as np
import pytest
import torch
from numba import cfunc

from quernel.nn import _int8_kernels as kernels
from quernel.nn._int8_kernels import ACTIVATIONS, dequantiser, quantiser
from tests.reference import gelu
from tests.reference import nn as oracle

# Both polynomials are minimax at 2e-7 to 6e-7; evaluating the power in float32 adds a few units of 6e-8.
ACTIVATION_ERROR = 1e-6
# Relative, for -4.5 < y < 0: a quarter of the 2^-9 that rounding to bfloat16 costs anyway.
TAIL_ERROR = 5e-4
F32_MAX = float(np.finfo(np.float32).max)
rng = np.random.default_rng(0)


def quantise(x, inverse=None, levels=127, alpha=None):
    x = torch.as_tensor(x)
    codes, steps = torch.full(x.shape, 99, dtype=torch.int8), torch.full((len(x),), 99.0)
    factors = torch.as_tensor([] if inverse is None else inverse)
    kernel = quantiser(x.dtype == torch.bfloat16, inverse is not None, alpha is not None)
    addresses = [t.data_ptr() for t in (x, factors, codes, steps)]
    bits = np.float64(0 if alpha is None else alpha).view(np.int64)
    kernel.ctypes(*addresses[:2], levels, int(bits), *addresses[2:], *x.shape)
    return codes.numpy(), steps.numpy()


def dequantise(sums, steps, scale, bias, activation=None, bf16=False):
    arrays = [np.ascontiguousarray(sums, np.int32)]
    arrays += [np.ascontiguousarray(a, np.float32) for a in (steps, scale, bias)]
    out = torch.empty(arrays[0].shape, dtype=torch.bfloat16 if bf16 else torch.float32)
    kernel = dequantiser(bf16, ACTIVATIONS[activation])
    kernel.ctypes(*[a.ctypes.data for a in arrays], out.data_ptr(), *out.shape)
    return out


def activate(y, activation, bf16=False):
    out = dequantise(np.zeros((1, len(y))), [1], np.ones(len(y)), y, activation, bf16)[0]
    return out if bf16 else out.numpy()


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 67, 256])
@pytest.mark.parametrize(("smooth", "alpha"), [(False, None), (True, None), (True, 0.15), (True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [7, 127])
def test_codes_are_those_of_the_definition(k, smooth, alpha, dtype, levels):
    x = torch.from_numpy(rng.standard_t(2, (5, k)).astype(np.float32)).to(dtype)
    inverse = rng.uniform(0.1, 3, k).astype(np.float32) if smooth else None
    codes, steps = quantise(x, inverse, levels, alpha)
    for row, got, step in zip(x.float().numpy(), codes, steps, strict=True):
        wanted, wanted_step = oracle.quantise_row(row, inverse, levels, alpha)
        assert got.tolist() == wanted
        assert step == wanted_step


def test_halves_round_to_even():
    codes, steps = quantise(np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert steps.tolist() == [1]


def test_tight_rows_use_the_whole_range_and_no_more():
    x = rng.standard_normal((500, 33)) * 10 ** rng.uniform(-30, 30, (500, 1))
    codes, _ = quantise(x.astype(np.float32))
    assert np.abs(codes.astype(int)).max(axis=1).tolist() == [127] * 500


def test_bound_rows_clip_where_calibration_saw_less():
    codes, steps = quantise(np.float32([[100, -100, 1]]), np.float32([1, 1, 1]), alpha=0.5)
    assert codes.tolist() == [[127, -127, 13]]
    assert steps[0] == pytest.approx(10 / 127)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("alpha", [None, 0.15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_gets_a_nan_step_alone(bad, alpha, dtype):
    x = torch.ones(4, 37, dtype=dtype)
    x[2, 35] = bad
    _, steps = quantise(x, np.ones(37, np.float32), alpha=alpha)
    assert np.isnan(steps).tolist() == [False, False, True, False]


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_zero_and_vanishing_rows_get_step_zero(alpha):
    x = np.zeros((4, 20), np.float32)
    x[1, 3], x[2, 3], x[3, 3] = 1e-40, 9e-37, 2e-36
    codes, steps = quantise(x, np.ones(20, np.float32), alpha=alpha)
    assert steps[:3].tolist() == [0, 0, 0]
    assert not codes[:3].any()
    assert steps[3] > 0
    assert np.isfinite(steps[3])


def test_the_largest_floats_do_not_overflow():
    codes, steps = quantise(np.float32([[F32_MAX, -F32_MAX, F32_MAX / 2]]))
    assert codes.tolist() == [[127, -127, 64]]
    assert np.isfinite(steps).all()


def test_bfloat16_comes_out_rounded_as_torch_rounds():
    y = rng.standard_normal(5000) * 10 ** rng.uniform(-38, 38, 5000)
    ties = (np.arange(1 << 12, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)
    y = np.concatenate([y, ties, [0.0, 1e-45, np.inf, -np.inf]]).astype(np.float32)
    got = activate(y, None, bf16=True)
    assert torch.equal(got.view(torch.int16), torch.from_numpy(y).bfloat16().view(torch.int16))
    assert activate([np.nan], None, bf16=True).isnan().all()


def test_scales_and_bias_are_applied():
    sums = rng.integers(-(2**24), 2**24, (3, 21)).astype(np.int32)
    row, column, bias = (rng.uniform(1e-4, 1e-2, size).astype(np.float32) for size in (3, 21, 21))
    out = dequantise(sums, row, column, bias)
    np.testing.assert_allclose(out, sums * row[:, None].astype(float) * column + bias, rtol=3e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_near_the_true_ones(activation):
    y = np.concatenate([np.linspace(-20, 20, 400001), rng.standard_normal(1000) * 1e4, [0.0, 1e20, -1e20]])
    y = y.astype(np.float32)
    wanted = oracle.ACTIVATIONS[activation](y.astype(float))
    error = np.abs(activate(y, activation) - wanted)
    assert (error / np.maximum(1, np.abs(y))).max() < ACTIVATION_ERROR
    tail = (y > -4.5) & (y < 0) & (wanted != 0)
    assert (error[tail] / np.abs(wanted[tail])).max(initial=0) < TAIL_ERROR


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bf16", [False, True])
def test_nan_passes_through_every_activation(activation, bf16):
    y = np.full(40, 0.5, np.float32)
    y[[0, 17, 39]] = np.nan
    got = np.isnan(np.asarray(torch.as_tensor(activate(y, activation, bf16)).float()))
    assert got.nonzero()[0].tolist() == [0, 17, 39]


def test_gelu_in_bfloat16_is_torchs_but_for_rare_neighbours():
    y = torch.linspace(-8, 8, 100001)
    got, wanted = activate(y.numpy(), "gelu", bf16=True), torch.nn.functional.gelu(y).bfloat16()
    big = y > -4
    assert (got.view(torch.int16)[big] - wanted.view(torch.int16)[big]).abs().max() <= 1
    assert (got == wanted)[big].float().mean() > 0.99


CASES = [quantiser(b, s, False) for b in (False, True) for s in (False, True)]
CASES += [dequantiser(b, a) for b in (False, True) for a in ACTIVATIONS.values()]


@pytest.mark.parametrize("kernel", CASES, ids=range(len(CASES)))
def test_loops_are_vectorised_and_call_nothing(kernel):
    # Compiled afresh: code that comes from the disk cache cannot be inspected.
    terms = {"fastmath": False} if kernel in CASES[:4] else {"fastmath": kernels.FUSED, "error_model": "numpy"}
    code = cfunc(kernel._sig, **terms)(kernel.__wrapped__).inspect_llvm()
    assert re.search(r"<(4|8|16) x float>", code), "no vector of floats"
    called = set(re.findall(r"call[^@\n]*(?:float|double)[^@\n]*@([\w.]+)", code))
    slow = {n for n in called if not n.startswith("llvm.") or re.search("exp|pow|tanh|rint|round", n)}
    assert not slow, f"a loop calls {slow}"


@pytest.mark.parametrize(
    ("tail", "end", "power", "coefficients"),
    [(gelu.normal_tail, kernels.GELU_END, 8, kernels.GELU), (gelu.tanh_tail, kernels.TANH_END, 16, kernels.TANH)],
    ids=["gelu", "gelu_tanh"],
)
def test_coefficients_are_those_of_the_fit(tail, end, power, coefficients):
    end = float(end)
    # Fewer steps than the pinned fit took, and coefficients rounded to float32 (6e-8 each, times the power).
    best = gelu.worst(gelu.fit(tail, round(end, 1), len(coefficients) - 1, power), tail, round(end, 1), power)
    assert gelu.worst([float(c) for c in coefficients], tail, round(end, 1), power) < 1.2 * best + power * 1e-7
