"""``folded``: a plain chain of layers without its batch norms, the form in which dense networks are timed."""

from __future__ import annotations

import copy

from torch import nn

from quernel.nn.functional.batch_norm import fold_batch_norm


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
            _fold_into(before, layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def _fold_into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give a convolution the work of the batch norm behind it."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    weight, bias = fold_batch_norm(conv.weight, conv.bias, mean, variance, norm.weight, norm.bias, eps=norm.eps)
    conv.weight, conv.bias = (nn.Parameter(t.detach(), conv.weight.requires_grad) for t in (weight, bias))
