"""Prefix lengths and prefixes of unit length."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import nested_dims, unit_prefix


def test_lengths_double_and_end_with_the_whole():
    assert nested_dims(2048) == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert nested_dims(20, smallest=3) == (3, 6, 12, 20)
    assert nested_dims(8) == (8,) and nested_dims(1) == (1,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_prefix_has_unit_length_and_keeps_its_dtype(dtype):
    z = (100 * torch.randn(2, 3, 10)).to(dtype)
    cut = unit_prefix(z, 4)
    assert cut.dtype == dtype and cut.shape == (2, 3, 4)
    # Rounding of the entries: 8 bits of mantissa at the least.
    torch.testing.assert_close(cut.double().norm(dim=-1), torch.ones(2, 3, dtype=torch.float64), rtol=0.01, atol=0)
    assert torch.nn.functional.cosine_similarity(cut.double(), z[..., :4].double(), dim=-1).min() > 0.999


def test_zeros_stay_zeros():
    assert unit_prefix(torch.tensor([[0.0, 0.0, 5.0]]), 2).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nested_dims(0), r"d must be an integer in \[1, inf\); got 0"),
        (lambda: nested_dims(8, 0), "smallest must be an integer"),
        (lambda: unit_prefix(torch.ones(2, 3), 4), r"dim must be an integer in \[1, 3\]; got 4"),
        (lambda: unit_prefix(torch.ones(2, 3).long()), "z must be floating point"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
