"""``param_groups``: each parameter of a network once, with the rate and decay that its layer asks for."""

from __future__ import annotations

import torch
from torch import nn

from quernel.nn import FactorizedConv2d, H3Conv, LongConv, MetaBlock, param_groups


def test_groups_of_a_network_are_what_its_layers_ask_for() -> None:
    conv = FactorizedConv2d(3, 8, 3, rank=1)
    net = nn.Sequential(conv, nn.ModuleList([MetaBlock(LongConv(8, 9)), nn.Sequential(H3Conv(8, 9))]), nn.Linear(8, 2))
    groups = param_groups(net, 0.01)
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.0},
        {"lr": 1e-3, "weight_decay": 0.0},
    ]
    kernels = {id(p) for m in net.modules() if isinstance(m, LongConv | H3Conv) for p in m.filters.parameters()}
    assert {id(p) for p in groups[2]["params"]} == kernels and len(kernels) == 3
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    torch.optim.AdamW(groups)


def test_groups_of_a_block_are_its_mixers_and_the_rest() -> None:
    block = MetaBlock(LongConv(8, 9), ls_init=1.0)
    rest, kernels = block.param_groups(0.01)
    assert [id(p) for p in kernels["params"]] == [id(p) for p in block.mixer.kernel_parameters()]
    assert (kernels["lr"], kernels["weight_decay"], rest["lr"]) == (1e-3, 0.0, 0.01)
    assert {id(p) for p in block.mlp.parameters()} | {id(p) for p in block.scales} <= {id(p) for p in rest["params"]}
    assert param_groups(block, 0.01) == block.param_groups(0.01)


def test_shared_parameters_are_in_one_group() -> None:
    mixer, net = LongConv(8, 9), nn.Sequential(nn.Linear(8, 8))
    net.append(MetaBlock(mixer)).append(mixer)
    grouped = [id(p) for group in param_groups(net, 0.01) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(net.parameters()))
    assert [g["lr"] for g in param_groups(nn.Linear(2, 2), 0.1)] == [0.1]
