"""HashedLinear: every number hashed on its own, the same as with a stored index."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from quernel.nn import HashedLinear, RoastLinear, SharedArray


@pytest.mark.parametrize("signs", [True, False])
def test_it_is_the_index_tensor_s_numbers(signs: bool) -> None:
    layer = HashedLinear(33, 17, memory=SharedArray(50, seed=1), signs=signs)
    mapped = layer.weight.mapped
    index, flips = torch.from_numpy(mapped.index()), torch.from_numpy(mapped.signs_of())
    x = torch.randn(4, 33, requires_grad=True)
    twin = copy.deepcopy(layer.memory)
    weight = twin.values[index] * flips * layer.weight.scale
    wanted = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    wanted.square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.memory.values.grad, twin.values.grad, rtol=1e-4, atol=1e-4)


def test_it_stores_the_array_and_the_bias_alone() -> None:
    layer = HashedLinear(64, 32, memory=SharedArray(100))
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "bias": (32,),
        "weight.memory.values": (100,),
    }
    assert layer.weight.mapped.tile == (1, 1)
    assert isinstance(HashedLinear.from_config(layer.config()), HashedLinear)
    assert isinstance(layer, RoastLinear)
