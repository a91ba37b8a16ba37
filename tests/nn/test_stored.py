"""Stored layers within modules of torch that look at the weights of their children."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel.nn import StoredLinear
from quernel.nn.weights import DenseWeight, Int8Weight, StoredWeight

# Eight bits a weight, two layers of normalised outputs.
CLOSE = {"atol": 2e-2, "rtol": 0}
# The fused kernel sums in another order.
SAME = {"atol": 2e-6, "rtol": 1e-5}


def _dense(weight: torch.Tensor) -> StoredWeight:
    stored = DenseWeight(tuple(weight.shape), "float32")
    stored.load_state_dict({next(iter(stored.state_dict())): weight})
    return stored


@pytest.mark.parametrize(("store", "tolerance"), [(_dense, SAME), (Int8Weight.from_dense, CLOSE)])
def test_transformer_encoder_calls_stored_linears(store, tolerance) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        wanted = model(x)
        for block in model.layers:
            for name in ("linear1", "linear2"):
                linear = getattr(block, name)
                setattr(block, name, StoredLinear(store(linear.weight.detach()), linear.bias))
        torch.testing.assert_close(model(x), wanted, **tolerance)


def test_functions_of_torch_take_a_stored_weight_as_its_dense_tensor() -> None:
    weight = Int8Weight.from_dense(torch.randn(4, 5))
    x = torch.randn(2, 5)
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.dense()))
