"""RoastEmbedding: rows by the block map or a tile map, padding, one array with linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quernel
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.nn import RoastEmbedding, RoastLinear, SharedArray


@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize(("dim", "block"), [(6, 4), (8, None), (64, None), (5, 1)])
def test_rows_are_those_of_the_map(mode, dim, block):
    table = RoastEmbedding(50, dim, memory=SharedArray(200, seed=2), block=block, mode=mode, scale=0.5)
    mapped, ids = table.weight.mapped, torch.tensor([[0, 49], [7, 7]])
    assert mapped.block == (min(dim, 32) if block is None else block)
    rows = ids.numpy().reshape(-1)
    values = table.memory.values.detach()[torch.from_numpy(mapped.index(rows))]
    wanted = (0.5 * values * torch.from_numpy(mapped.signs_of(rows))).reshape(2, 2, dim)
    for _ in range(2):
        torch.testing.assert_close(table(ids).detach(), wanted)
        with torch.no_grad():
            torch.testing.assert_close(table(ids), wanted)
    torch.testing.assert_close(table.materialize()[ids], table(ids))


def test_gradients_are_those_of_the_dense_table():
    table = RoastEmbedding(50, 6, 3, memory=SharedArray(40, seed=2), block=4)
    ids = torch.tensor([0, 3, 49, 0])
    (table(ids) * torch.arange(24.0).reshape(4, 6)).sum().backward()
    got, table.memory.values.grad = table.memory.values.grad, None
    (F.embedding(ids, table.materialize()) * torch.arange(24.0).reshape(4, 6)).sum().backward()
    torch.testing.assert_close(got, table.memory.values.grad)


def test_the_padding_row_is_zero():
    table = RoastEmbedding(50, 6, -1, memory=SharedArray(40, seed=2))
    assert table.padding_idx == 49
    assert not table(torch.tensor([49])).any() and not table.materialize()[49].any()
    table(torch.tensor([49])).sum().backward()
    assert not table.memory.values.grad.any()


def test_one_view_serves_a_table_and_the_layer_tied_to_it(tmp_path):
    memory = SharedArray(400, seed=2)
    head = RoastLinear(16, 50, False, memory=memory, tile=(8, 8))
    net = nn.Sequential(RoastEmbedding.over(head.weight), head)
    ids = torch.tensor([0, 49, 7])
    torch.testing.assert_close(net[0](ids), head.materialize()[ids])
    net(ids).sum().backward()
    assert len(list(net.parameters())) == 1
    loaded = quernel.load(save_model(net, tmp_path), model=lambda: nn.Sequential(nn.Identity(), nn.Identity()))
    assert torch.equal(loaded(ids), net(ids)) and len(list(loaded.parameters())) == 1


def test_bad_arguments_are_named():
    memory = SharedArray(10)
    with pytest.raises(QuernelError, match=r"memory must hold at least 16 numbers, those of one block.*it holds 10"):
        RoastEmbedding(50, 16, memory=memory)
    with pytest.raises(QuernelError, match=r"padding_idx must be an integer in \[-50, 49\]; got 50"):
        RoastEmbedding(50, 6, 50, memory=memory)
    with pytest.raises(QuernelError, match="num_embeddings must be an integer"):
        RoastEmbedding(0, 6, memory=memory)
    with pytest.raises((QuernelError, IndexError), match=r"50"):
        RoastEmbedding(50, 6, memory=memory)(torch.tensor([50]))
