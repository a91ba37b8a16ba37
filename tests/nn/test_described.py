"""Layers inside a layer's config: registered ones, torch's own, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from quernel._errors import FormatError, QuernelError
from quernel.nn import LowRankLinear
from quernel.nn._described import layer_config, layer_from_config


@pytest.mark.parametrize("layer", [nn.Linear(5, 4, bias=False), LowRankLinear(5, 4, 2)], ids=lambda m: type(m).__name__)
def test_layers_come_back(layer: nn.Module) -> None:
    twin = layer_from_config(json.loads(json.dumps(layer_config(layer))))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5)
    assert type(twin) is type(layer) and torch.equal(twin(x), layer(x))


def test_others_are_refused() -> None:
    with pytest.raises(QuernelError, match="Sequential is neither"):
        layer_config(nn.Sequential())
    with pytest.raises(FormatError, match="not a class of this version"):
        layer_from_config({"class": "os.system", "config": {}})
    with pytest.raises(QuernelError, match="is not one of torch's layers"):
        layer_from_config({"class": "torch.load", "config": {}})
