"""torch's plain layers as data: what their constructors take, by kind of value, and how to build them again.

Surgery narrows these layers, so a file must describe them. Each field of a file is checked against its kind
before torch sees it: torch itself accepts ``eps="1e-5"`` and fails in the first forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quernel._errors import QuernelError

_NORM = {"num_features": "size", "eps": "float", "momentum": "float?", "affine": "bool", "track_running_stats": "bool"}
_CONV = {
    "in_channels": "size",
    "out_channels": "size",
    "kernel_size": "steps",
    "stride": "steps",
    "padding": "padding",
    "dilation": "steps",
    "groups": "size",
    "padding_mode": "mode",
    "bias": "bool",
}
# Class name -> the fields of its constructor and their kinds.
LAYERS: dict[str, dict[str, str]] = {
    "BatchNorm1d": _NORM,
    "BatchNorm2d": _NORM,
    "BatchNorm3d": _NORM,
    "Conv1d": _CONV,
    "Conv2d": _CONV,
    "Conv3d": _CONV,
    "Embedding": {"num_embeddings": "size", "embedding_dim": "size", "padding_idx": "int?"},
    "Identity": {},
    "Linear": {"in_features": "size", "out_features": "size", "bias": "bool"},
}
# Fields that a file may lack: files of earlier versions, and of layers that keep the default.
OPTIONAL: dict[str, dict[str, str]] = {
    "Embedding": {"max_norm": "float?", "norm_type": "float", "scale_grad_by_freq": "bool", "sparse": "bool"},
    **{f"BatchNorm{d}d": {"bias": "bool"} for d in (1, 2, 3)},
}
_MODES = ("zeros", "reflect", "replicate", "circular")


def is_plain_layer(module: nn.Module) -> bool:
    """Say whether this is one of torch's own layers that a file can describe, and no subclass of it."""
    name = type(module).__name__
    return name in LAYERS and type(module) is getattr(nn, name, None)


def describe_layer(module: nn.Module) -> dict[str, Any]:
    """Return ``{"class", "config"}`` from which ``build_layer`` builds an equal layer."""
    name = type(module).__name__
    config: dict[str, Any] = {}
    for field in (*LAYERS[name], *OPTIONAL.get(name, ())):
        value = getattr(module, field)
        if field == "bias":
            value = value is not None
            # Older releases of torch know no BatchNorm with weight and without bias, and take no such argument.
            if name.startswith("BatchNorm") and (value or not module.affine):
                continue
        config[field] = list(value) if isinstance(value, tuple) else value
    return {"class": f"torch.{name}", "config": config}


def build_layer(name: str, config: dict[str, Any]) -> nn.Module:
    """Build the layer that ``describe_layer`` described; raises ``QuernelError`` naming the field that is wrong."""
    layer = name.removeprefix("torch.")
    if layer not in LAYERS:
        raise QuernelError(f"class {name!r} is not one of torch's layers that a file may name")
    if set(LAYERS[layer]) - set(config):
        raise QuernelError(f"config of {name} must have the fields {sorted(LAYERS[layer])}; got {sorted(config)}")
    check_fields(layer, config)
    built: nn.Module = getattr(nn, layer)(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    return built


def check_fields(layer: str, config: dict[str, Any]) -> None:
    """Raise a ``QuernelError`` that names a field which the layer does not have, or whose value is of another kind."""
    known = LAYERS[layer] | OPTIONAL.get(layer, {})
    for field, value in config.items():
        if field not in known:
            raise QuernelError(f"config.{field} is no field of {layer}, which has {sorted(known)}")
        if not _is_kind(value, known[field], layer):
            raise QuernelError(f"config.{field} of {layer} cannot be {value!r}")


def _is_kind(value: Any, kind: str, layer: str) -> bool:
    if kind.endswith("?") and value is None:
        return True
    integer = isinstance(value, int) and not isinstance(value, bool)
    match kind.removesuffix("?"):
        case "bool":
            return isinstance(value, bool)
        case "float":
            return isinstance(value, float) or integer
        case "int":
            return integer
        case "size":
            return integer and value >= 0
        case "mode":
            return value in _MODES
    if kind == "padding" and isinstance(value, str):
        return value in ("valid", "same")
    # One number a dimension: Conv2d has two.
    low = 0 if kind == "padding" else 1
    numbers = value if isinstance(value, list) else [value] * int(layer[4])
    return len(numbers) == int(layer[4]) and all(type(n) is int and n >= low for n in numbers)
