"""Layers inside a layer, written down in its config: registered classes by their own config, torch's plain ones too.

A file describes the outermost registered module whole, so a module whose children other methods may replace (a
projection that became a ``StoredLinear``) names their classes instead of assuming them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quernel._errors import QuernelError
from quernel._module_tree import is_registered
from quernel._plain_layers import build_layer, describe_layer, is_plain_layer
from quernel._registry import resolve_class


def layer_config(layer: nn.Module) -> dict[str, Any]:
    """Return ``{"class", "config"}`` of a layer.

    Raises
    ------
    QuernelError
        If it is neither a registered module nor a plain layer of torch.
    """
    if is_registered(layer):
        return {"class": type(layer).__name__, "config": layer.config()}  # type: ignore[operator]
    if is_plain_layer(layer):
        return describe_layer(layer)
    raise QuernelError(f"{type(layer).__name__} is neither a registered module nor a plain layer of torch")


def layer_from_config(config: dict[str, Any]) -> nn.Module:
    """Build an empty layer from ``layer_config``; only registered classes and plain layers are built."""
    name = config["class"]
    if isinstance(name, str) and name.startswith("torch."):
        return build_layer(name, config["config"])
    cls: Any = resolve_class(name, file="layer", field="class")
    layer: nn.Module = cls.from_config(config["config"])
    return layer
