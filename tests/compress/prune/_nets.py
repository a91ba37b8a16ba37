"""Small networks with every kind of channel group, their duplicated versions, and shorthands to merge them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.compress import Context, FeatureMerging
from quernel.compress.graph import channel_groups

# Output change that float32 rounding of merged weights may cause; outputs are of order one.
CLOSE = 1e-4
IMAGES = (2, 3, 8, 8)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """A stem, two residual blocks with batch norms, a head."""

    def __init__(self, width: int = 8, hidden: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.a, self.b = (nn.Conv2d(width, hidden, 3, padding=1, bias=False) for _ in range(2))
        self.c, self.d = (nn.Conv2d(hidden, width, 3, padding=1, bias=False) for _ in range(2))
        self.na, self.nb = nn.BatchNorm2d(hidden), nn.BatchNorm2d(hidden)
        self.nc, self.nd = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.nc(self.c(F.relu(self.na(self.a(x))))))
        x = F.relu(x + self.nd(self.d(F.relu(self.nb(self.b(x))))))
        return self.head(x.mean((2, 3)))


class Tail(nn.Module):
    """Depthwise convolution, a batch norm of its own, flatten, and a one-layer residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.own = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.own(F.relu(self.depth(F.relu(self.stem(x))))))
        x = x + F.relu(self.mix(x))
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def trained_norms(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return net.eval()


def duplicated(net: nn.Module, x: Tensor, *, per_group: int = 3, copies: int = 1, random: bool = False) -> nn.Module:
    """Widen every group by copies of some channels; what reads a channel is split over its copies."""
    gen = np.random.default_rng(3)
    net = copy.deepcopy(net)
    for group in channel_groups(net, x):
        chosen = gen.choice(group.size, per_group, replace=False)
        for slot in group.slots:
            module: Any = net.get_submodule(slot.module)
            names = ("weight", "bias", "running_mean", "running_var")
            norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
            for name in names if norm and slot.parameter == "weight" else () if norm else (slot.parameter,):
                tensor = getattr(module, name).detach()
                at = torch.from_numpy(slot.index[chosen].ravel())
                extra = tensor.index_select(slot.axis, at)
                if slot.role == "column":
                    share = torch.rand(len(at)) if random else torch.full((len(at),), 1 / (copies + 1))
                    share = share.reshape(-1, *[1] * (tensor.ndim - 2))
                    tensor = tensor.index_copy(1, at, extra * (1 - copies * share))
                    extra = extra * share
                new = torch.cat([tensor, *[extra] * copies], dim=slot.axis)
                if isinstance(getattr(module, name), nn.Parameter):
                    setattr(module, name, nn.Parameter(new))
                else:
                    setattr(module, name, new)
            if getattr(module, "groups", 1) > 1:
                module.groups = module.in_channels = module.out_channels = len(module.weight)
    return net


def widths(net: nn.Module, x: Tensor) -> dict[str, int]:
    return {g.name: g.size for g in channel_groups(net, x)}


def merged(net: nn.Module, x: Tensor, **kwargs: Any) -> nn.Module:
    return apply(net, FeatureMerging(**kwargs), Context(example_inputs=x))


def apply(net: nn.Module, method: FeatureMerging, context: Context) -> nn.Module:
    work = copy.deepcopy(net)
    method.apply(work, method.plan(work, context))
    return work


def change(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((one.eval()(x) - other.eval()(x)).abs().max())


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(6, 16, 12, 4), (5, 6)),
    "batch norms and residuals": (Residual, IMAGES),
    "depthwise, lone batch norm, flatten": (Tail, IMAGES),
}


def net_and_input(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = NETS[name]
    return trained_norms(build()), torch.randn(shape)
