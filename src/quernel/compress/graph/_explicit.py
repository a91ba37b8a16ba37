"""Channel groups given by hand, for models that ``torch.export`` cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from quernel._errors import QuernelError
from quernel.compress.graph._flow import Role
from quernel.compress.graph._groups import LAYERS, NORMS, ChannelMap, Slot, distinct, group_of


def explicit_map(model: nn.Module, groups: Sequence[tuple[Sequence[str], Sequence[str]]]) -> ChannelMap:
    """Build channel groups from names, for models that ``torch.export`` cannot read.

    Parameters
    ----------
    model : nn.Module
        Holds the named modules.
    groups : sequence of (producers, consumers)
        Module names. Producers are layers with one output a channel, depthwise convolutions, and batch
        norms, each right after the layer that feeds it and nothing else; consumers read the channels.

    Returns
    -------
    map : ChannelMap

    Raises
    ------
    QuernelError
        If a name is unknown, a module is of another kind, or sizes do not fit.
    """
    found = []
    folds: list[tuple[str, str]] = []
    for producers, consumers in groups:
        slots: list[Slot] = []
        size = 0
        for before, name in zip((None, *producers), producers, strict=False):
            module = _named(model, name, (*LAYERS, *NORMS))
            if isinstance(module, NORMS):
                if before is None or not isinstance(model.get_submodule(before), LAYERS):
                    raise QuernelError(f"groups: the batch norm {name!r} must come right after the layer that feeds it")
                folds.append((before, name))
                roles: tuple[Role, Role] = ("folded", "folded")
                width = int(module.num_features)
            else:
                width = int(module.weight.shape[0])
                depthwise = getattr(module, "groups", 1) == width > 1
                roles = ("gain", "shift") if depthwise else ("row", "row")
                if not depthwise and getattr(module, "groups", 1) != 1:
                    raise QuernelError(f"groups: {name!r} is a grouped convolution, which cannot be merged")
            size = size or width
            if width != size:
                raise QuernelError(f"groups: producers must have equal width; {name!r} has {width}, others {size}")
            index = np.arange(size)[:, None]
            slots.append(Slot(name, "weight", 0, roles[0], index))
            if getattr(module, "bias", None) is not None:
                slots.append(Slot(name, "bias", 0, roles[1], index))
        for name in consumers:
            columns = int(_named(model, name, LAYERS).weight.shape[1])
            if size == 0 or columns % size or getattr(model.get_submodule(name), "groups", 1) != 1:
                raise QuernelError(f"groups: consumer {name!r} has {columns} columns, which do not fit {size} channels")
            slots.append(Slot(name, "weight", 1, "column", np.arange(columns).reshape(size, -1)))
        found.append(group_of(slots, size, (), model))
    return ChannelMap(distinct(found), folds=tuple(folds))


def _named(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise QuernelError(f"groups: {name!r} is not a module of {type(model).__name__}") from error
    if type(module) not in kinds:
        wanted = ", ".join(kind.__name__ for kind in kinds)
        raise QuernelError(f"groups: {name!r} is a {type(module).__name__}; expected one of {wanted}")
    return module
