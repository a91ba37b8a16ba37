"""``folded``: a plain chain of layers without its batch norms, the form in which dense networks are timed."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(net: nn.Sequential) -> nn.Sequential:
    """Return a copy in evaluation mode with every batch norm in the convolution right before it.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> [type(layer).__name__ for layer in folded(net)]
    ['Conv2d', 'ReLU']
    """
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(net).eval():
        before = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(before, layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()
