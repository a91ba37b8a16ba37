"""Feature complexity: how many channels of each layer survive merging, as a function of the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quernel._validate import check_probability
from quernel.compress._context import Forward
from quernel.compress.graph import channel_map, explicit_map
from quernel.compress.prune.feature_merging import FeatureMerging, build_merger


def feature_complexity(
    model: nn.Module,
    example_inputs: Any,
    betas: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
    *,
    method: FeatureMerging | None = None,
    forward: Forward | None = None,
) -> dict[str, list[int]]:
    """Count the channels of each group that survive merging, for each threshold.

    The curve over ``betas`` is the feature complexity of a layer: a layer that keeps its channels at a large
    threshold computes that many different features.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    example_inputs : tensor, tuple or mapping
        One batch, for tracing.
    betas : sequence of float
        Thresholds in [0, 1].
    method : FeatureMerging, optional
        How to merge; its ``beta`` and ``max_ratio`` are not used. With ``order="global"`` the counts never grow
        with beta; the default sweeps treat neighbouring groups in turn and may differ by a channel.
    forward : callable, optional
        ``forward(model, example_inputs)`` for batches of another kind.

    Returns
    -------
    counts : dict of str to list of int
        Group name (its first producing layer) -> channels left at each beta, in forward order.

    Raises
    ------
    QuernelError
        If a beta is outside [0, 1] or the model cannot be traced.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight[3:].copy_(net[0].weight[:3]), net[2].weight[:, 3:].copy_(net[2].weight[:, :3])
    >>> feature_complexity(net, torch.ones(1, 4), betas=(0.0,))
    {'0': [3]}
    """
    method = method or FeatureMerging()
    thresholds = [check_probability("betas", beta) for beta in betas]
    channels = explicit_map(model, method.groups) if method.groups else channel_map(model, example_inputs, forward)
    counts: dict[str, list[int]] = {g.name: [0] * len(thresholds) for g in channels.groups}
    merger = None
    for i in sorted(range(len(thresholds)), key=thresholds.__getitem__):
        # Globally ordered merges at a small beta are the first ones at a larger beta; sweeps start afresh.
        if merger is None or method.order == "sweep":
            merger = build_merger(model, channels, method)
        merger.run(thresholds[i], 1.0, method.order)
        for space in merger.spaces:
            counts[space.group.name][i] = int(space.alive.sum())
    return counts
