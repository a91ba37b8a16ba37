"""What a merge did, module by module, for plans and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quernel.compress._method import LayerPlan
from quernel.compress.graph import LeftAlone
from quernel.compress.graph._flow import OUTPUT
from quernel.compress.prune._merging import Merger
from quernel.compress.prune._surgery import Surgery

# A group that loses more than this share is worth a look: thresholds can run away.
MUCH = 0.8


def layer_plans(model: nn.Module, surgery: Surgery, merger: Merger, left: Sequence[LeftAlone]) -> tuple[LayerPlan, ...]:
    """Return one line for each module that changes, and for each first producer of channels that do not."""
    reasons: dict[str, str] = {}
    for alone in left:
        reasons.setdefault(alone.names[0], alone.reason)
    for space in merger.spaces:
        if not space.merged:
            reasons.setdefault(space.group.name.partition(":")[0], "no two channels are close enough")
    plans = []
    module: Any
    for name, module in model.named_modules():
        if name in surgery.layers:
            weight = surgery.layers[name][0]
            old = module.weight.shape
            details = {"outputs": f"{old[0]} -> {weight.shape[0]}", "inputs": f"{old[1]} -> {weight.shape[1]}"}
            plans.append(LayerPlan(name, "merge", "", details))
        elif name in surgery.folded:
            plans.append(LayerPlan(name, "fold", "", {"into": surgery.folded[name]}))
        elif name in surgery.norms:
            plans.append(LayerPlan(name, "merge", "", {"features": len(surgery.norms[name][0])}))
        elif name in reasons:
            plans.append(LayerPlan(name, "keep", reasons[name]))
    return tuple(plans)


def summary(merger: Merger, left: Sequence[LeftAlone]) -> dict[str, int]:
    """Return the totals."""
    return {
        "groups_merged": sum(space.merged > 0 for space in merger.spaces),
        "groups_left_alone": len(left),
        "channels_before": sum(space.group.size for space in merger.spaces),
        "channels_after": sum(int(space.alive.sum()) for space in merger.spaces),
    }


def warnings(merger: Merger, left: Sequence[LeftAlone]) -> tuple[str, ...]:
    """Say which groups shrank much, where sums are inexact, and what was left alone against expectation."""
    found = []
    for space in merger.spaces:
        name, size = space.group.name, space.group.size
        if space.merged > MUCH * size:
            found.append(
                f"group '{name}' keeps {size - space.merged} of {size} channels; lower beta or max_ratio"
                + (', or use reference="initial"' if merger.rule.reference == "current" else "")
            )
        if space.merged and space.group.nonlinear and merger.rule.scale == "sum":
            operations = ", ".join(space.group.nonlinear)
            found.append(f"group '{name}' passes through {operations}, where sums are not exact; use scale=\"mean\"")
    inner = [alone for alone in left if alone.reason != OUTPUT]
    for reason in dict.fromkeys(alone.reason for alone in inner):
        names = [alone.names[0] for alone in inner if alone.reason == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"channels of '{names[0]}'{more} are left alone: the group {reason}")
    return tuple(found)
