"""Read the tensors that channels live in, and put narrower layers in the place of the old ones.

Tensors travel as float64 arrays of shape (rows, columns, kernel).  A batch norm is folded into the layer
before it where that is exact; one that stands alone becomes a gain and a shift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quernel._validate import check_finite
from quernel.compress.graph import ChannelGroup, Slot
from quernel.compress.prune._merging import Space
from quernel.nn import replace_module
from quernel.nn.functional import fold_batch_norm

Array = NDArray[np.float64]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Surgery:
    """What goes where: (weight, bias) of layers, (gain, shift) of batch norms, {folded batch norm: its layer}."""

    layers: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)


def with_folds(group: ChannelGroup, folds: Mapping[str, str]) -> ChannelGroup:
    """Return the group as it is after folding: no folded batch norms, and a bias where they leave one."""
    vectors = [s for s in group.vectors if s.role != "folded"]
    have = {s.tensor for s in vectors}
    vectors += [
        Slot(s.module, "bias", 0, "row" if s.role == "row" else "shift", s.index)
        for s in group.producers
        if s.module in folds and f"{s.module}.bias" not in have
    ]
    return ChannelGroup(group.name, group.size, group.producers, group.consumers, tuple(vectors), group.nonlinear)


def read_tensors(model: nn.Module, names: Sequence[str], folds: Mapping[str, str]) -> dict[str, Array]:
    """Return the tensors of the named modules by dotted name, batch norms folded where ``folds`` says so."""
    tensors: dict[str, Array] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        weight, bias = _affine(module) if isinstance(module, NORMS) else _folded(model, name, folds.get(name))
        check_finite(f"{name}.weight", weight)
        tensors[f"{name}.weight"] = _array(weight)
        if bias is not None:
            check_finite(f"{name}.bias", bias)
            tensors[f"{name}.bias"] = _array(bias)
    return tensors


def _folded(model: nn.Module, name: str, norm_name: str | None) -> tuple[Tensor, Tensor | None]:
    layer: Any = model.get_submodule(name)
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    return (weight, bias) if norm_name is None else _fold(weight, bias, model.get_submodule(norm_name))


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return gain, (n, 1), and shift, (n,), of a batch norm: what it does behind a layer that does nothing."""
    ones = torch.ones(len(norm.running_mean), 1, dtype=torch.float64, device=norm.running_mean.device)
    return _fold(ones, None, norm)


def _fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return fold_batch_norm(weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _array(tensor: Tensor) -> Array:
    rows = tensor.shape[0]
    columns = tensor.shape[1] if tensor.ndim > 1 else 1
    return tensor.cpu().numpy().reshape(rows, columns, -1).copy()


def cut(model: nn.Module, tensors: Mapping[str, Array], spaces: Sequence[Space], folds: Mapping[str, str]) -> Surgery:
    """Drop the dead rows and columns of everything that the merged groups touch."""
    kept = kept_positions(tensors, spaces)
    names = dict.fromkeys(slot.module for s in spaces if s.merged for slot in s.slots)
    surgery = Surgery(folded={folds[name]: name for name in names if name in folds})
    for name in names:
        module: Any = model.get_submodule(name)
        weight, bias = (_cut(tensors, kept, f"{name}.{p}") for p in ("weight", "bias"))
        if weight is None:
            continue
        if isinstance(module, NORMS) and bias is not None:
            surgery.norms[name] = (weight.flatten(), bias.flatten())
        else:
            old: Tensor = module.weight
            shaped = weight.reshape(*weight.shape[:2], *old.shape[2:])
            # In the model's precision at once: a second model in float64 would weigh two.
            surgery.layers[name] = (shaped.to(old), None if bias is None else bias.flatten().to(old))
    return surgery


def kept_positions(tensors: Mapping[str, Array], spaces: Sequence[Space]) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """Return, for each (tensor, axis), which positions survive."""
    kept = {(name, axis): np.ones(t.shape[axis], dtype=bool) for name, t in tensors.items() for axis in (0, 1)}
    for space in spaces:
        for slot in space.slots:
            kept[slot.tensor, slot.axis][slot.index[~space.alive]] = False
    return kept


def _cut(tensors: Mapping[str, Array], kept: Mapping[tuple[str, int], NDArray[np.bool_]], name: str) -> Tensor | None:
    if name not in tensors:
        return None
    return torch.from_numpy(tensors[name][np.ix_(kept[name, 0], kept[name, 1])])


def operate(model: nn.Module, surgery: Surgery, *, keep_bn: bool = False) -> None:
    """Put the narrower layers in, everywhere their old ones are known."""
    for name, (weight, bias) in surgery.layers.items():
        replace_module(model, name, narrowed(model.get_submodule(name), weight, bias))
    for name, (gain, shift) in surgery.norms.items():
        replace_module(model, name, _norm_like(model.get_submodule(name), gain, shift))
    for name, layer in surgery.folded.items():
        ones = torch.ones(len(surgery.layers[layer][0]))
        new = _norm_like(model.get_submodule(name), ones, 0 * ones) if keep_bn else nn.Identity()
        replace_module(model, name, new)


def narrowed(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Return a layer of the same kind with other weights; nothing is drawn from a random generator."""
    old: Tensor = layer.weight
    if isinstance(layer, nn.Linear):
        new: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        groups = 1 if layer.groups == 1 else weight.shape[0]
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        same = {n: getattr(layer, n) for n in names}
        channels = (weight.shape[1] * groups, weight.shape[0])
        new = type(layer)(*channels, **same, groups=groups, bias=bias is not None, device="meta")
    weight = weight.to(old)
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    new.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)
    return new


def _norm_like(norm: Any, gain: Tensor, shift: Tensor) -> Any:
    old: Tensor = norm.running_mean
    new = type(norm)(len(gain), eps=norm.eps, momentum=norm.momentum, device=old.device, dtype=old.dtype)
    grad = norm.weight is None or bool(norm.weight.requires_grad)
    # Statistics 0 and 1: the gain absorbs sqrt(1 + eps).
    new.weight = nn.Parameter((gain * math.sqrt(1 + norm.eps)).to(old), requires_grad=grad)
    new.bias = nn.Parameter(shift.to(old), requires_grad=grad)
    return new
