"""Power-of-two codes: rounding against the definition, packing, the product over codes against the dense one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.nn.functional import shift_codes, shift_linear
from quernel.nn.functional.shift import (
    decode_codes,
    exponent_range,
    pack_codes,
    packed_codes_shape,
    unpack_codes,
)
from tests.reference import shiftaddvit as reference

# Two bfloat16 numbers hold 16 bits of an activation; sums of some hundred products in float32.
RTOL, ATOL = 1e-4, 1e-4
# The least-squares factor is stored in float32.
FACTOR = 1e-6


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def _codes(rows: int, columns: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("bits", "low"), [(3, -2), (4, -6), (5, -14), (6, -30)])
def test_range_leaves_a_code_for_zero(bits: int, low: int) -> None:
    assert exponent_range(bits) == (low, 0)


@pytest.mark.parametrize("rounding", ["log", "nearest"])
@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_codes_are_those_of_the_definition(bits: int, rounding: str) -> None:
    weight = _weight(5, 33)
    weight[1], weight[2, 4] = 0, 0
    powers, scale = reference.shift_codes(weight.numpy(), bits, rounding)
    codes = shift_codes(weight, bits, rounding=rounding)
    np.testing.assert_array_equal(decode_codes(codes.packed(bits), bits).numpy(), powers)
    np.testing.assert_allclose(codes.scale.numpy(), scale, rtol=FACTOR)
    assert torch.equal(codes.dense(), decode_codes(codes.packed(bits), bits) * codes.scale[:, None])


@pytest.mark.parametrize("channel_scale", [True, False])
@pytest.mark.parametrize("rounding", ["log", "nearest"])
def test_rounding_again_changes_nothing(channel_scale: bool, rounding: str) -> None:
    once = shift_codes(_weight(7, 200), 4, channel_scale=channel_scale, rounding=rounding).dense()
    assert torch.equal(shift_codes(once, 4, channel_scale=channel_scale, rounding=rounding).dense(), once)


def test_factor_is_least_squares() -> None:
    weight = _weight(3, 64)
    codes = shift_codes(weight, 4)
    for factor in (0.99, 1.01):
        worse = codes._replace(scale=codes.scale * factor).dense()
        assert bool(((weight - codes.dense()).square().sum(1) < (weight - worse).square().sum(1)).all())


def test_without_a_factor_large_weights_are_clipped() -> None:
    codes = shift_codes(torch.tensor([[3.0, -0.4, 1e-9]]), 5, channel_scale=False)
    assert codes.dense().tolist() == [[1.0, -0.5, 2**-14]]


@given(st.integers(1, 6), st.integers(1, 200), st.sampled_from([5, 6]), st.integers(0, 9))
def test_packing_loses_nothing(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert tuple(packed.shape) == packed_codes_shape(rows, columns, bits)
    assert torch.equal(unpack_codes(packed, bits, columns)[:rows], codes)


@pytest.mark.parametrize("bits", [5, 6])
def test_decoded_floats_have_the_bits_of_sign_and_exponent(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    words = decode_codes(torch.arange(2**bits, dtype=torch.uint8), bits).view(torch.int32).numpy().astype(np.uint32)
    for code, word in enumerate(words.tolist()):
        sign, m = divmod(code, 2 ** (bits - 1))
        assert word == ((sign << 31 | (127 + m - top) << 23) if m else 0)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (5, 64), (13, 70), (130, 257)])
def test_product_is_the_dense_one(out: int, columns: int, bits: int, rows: int, poisoned_memory: None) -> None:
    codes, scale, bias = _codes(out, columns, bits), torch.rand(out) + 0.5, torch.randn(out)
    x = torch.randn(rows, columns)
    wanted = x.double() @ (decode_codes(codes, bits) * scale[:, None]).double().T + bias
    got = shift_linear(x, pack_codes(codes, bits), scale, bias, bits=bits)
    torch.testing.assert_close(got, wanted.float(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, rows: int) -> None:
    codes, scale = _codes(6, 100, 5), torch.ones(6)
    x = torch.randn(2, rows, 100)[0].to(dtype)
    got = shift_linear(x, pack_codes(codes, 5), scale)
    assert got.dtype == dtype
    coarse = dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if coarse else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got.double(), x.double() @ decode_codes(codes, 5).double().T, **tolerance)


def test_shapes_strides_and_nothing() -> None:
    codes, scale = _codes(6, 100, 5), torch.rand(6)
    packed = pack_codes(codes, 5)
    x = torch.randn(2, 3, 200)[..., ::2]
    torch.testing.assert_close(shift_linear(x, packed, scale), shift_linear(x.contiguous(), packed, scale))
    assert shift_linear(x[:0], packed, scale).shape == (0, 3, 6)
    assert shift_linear(x[0, 0], packed, scale).shape == (6,)


def test_infinity_and_nan_are_not_hidden() -> None:
    packed, scale = pack_codes(torch.full((1, 2), 15, dtype=torch.uint8), 5), torch.ones(1)
    assert shift_linear(torch.tensor([[float("inf"), 1.0]]), packed, scale).item() == float("inf")
    assert bool(shift_linear(torch.tensor([[float("nan"), 1.0]]), packed, scale).isnan())


def test_threads_give_the_same_numbers() -> None:
    packed, scale = pack_codes(_codes(2100, 512, 5), 5), torch.rand(2100)
    for rows in (1, 8):
        x = torch.randn(rows, 512)
        with threads(1):
            wanted = shift_linear(x, packed, scale)
        with threads(2):
            assert torch.equal(shift_linear(x, packed, scale), wanted)


def test_gradients_reach_input_and_bias() -> None:
    codes, scale = _codes(4, 20, 5), torch.rand(4).double()
    packed = pack_codes(codes, 5)
    x, bias = torch.randn(3, 20).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: shift_linear(x, packed, scale, b), (x, bias))


def test_operator_is_well_formed_and_compiles() -> None:
    packed, scale, x = pack_codes(_codes(6, 70, 6), 6), torch.rand(6), torch.randn(2, 70)
    torch.library.opcheck(torch.ops.quernel.shift_linear.default, (x, packed, scale, scale, 6))
    compiled = torch.compile(lambda x: shift_linear(x, packed, scale, bits=6), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), shift_linear(x, packed, scale, bits=6))


@pytest.mark.slow
def test_portable_path_agrees() -> None:
    code = (
        "import torch; from quernel.nn.functional.shift import shift_linear, pack_codes\n"
        "g = torch.Generator().manual_seed(0)\n"
        "for bits in (5, 6):\n"
        "    c = pack_codes(torch.randint(0, 2**bits, (9, 130), generator=g).to(torch.uint8), bits)\n"
        "    x = torch.randn(8, 130, generator=g)\n"
        "    print(*[float(shift_linear(x[:n], c, torch.ones(9), bits=bits).double().square().sum()) for n in (1, 8)])"
    )

    def run(portable: str) -> list[float]:
        environment = os.environ | {"QUERNEL_PORTABLE": portable}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    assert run("1") == pytest.approx(run("0"), rel=RTOL)


def test_nearest_is_nearest_where_no_factor_hides_it() -> None:
    weight = _weight(8, 256) * 4
    errors = [
        (shift_codes(weight, 5, channel_scale=False, rounding=rounding).dense() - weight).abs()
        for rounding in ("nearest", "log")
    ]
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < float(errors[1].sum())


def test_bad_input_is_named() -> None:
    codes = _codes(6, 70, 5)
    packed, scale, x = pack_codes(codes, 5), torch.ones(6), torch.zeros(2, 70)
    for bits in (2, 7):
        with pytest.raises(QuernelError, match=rf"bits must be an integer in \[3, 6\]; got {bits}"):
            shift_codes(torch.ones(2, 2), bits)
    with pytest.raises(QuernelError, match="bits must be an integer"):
        shift_linear(x, packed, scale, bits=4)
    with pytest.raises(QuernelError, match="codes must be uint8 of shape"):
        shift_linear(x, packed, torch.ones(9))
    with pytest.raises(QuernelError, match="codes must be uint8 of shape"):
        shift_linear(torch.zeros(2, 130), packed, scale)
    with pytest.raises(QuernelError, match="bias must be"):
        shift_linear(x, packed, scale, torch.ones(5))
    with pytest.raises(QuernelError, match="x must be floating"):
        shift_linear(x.long(), packed, scale)
    with pytest.raises(QuernelError, match=r"codes must lie in 0\.\.31"):
        pack_codes(codes + 32, 5)
    with pytest.raises(QuernelError, match="codes must be uint8"):
        pack_codes(codes.long(), 5)
