"""``SparseWeight``: what it stores, exactly; what it refuses, also from a file."""

import copy

import pytest
import torch

from quernel._errors import FormatError, QuernelError
from quernel.nn.weights import SparseWeight


def matrix(outputs, inputs, sparsity, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=g) * (torch.rand(outputs, inputs, generator=g) >= sparsity)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 9), (13, 7), (16, 40), (6, 70_000 // 2)])
def test_the_dense_weight_comes_back_exactly(shape, sparsity, block):
    dense = matrix(*shape, sparsity)
    stored = SparseWeight.from_dense(dense, block)
    assert torch.equal(stored.dense(), dense)
    assert torch.equal(SparseWeight.from_dense(dense[:, :, None, None], block).dense(), dense[:, :, None, None])
    twin = SparseWeight.from_config(stored.config())
    twin.load_state_dict(stored.state_dict())
    assert torch.equal(twin.dense(), dense)
    assert torch.equal(twin.rows(torch.tensor([0, shape[0] - 1])), dense[[0, -1]])


def test_columns_use_all_16_bits():
    dense = torch.zeros(2, 65_536)
    dense[0, [0, 32_767, 32_768, 65_535]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    stored = SparseWeight.from_dense(dense)
    assert stored.indices.tolist() == [0, 32_767, -32_768, -1]
    assert torch.equal(stored.dense(), dense)
    assert stored.matmul(dense[:1]).tolist() == [[30.0, 0.0]]


def test_bytes_and_sparsity():
    dense = matrix(64, 128, 0.9)
    stored = SparseWeight.from_dense(dense)
    nonzeros = int((dense != 0).sum())
    assert stored.nonzeros == nonzeros
    assert stored.sparsity == pytest.approx(1 - nonzeros / dense.numel())
    assert stored.nbytes == 6 * nonzeros + 4 * 65
    blocked = SparseWeight.from_dense(dense, block=4)
    assert blocked.nonzeros == 4 * blocked.indices.numel()


def test_values_stay_float32_and_copies_share_nothing():
    stored = SparseWeight.from_dense(matrix(5, 6, 0.5))
    dense, twin = stored.dense(), copy.deepcopy(stored)
    assert stored.to(torch.bfloat16).values.dtype == torch.float32
    stored.values.zero_()
    assert torch.equal(twin.dense(), dense)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(3), {}, "shape must be"),
        (torch.zeros(3, 4, 3, 3), {}, "shape must be"),
        (torch.zeros(3, 4, dtype=torch.float64), {}, "must be float32"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "must be float32"),
        (torch.full((3, 4), float("nan")), {}, "NaN"),
        (torch.zeros(1, 65_537), {}, "at most 65536 inputs"),
        (torch.zeros(3, 4), {"block": 3}, "block must be one of 1, 2, 4; got 3"),
        ([[1.0]], {}, "weight must be Tensor; got list"),
    ],
)
def test_refuses(weight, options, message):
    with pytest.raises(QuernelError, match=message):
        SparseWeight.from_dense(weight, **options)


@pytest.mark.parametrize(("values", "indices", "block"), [(3, 4, 1), (5, 5, 2), (13, 13, 1), (40, 20, 2), (-1, -1, 1)])
def test_refuses_sizes_that_do_not_fit(values, indices, block):
    with pytest.raises(QuernelError, match="do not fit"):
        SparseWeight((2, 6), values, indices, block)


def test_an_empty_weight_is_safe_to_run():
    stored = SparseWeight.from_dense(matrix(13, 7, 0.5), block=4)
    empty = SparseWeight.from_config(stored.config())
    assert torch.equal(empty.matmul(torch.randn(3, 7)), torch.zeros(3, 13))


def test_a_pattern_that_leads_astray_is_not_loaded():
    stored = SparseWeight.from_dense(matrix(13, 7, 0.5), block=2)
    for name, place, value in (
        ("indices", 3, 7), ("indices", 0, -1), ("pointers", 0, 1), ("pointers", -1, 10_000), ("pointers", 2, 10_000),
        ("pointers", 6, 0),
    ):  # fmt: skip
        state = {key: tensor.clone() for key, tensor in stored.state_dict().items()}
        state[name][place] = value
        with pytest.raises(FormatError, match=name):
            SparseWeight.from_config(stored.config()).load_state_dict(state)
