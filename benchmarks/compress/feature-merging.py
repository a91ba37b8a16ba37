"""Feature merging: what one merge costs against recomputing everything, and what the narrower net gains.

One merge in a layer of 512 channels (d = 9216) against the loop as it is written in the authors' code, which forms the
Gram matrix anew each time.  Then a VGG16 for 32 x 32 images at half of its channels against the whole one, both with
folded batch norms and channels last, in float32 and bfloat16.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._machine import DRAM_BYTES
from benchmarks._runner import Case
from quernel.compress import Context, FeatureMerging
from quernel.compress.graph import ChannelGroup, Slot
from quernel.compress.prune._merging import Merger, Rule, Space
from quernel.nn._folding import folded

CHANNELS, INPUTS, KERNEL = 512, 512, 9
MERGES = 8
BATCH = 32
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class OneLayer:
    """A layer and its reader, merged some channels at a time and put back."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        index = np.arange(CHANNELS)[:, None]
        slots = Slot("a", "weight", 0, "row", index), Slot("b", "weight", 1, "column", index)
        self.group = ChannelGroup("a", CHANNELS, slots[:1], slots[1:])
        self.rows = rng.standard_normal((CHANNELS, INPUTS, KERNEL))
        self.columns = rng.standard_normal((INPUTS, CHANNELS, KERNEL))
        self.merger = Merger({"a.weight": self.rows.copy(), "b.weight": self.columns.copy()}, [self.group], Rule())
        self.grams = {adds: gram.copy() for adds, gram in self.merger.spaces[0].grams.items()}

    def incremental(self) -> list[list[int]]:
        """Merge, note what was merged, and restore what was touched."""
        (space,) = self.merger.spaces
        for _ in range(MERGES):
            _, m, n = space.closest()
            self.merger.merge(space, m, n)
        members = [list(m) for m in space.members]
        for channel in (i for group in members if len(group) > 1 for i in group):
            self.merger.tensors["a.weight"][channel] = self.rows[channel]
            self.merger.tensors["b.weight"][:, channel] = self.columns[:, channel]
        self._reset(space)
        return members

    def _reset(self, space: Space) -> None:
        space.members = [[i] for i in range(CHANNELS)]
        space.count[:], space.alive[:], space.stale = 1.0, True, True
        for adds, gram in self.grams.items():
            space.grams[adds][:] = gram

    def recomputed(self) -> list[list[int]]:
        """Merge as written down: a fresh Gram matrix of all channels for every merge."""
        rows, columns = self.rows.copy(), self.columns.copy()
        members = [[i] for i in range(CHANNELS)]
        for _ in range(MERGES):
            flat = rows.reshape(len(rows), -1), columns.swapaxes(0, 1).reshape(len(rows), -1)
            gram = flat[0] @ flat[0].T + flat[1] @ flat[1].T
            distances = gram.diagonal()[:, None] + gram.diagonal()[None, :] - 2 * gram
            np.fill_diagonal(distances, np.inf)
            m, n = sorted(int(i) for i in np.unravel_index(distances.argmin(), distances.shape))
            share = len(members[m]) / (len(members[m]) + len(members[n]))
            rows[m] += rows[n]
            columns[:, m] = share * columns[:, m] + (1 - share) * columns[:, n]
            rows, columns = np.delete(rows, n, axis=0), np.delete(columns, n, axis=1)
            members[m] += members.pop(n)
        return members


def gate_merges(layer: OneLayer) -> bool:
    """Both merge the same channels, twice in a row."""
    wanted = sorted(sorted(m) for m in layer.recomputed())
    return all(sorted(sorted(m) for m in layer.incremental() if m) == wanted for _ in range(2))


def vgg16() -> nn.Sequential:
    """Return a VGG16 for CIFAR with batch norms."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for channels in VGG16:
        if channels == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10)).eval()


def nets(dtype: torch.dtype) -> SimpleNamespace:
    model = vgg16()
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    method = FeatureMerging(beta=1.0, max_ratio=0.5)
    small = copy.deepcopy(model)
    method.apply(small, method.plan(small, Context(example_inputs=x[:2])))
    ready = {"memory_format": torch.channels_last, "dtype": dtype}
    small, whole = small.to(**ready), folded(model).to(**ready)
    return SimpleNamespace(small=small, whole=whole, x=x.to(**ready))


def forward(which: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, which)(s.x)


def gate_nets(s: SimpleNamespace) -> bool:
    """The small net is a plain one at half of every width, and runs."""
    convs = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (s.small, s.whole)]
    halves = all(a.out_channels * 2 == b.out_channels for a, b in zip(*convs, strict=True))
    return halves and forward("small", s).shape == forward("whole", s).shape


CASES = [
    Case(
        name=f"{MERGES} merges, {CHANNELS} channels, d = {INPUTS * KERNEL * 2}",
        setup=OneLayer,
        ours=OneLayer.incremental,
        peers={"full recompute": OneLayer.recomputed},
        gate=gate_merges,
        target={"full recompute": 20.0},
        bound_ms=MERGES * 2 * CHANNELS * 8 * 4 / DRAM_BYTES * 1e3,
        bound="two rows and columns of two Gram matrices a merge / 34 GB/s",
        min_ms=200.0,  # a whole run of the peer leaves cold caches, which a short sample would feel
    ),
    *(
        Case(
            name=f"VGG16 forward at half of the channels, batch {BATCH}, {str(dtype).removeprefix('torch.')}",
            setup=partial(nets, dtype),
            ours=partial(forward, "small"),
            peers={"all channels": partial(forward, "whole")},
            gate=gate_nets,
            target={"all channels": 1.5},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
