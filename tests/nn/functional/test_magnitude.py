"""``magnitude_mask``: exact counts, the smallest first, blocks as wholes."""

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import magnitude_mask


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 3, 1, 1), (6, 2, 3, 3)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_the_count_is_exact_and_the_smallest_go(shape, sparsity):
    weight = torch.randn(shape)
    mask = magnitude_mask(weight, sparsity)
    assert mask.shape == weight.shape
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    if mask.any() and not mask.all():
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_ties_go_in_order():
    assert magnitude_mask(torch.ones(2, 4), 0.5).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_blocks_stay_or_go_together(rows, block):
    weight = torch.randn(rows, 10)
    mask = magnitude_mask(weight, 0.6, block=block)
    whole = rows // block * block
    grouped = mask[:whole].view(-1, block, 10)
    assert torch.equal(grouped.any(1), grouped.all(1))
    assert 0 <= round(0.6 * weight.numel()) - int((~mask).sum()) < block
    score = weight[:whole].view(-1, block, 10).abs().mean(1)
    kept = grouped.any(1)
    if kept.any() and not kept.all():
        assert score[kept].min() >= score[~kept].max()


def test_masks_of_rising_sparsity_lie_within_each_other():
    weight = torch.randn(20, 20)
    before = torch.ones_like(weight, dtype=torch.bool)
    for sparsity in (0.2, 0.5, 0.7, 0.9):
        mask = magnitude_mask(weight * before, sparsity)
        assert not (mask & ~before).any()
        before = mask


def test_refusals():
    with pytest.raises(QuernelError, match="sparsity"):
        magnitude_mask(torch.ones(2, 2), 1.5)
    with pytest.raises(QuernelError, match="at least two dimensions"):
        magnitude_mask(torch.ones(4), 0.5)
    with pytest.raises(QuernelError, match="NaN"):
        magnitude_mask(torch.full((2, 2), float("nan")), 0.5)
    with pytest.raises(QuernelError, match="block must be one of 1, 2, 4"):
        magnitude_mask(torch.ones(4, 4), 0.5, block=3)
