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
from quernel._validate import check_type


def check_config(name: str, config: Any, fields: tuple[str, ...]) -> None:
    """Raise unless ``config`` of the class ``name`` holds these fields and no others."""
    held = check_type("config", config, dict)
    missing, unknown = [f for f in fields if f not in held], [repr(f) for f in held if f not in fields]
    if missing or unknown:
        lacks = [f"it lacks {', '.join(missing)}"] if missing else []
        lacks += [f"{name} has no {', '.join(unknown)}"] if unknown else []
        raise QuernelError(
            f"config must be what {name}.config() returns, with {', '.join(fields)}; {' and '.join(lacks)}"
        )


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
