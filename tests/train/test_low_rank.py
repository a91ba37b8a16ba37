"""Training the factors alone: what moves, what the optimiser holds, and merging afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import LowRankLinear, StoredLinear
from quernel.nn.weights import DenseWeight, LowRankWeight, StackedWeight
from quernel.train import low_rank_only, merge_low_rank

# Two float32 products in another order.
CLOSE = 1e-5


@pytest.fixture
def model() -> nn.Module:
    stacked = StackedWeight([LowRankWeight.from_dense(torch.randn(8, 8), 2), DenseWeight((4, 8), "float32")])
    return nn.Sequential(
        nn.Embedding(10, 16),
        LowRankLinear(16, 8, 4),
        nn.LayerNorm(8),
        StoredLinear(stacked, torch.zeros(12)),
        nn.Linear(12, 3),
    )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()


def test_only_factors_learn(model: nn.Module) -> None:
    trainable = low_rank_only(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"1.weight.a", "1.weight.b", "3.weight.parts.0.a", "3.weight.parts.0.b"}
    assert {id(p) for p in trainable} == {id(p) for p in model.parameters() if p.requires_grad}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(3):
        _step(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in names), name
        assert (p.grad is not None) == (name in names), name


def test_optimizer_state_is_two_floats_a_trainable_weight(model: nn.Module) -> None:
    trainable = low_rank_only(model)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    _step(model, optimizer)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim > 0)
    assert held == 2 * 4 * sum(p.numel() for p in trainable)


def test_gradients_of_before_do_not_move_frozen_weights(model: nn.Module) -> None:
    model(torch.arange(10)).square().sum().backward()
    low_rank_only(model)
    assert all(p.grad is None for p in model.parameters())


def test_biases_on_request(model: nn.Module) -> None:
    low_rank_only(model, bias=True)
    assert model[1].bias.requires_grad
    assert model[3].bias.requires_grad
    assert not model[4].bias.requires_grad


def test_shared_factors_are_returned_once() -> None:
    weight = LowRankWeight.from_dense(torch.randn(8, 8), 2)
    model = nn.Sequential(LowRankLinear.from_weight(weight), nn.ReLU(), LowRankLinear.from_weight(weight))
    assert [id(p) for p in low_rank_only(model)] == [id(weight.a), id(weight.b)]


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(QuernelError, match="Compress it with WeLore first"):
        low_rank_only(nn.Linear(3, 3))


def test_merging_keeps_the_function(model: nn.Module) -> None:
    ids = torch.arange(10)
    expected = model(ids)
    assert merge_low_rank(model) == ["1", "3"]
    assert [type(m) for m in model] == [nn.Embedding, nn.Linear, nn.LayerNorm, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(ids), expected, rtol=CLOSE, atol=CLOSE)
    assert merge_low_rank(model) == []


def test_merging_keeps_shared_weights_shared() -> None:
    weight = LowRankWeight.from_dense(torch.randn(8, 8), 2)
    shared = LowRankLinear.from_weight(weight)
    model = nn.ModuleList([shared, LowRankLinear.from_weight(weight), shared])
    merge_low_rank(model)
    assert model[0] is model[2]
    assert model[0].weight is model[1].weight
