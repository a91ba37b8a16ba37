"""A chain without its batch norms computes what it did."""

import torch
from torch import nn

from quernel.nn._folding import folded

# Sums of some tens of products in float32, in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def test_batch_norms_disappear_and_the_outputs_stay():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)
    )
    for _ in range(3):
        net(torch.randn(4, 3, 9, 9) * 2 + 1)
    x = torch.randn(2, 3, 9, 9)
    small = folded(net)
    assert net.training and not small.training
    assert [type(layer) for layer in small] == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    with torch.no_grad():
        torch.testing.assert_close(small(x), net.eval()(x), **TOLERANCE)
