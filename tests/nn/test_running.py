"""Eval mode is lent, not given; batches move whole."""

import collections

import pytest
import torch
from torch import nn

from quernel.nn._running import device_of, evaluating, to_device


def test_each_module_gets_its_own_mode_back_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[0].eval()
    modes = []

    def fail():
        with evaluating(model):
            modes.extend(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(modes)
    assert [m.training for m in model.modules()] == [True, False, True]


def test_device_is_that_of_any_tensor():
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")) == torch.device("meta")


def test_nested_batches_move():
    x = torch.ones(2)
    moved = to_device(collections.OrderedDict(a=[x, (x, 3)], b="text"), torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert type(moved["a"][1]) is tuple and moved["a"][1][1] == 3 and moved["b"] == "text"
