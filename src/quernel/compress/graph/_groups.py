"""Channel groups: the sets of channels that exist together in the same tensors, found in a model's graph.

A channel is a class of positions, in several tensors, that residual additions and pointwise operations tie
to one index.  Channels that occur in exactly the same tensors form a group: any two of them can be merged
or removed and every tensor still fits.  What crosses a constant, a norm over channels or an unknown
operation is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from quernel.compress._context import Forward
from quernel.compress.graph._flow import Flow, Role, Use, follow
from quernel.compress.graph._rules import RULES, module_of, unknown
from quernel.compress.graph._trace import trace

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the channels of a group sit in one tensor.

    Parameters
    ----------
    module, parameter : str
        Dotted module name, and ``"weight"`` or ``"bias"``.
    axis : int
        0 for rows (output channels), 1 for columns (input channels).
    role : {"row", "gain", "shift", "column", "folded"}
        What the tensor does to a channel: makes it, scales it (depthwise weight, batch norm), shifts it,
        reads it; "folded" is a batch norm that disappears into the layer before it.
    index : array, shape (size, k)
        Positions along ``axis`` of each channel; k > 1 after a flatten (height x width columns).
    """

    module: str
    parameter: str
    axis: int
    role: Role
    index: NDArray[np.int64] = field(repr=False)

    @property
    def tensor(self) -> str:
        """Dotted name of the tensor."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that occur together in the same tensors.

    ``producers`` are weight matrices whose rows make the channels (depthwise weights scale them),
    ``consumers`` weights whose columns read them, ``vectors`` biases and batch norms with one value a channel.
    ``nonlinear`` names operations on the way that are not positively homogeneous.
    """

    name: str
    size: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    vectors: tuple[Slot, ...] = ()
    nonlinear: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots."""
        return (*self.producers, *self.vectors, *self.consumers)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules concerned, each once."""
        return tuple(dict.fromkeys(slot.module for slot in self.slots))


@dataclass(frozen=True)
class LeftAlone:
    """Channels that must keep their number, and why."""

    names: tuple[str, ...]
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """All that the graph says about channels.

    ``folds`` lists ``(layer, batch norm)`` pairs where the layer's output goes to that batch norm alone.
    """

    groups: tuple[ChannelGroup, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    folds: tuple[tuple[str, str], ...] = ()


def channel_groups(model: nn.Module, example_inputs: Any, forward: Forward | None = None) -> list[ChannelGroup]:
    """Find the groups of channels of a model that can be merged or removed together.

    Parameters
    ----------
    model : nn.Module
        Read in evaluation mode, not changed.
    example_inputs : tensor, tuple or mapping
        One batch: passed alone, as positions or as keywords.
    forward : callable, optional
        ``forward(model, example_inputs)`` for batches of another kind.

    Returns
    -------
    groups : list of ChannelGroup
        In the order of the forward pass. ``channel_map`` gives what was left alone, too.

    Raises
    ------
    QuernelError
        If ``torch.export`` cannot read the model.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 5))
    >>> [(group.names, group.size) for group in channel_groups(net, torch.ones(1, 1, 4, 4))]
    [(('0', '3'), 8)]
    """
    return list(channel_map(model, example_inputs, forward).groups)


def channel_map(model: nn.Module, example_inputs: Any, forward: Forward | None = None) -> ChannelMap:
    """Return the groups, the channels left alone with their reasons, and the batch norms that can be folded.

    Parameters and errors are those of ``channel_groups``.
    """
    flow = follow(trace(model, example_inputs, forward), RULES, unknown)
    folds = tuple(
        (layer, bn) for bn, layer in flow.folds.items() if not any(_refusal(model, flow, n) for n in (layer, bn))
    )
    groups: list[ChannelGroup] = []
    left: list[LeftAlone] = []
    for uses, size, reason, nonlinear in _classes(model, flow):
        slots = [Slot(module_of(u.tensor), u.tensor.rpartition(".")[2], u.axis, u.role, u.ids) for u in uses]
        if not any(s.role == "row" for s in slots):
            continue
        group = group_of(slots, size, nonlinear, model)
        if reason is None and size < 2:
            reason = "has a single channel"
        if reason is None and not group.consumers:
            reason = "is read by no layer"
        if reason is None:
            groups.append(group)
        else:
            left.append(LeftAlone(tuple(dict.fromkeys(slot.module for slot in slots)), size, reason))
    return ChannelMap(distinct(groups), tuple(left), folds)


def _classes(model: nn.Module, flow: Flow) -> Iterable[tuple[list[Use], int, str | None, tuple[str, ...]]]:
    """Yield the uses of each group (``ids`` now positions, (size, k)), its size, refusal and bends."""
    labels = _labels(flow)
    where: dict[int, list[tuple[int, int]]] = {}
    reasons: dict[int, str] = {}
    bends: dict[int, dict[str, None]] = {}
    for number, use in enumerate(flow.uses):
        refusal = _refusal(model, flow, module_of(use.tensor))
        values, counts = np.unique(labels[use.ids], return_counts=True)
        for label, count in zip(values.tolist(), counts.tolist(), strict=True):
            where.setdefault(label, []).append((number, count))
            if refusal is None and count > 1 and use.axis == 0:
                reasons.setdefault(label, f"ties rows of '{module_of(use.tensor)}' to each other")
            if refusal is not None:
                reasons.setdefault(label, refusal)
    for ids, reason in flow.blocked:
        for label in np.unique(labels[ids]).tolist():
            reasons.setdefault(label, reason)
    for ids, operation in flow.bent:
        for label in np.unique(labels[ids]).tolist():
            bends.setdefault(label, {})[operation] = None
    together: dict[tuple[tuple[tuple[int, int], ...], str | None], list[int]] = {}
    _, first = np.unique(labels, return_index=True)
    for label in labels[np.sort(first)].tolist():
        if label in where:
            together.setdefault((tuple(where[label]), reasons.get(label)), []).append(label)
    for (places, reason_or_none), members in together.items():
        rank = np.full(labels.max() + 1, -1)
        rank[members] = np.arange(len(members))
        uses = []
        for number, count in places:
            use = flow.uses[number]
            ranks = rank[labels[use.ids]]
            order = np.argsort(ranks, kind="stable")[(ranks < 0).sum() :]
            uses.append(Use(use.tensor, use.axis, use.role, order.reshape(len(members), count)))
        nonlinear = tuple(dict.fromkeys(name for label in members for name in bends.get(label, ())))
        yield uses, len(members), reason_or_none, nonlinear


def _labels(flow: Flow) -> NDArray[np.int64]:
    """Return the class of every channel id."""
    pairs = [np.stack([a, b]) for a, b in flow.equal]
    i, j = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(flow.count, flow.count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64) if flow.count else i


def _refusal(model: nn.Module, flow: Flow, name: str) -> str | None:
    """Say why a layer cannot be cut, or None."""
    module = model.get_submodule(name)
    if type(module) not in (*LAYERS, *NORMS):
        return f"belongs to '{name}', a {type(module).__name__}, not a plain linear layer, convolution or batch norm"
    own = [f"{name}.{n}" for n, _ in (*module.named_parameters(), *module.named_buffers())]
    if any(flow.calls.get(t, 0) > 1 for t in own):
        return f"belongs to '{name}', which the model uses more than once"
    if any(t in flow.trace.tied for t in own):
        return f"belongs to '{name}', which shares a tensor with another module"
    for tensor in own:
        if tensor in flow.foreign:
            return f"belongs to '{name}', whose tensors are also read outside of it"
    return None


def group_of(slots: Sequence[Slot], size: int, nonlinear: tuple[str, ...], model: nn.Module) -> ChannelGroup:
    """Sort slots into producers, consumers and vectors; the first producer gives the name."""
    norms = {s.module for s in slots if type(model.get_submodule(s.module)) in NORMS}
    matrices = [s for s in slots if s.parameter == "weight" and s.module not in norms]
    producers = tuple(s for s in matrices if s.axis == 0)
    name = next((s.module for s in producers if s.role == "row"), "")
    vectors = tuple(s for s in slots if s.parameter == "bias" or s.module in norms)
    return ChannelGroup(name, size, producers, tuple(s for s in matrices if s.axis == 1), vectors, nonlinear)


def distinct(groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Number groups that share their first producer (parts of one layer's rows)."""
    seen: dict[str, int] = {}
    result = []
    for g in groups:
        seen[g.name] = seen.get(g.name, 0) + 1
        name = g.name if seen[g.name] == 1 else f"{g.name}:{seen[g.name]}"
        result.append(ChannelGroup(name, g.size, g.producers, g.consumers, g.vectors, g.nonlinear))
    return tuple(result)
