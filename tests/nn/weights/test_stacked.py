"""``StackedWeight``: row blocks in storages of their own act as the one matrix they make."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.weights import DenseWeight, LowRankWeight, StackedWeight


@pytest.fixture
def weight() -> StackedWeight:
    parts = [LowRankWeight.from_dense(torch.randn(6, 8), 2), DenseWeight.from_dense(torch.randn(3, 8), "float32")]
    return StackedWeight(parts)


def test_acts_as_the_whole_matrix(weight: StackedWeight) -> None:
    x = torch.randn(2, 5, 8)
    dense = torch.cat([part.dense() for part in weight.parts])
    assert weight.shape == (9, 8)
    assert torch.equal(weight.dense(), dense)
    torch.testing.assert_close(weight.matmul(x), x @ dense.T)


def test_bytes_are_those_of_the_parts(weight: StackedWeight) -> None:
    assert weight.nbytes == 4 * (2 * (6 + 8) + 3 * 8)


def test_config_rebuilds_every_part(weight: StackedWeight) -> None:
    empty = StackedWeight.from_config(weight.config())
    empty.load_state_dict(weight.state_dict())
    assert torch.equal(empty.dense(), weight.dense())


@pytest.mark.parametrize("parts", [[], [DenseWeight((3, 4)), DenseWeight((3, 5))], [DenseWeight((3, 4, 1, 1))]])
def test_parts_must_fit(parts: list[DenseWeight]) -> None:
    with pytest.raises(QuernelError, match="parts must be stored matrices"):
        StackedWeight(parts)
