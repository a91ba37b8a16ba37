"""The mask of neighborhood attention against loops over the definition, and what it becomes at its limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import neighborhood_mask
from tests.reference import neighborhood_attention as reference


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_an_axis_is_its_definition(length: int) -> None:
    for d, causal in itertools.product((1, 2, 3), (False, True)):
        for w in range(1, length // d + 1):
            for s in range(1, w + 1):
                numbers = ((length,), (w,), (s,), (d,), (causal,))
                assert torch.equal(neighborhood_mask(*numbers), reference.mask(*numbers)), numbers


@pytest.mark.parametrize(
    "numbers",
    [
        ((4, 5), (2, 3), (1, 1), (2, 1), (False, False)),
        ((6, 4), (3, 2), (2, 1), (1, 2), (False, True)),
        ((3, 4, 3), (2, 3, 1), (2, 1, 1), (1, 1, 3), (True, False, False)),
    ],
    ids=str,
)
def test_a_grid_is_the_product_of_its_axes(numbers: Any) -> None:
    mask = neighborhood_mask(*numbers)
    assert torch.equal(mask, reference.mask(*numbers))
    if not any(numbers[4]):
        assert (mask.sum(1) == math.prod(numbers[1])).all()


def test_a_corner_sees_the_block_at_the_corner() -> None:
    assert neighborhood_mask((5, 5), 3)[0].view(5, 5).nonzero().tolist() == [[i, j] for i in range(3) for j in range(3)]


def test_an_even_window_has_one_more_before() -> None:
    assert neighborhood_mask((9,), 4)[4].nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_limits() -> None:
    ones = torch.ones(8, 8, dtype=torch.bool)
    assert torch.equal(neighborhood_mask((8,), 1), ones.diag().diag())
    assert neighborhood_mask((8,), 8).all()
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 2).bool()
    assert torch.equal(neighborhood_mask((8,), 4, 4), blocks)
    # Not a whole number of blocks: the window of the last one is the last w keys.
    assert neighborhood_mask((10,), 4, 4)[9].nonzero().flatten().tolist() == [6, 7, 8, 9]
    for stride in (1, 3, 8):
        assert torch.equal(neighborhood_mask((8,), 8, stride, is_causal=True), ones.tril())
    # A causal window may be longer than the axis.
    assert torch.equal(neighborhood_mask((8,), 20, is_causal=True), ones.tril())


def test_causal_groups_end_with_the_query() -> None:
    # Leaders are the last of a group of three: windows begin at 2 - 3, 5 - 3 and 7 - 3, past the end.
    wanted = [(0, 0), (0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (4, 6), (4, 7)]
    mask = neighborhood_mask((8,), 4, 3, is_causal=True)
    assert [tuple(row.nonzero().flatten()[[0, -1]].tolist()) for row in mask] == wanted


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (((5, 5), (3, 6)), "kernel_size 6 exceeds the 5 tokens of axis 1"),
        (((5, 8), 3, 1, (1, 3)), "kernel_size 3 times dilation 3 exceeds the 8 tokens of axis 1"),
        (((5,), 3, 4), "got 4 > 3 on axis 0"),
        (((5, 5), (3, 0)), r"kernel_size of axis 1 must be an integer in \[1, inf\); got 0"),
        (((5,), 0), "kernel_size must be an integer"),
        (((5,), 3, 0), "stride"),
        (((5,), 3, 1, 0), "dilation"),
        (((5,), 2.0), "kernel_size"),
        (((5, 5), (3, 3, 3)), "kernel_size must be an integer or 2 of them"),
        (((5, 5), 3, 1, 1, (True,)), "is_causal must be a bool or 2 of them"),
        (((5,), 3, 1, 1, 1), "is_causal"),
    ],
)
def test_what_does_not_fit_is_refused(numbers: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        neighborhood_mask(*numbers)
