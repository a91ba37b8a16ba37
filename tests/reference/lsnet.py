"""Spatially varying filters by seven loops and by unfolding; the perception of ``LSConv`` layer by layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def ska(x: Tensor, w: Tensor) -> Tensor:
    """y[b, c, i, j] = sum_{u, v} x[b, c, i + u - p, j + v - p] w[b, c mod G, u k + v, i, j], one product at a time."""
    x, w = x.detach(), w.detach()
    batch, channels, height, width = x.shape
    sets, size = w.shape[1], round(w.shape[2] ** 0.5)
    half = size // 2
    y = torch.zeros(x.shape, dtype=torch.float64)
    ranges = (range(batch), range(channels), range(height), range(width), range(size), range(size))
    for b, c, i, j, u, v in itertools.product(*ranges):
        row, column = i + u - half, j + v - half
        if 0 <= row < height and 0 <= column < width:
            y[b, c, i, j] += float(x[b, c, row, column]) * float(w[b, c % sets, u * size + v, i, j])
    return y


def unfolded(x: Tensor, w: Tensor) -> Tensor:
    """The same by torch's unfold, k^2 copies of the input; differentiable."""
    batch, channels, height, width = x.shape
    sets, taps = w.shape[1:3]
    size = round(taps**0.5)
    columns = F.unfold(x, size, padding=size // 2).view(batch, channels // sets, sets, taps, height, width)
    return (columns * w[:, None]).sum(3).view(x.shape)


def perception(lkp: Any, x: Tensor) -> Tensor:
    """The weights of every place, with the group norm written out; eval mode, folded or not."""

    def conv(layer: Any, x: Tensor, pad: int = 0) -> Tensor:
        if not hasattr(layer, "c"):
            return F.conv2d(x, layer.weight, layer.bias, padding=pad, groups=layer.groups)
        y = F.conv2d(x, layer.c.weight, padding=pad, groups=layer.c.groups)
        norm = layer.bn
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    h = conv(lkp.cv1, x).clamp_min(0)
    h = conv(lkp.cv2, h, (lkp.cv2.c if hasattr(lkp.cv2, "c") else lkp.cv2).kernel_size[0] // 2)
    w = conv(lkp.cv4, conv(lkp.cv3, h).clamp_min(0))
    groups = w.unflatten(1, (lkp.sets, lkp.taps))  # (B, G, k^2, H, W)
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
    gain, shift = (t.view(1, lkp.sets, lkp.taps, 1, 1) for t in (lkp.norm.weight, lkp.norm.bias))
    return (groups - mean) / (variance + 1e-5).sqrt() * gain + shift
