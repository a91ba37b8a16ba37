"""The product over 5- and 6-bit codes, vector and portable, against NumPy; expansion to float32 and bfloat16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from quernel import _intrinsics
from quernel.nn._shift_kernels import BLOCK, ROWS, expand, make_dot
from quernel.nn.functional.shift import decode_codes, pack_codes

VECTOR = _intrinsics.target_features() >= _intrinsics.VECTOR_FEATURES
PATHS = [
    pytest.param(True, id="portable"),
    pytest.param(False, id="vector", marks=pytest.mark.skipif(not VECTOR, reason="no AVX-512 + VNNI here")),
]
# Products are exact, float32 sums of some hundred of them are not.
RTOL = 1e-5


def _codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


@pytest.mark.parametrize("plain", PATHS)
@pytest.mark.parametrize("bits", [5, 6])
def test_both_paths_multiply_four_rows(bits: int, plain: bool) -> None:
    dot = make_dot(bits, plain)

    @njit
    def call(codes: Any, x: Any, out: Any) -> None:
        dot(codes.ctypes.data, codes.shape[1] * codes.shape[2], x.ctypes.data, codes.shape[1], out.ctypes.data)

    codes = _codes(ROWS, 3 * BLOCK, bits)
    parts = torch.randn(3, 2, BLOCK).bfloat16()
    x = parts.float().sum(1).flatten().double()
    out = np.full(ROWS, np.nan, np.float32)
    call(pack_codes(codes, bits).numpy(), parts.view(torch.int16).numpy().view(np.uint16), out)
    wanted = decode_codes(codes, bits).double() @ x
    np.testing.assert_allclose(out, wanted.numpy(), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("columns", [1, 64, 100])
def test_expansion_gives_the_bits_of_each_power(bits: int, columns: int) -> None:
    codes = _codes(7, columns, bits)
    packed, powers = pack_codes(codes, bits).numpy(), decode_codes(codes, bits)
    words, halves = np.empty((3, columns), np.uint32), np.empty((3, columns), np.uint16)
    expand(packed, bits, words, 2, 5)
    expand(packed, bits, halves, 2, 5)
    wanted = powers[2:5].numpy()
    # A negative zero is as good as zero.
    np.testing.assert_array_equal(words.view(np.float32), wanted)
    np.testing.assert_array_equal((halves.astype(np.uint32) << 16).view(np.float32), wanted)
