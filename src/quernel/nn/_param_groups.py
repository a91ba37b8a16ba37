"""``param_groups``: the parameters of a network for an optimiser, each layer's by the rate and decay that it asks for.

Kernels of long convolutions, tables and the like have a ``param_groups(lr)`` of their own; all else trains at ``lr``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def param_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return groups for an optimiser: what layers ask for themselves, and the rest at ``lr``.

    Parameters
    ----------
    model : nn.Module
        With any layers that have ``param_groups(lr)``: token mixers, ``MetaBlock``, factorised convolutions, pair
        tables.  The outermost such layer speaks for what is in it.
    lr : float
        The rate of all that asks for nothing else.

    Returns
    -------
    groups : list of dict
        Each parameter once; those with the same options together, the ones at ``lr`` first.

    Notes
    -----
    A parameter of two layers is in the group that the first of them asks for, where that differs from ``lr``.  For
    layers over an array of ROAST take ``roast_param_groups``.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import LongConv
    >>> net = nn.Sequential(nn.Linear(4, 8), LongConv(8, l_max=16))
    >>> groups = param_groups(net, lr=0.01)
    >>> [(group["lr"], group.get("weight_decay")) for group in groups]
    [(0.01, None), (0.001, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    """
    return inner_groups([model], model, lr)


def inner_groups(asked: list[nn.Module], owner: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the groups of ``owner``'s parameters that the modules asked, or those inside of them, want."""
    special: dict[int, tuple[nn.Parameter, dict[str, Any]]] = {}
    for layer in _speaking(asked):
        for group in layer.param_groups(lr):
            options = {name: value for name, value in group.items() if name != "params"}
            if options != {"lr": lr}:
                for parameter in group["params"]:
                    special.setdefault(id(parameter), (parameter, options))
    groups: list[dict[str, Any]] = [{"params": [p for p in owner.parameters() if id(p) not in special], "lr": lr}]
    for parameter, options in special.values():
        same = [group for group in groups if {k: v for k, v in group.items() if k != "params"} == options]
        if not same:
            groups.append({"params": [], **options})
            same = groups[-1:]
        same[0]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _speaking(modules: list[nn.Module]) -> Iterator[Any]:
    for module in modules:
        if callable(getattr(module, "param_groups", None)):
            yield module
        else:
            yield from _speaking(list(module.children()))
