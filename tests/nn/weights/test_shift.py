"""``ShiftWeight``: bytes, rows, casts, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.weights import ShiftWeight

# The promise for 5-bit codes of a large matrix, factors included.
SHARE = 0.16


def test_bytes_of_a_large_matrix() -> None:
    weight = ShiftWeight((512, 1024), 5)
    assert weight.nbytes == 512 * 1024 * 5 // 8 + 4 * 512
    assert weight.nbytes <= SHARE * 4 * 512 * 1024


def test_codes_and_factor_come_back() -> None:
    codes = torch.tensor([[0, 1, 15, 17, 31]], dtype=torch.uint8)
    weight = ShiftWeight.from_codes(codes, torch.tensor([2.0]))
    assert torch.equal(weight.unpack(), codes)
    assert weight.dense().tolist() == [[0.0, 2 * 2**-14, 2.0, -2 * 2**-14, -2.0]]
    assert torch.equal(weight.rows(torch.tensor([[0], [0]])), weight.dense().expand(2, 1, 5))


def test_casting_keeps_the_factor_exact() -> None:
    weight = ShiftWeight.from_dense(torch.randn(6, 40)).bfloat16()
    assert weight.scale.dtype == torch.float32 and weight.codes.dtype == torch.uint8


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match="shape must be"):
        ShiftWeight((4,))
    with pytest.raises(QuernelError, match=r"bits must be an integer in \[5, 6\]; got 4"):
        ShiftWeight((4, 4), 4)
    with pytest.raises(QuernelError, match="weight holds NaN"):
        ShiftWeight.from_dense(torch.full((2, 2), float("nan")))
    with pytest.raises(QuernelError, match="scale must have shape"):
        ShiftWeight.from_codes(torch.zeros(2, 2, dtype=torch.uint8), torch.ones(3))
    with pytest.raises(QuernelError, match="x must have shape"):
        ShiftWeight.from_dense(torch.randn(2, 40)).matmul(torch.zeros(1, 41))
