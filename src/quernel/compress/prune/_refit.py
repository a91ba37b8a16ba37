"""Least-squares refit of the layers that read merged channels, from unlabelled data.

For one layer after the other, in the order of the forward pass: x the input it now gets, y the output it had in
the original model (merged where its own rows are merged).  Minimise ||x W^T - y||^2 + ridge ||W - W0||^2 over W and
the bias; W0 is the merged weight, so few samples change little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quernel.compress._context import Context, evaluating
from quernel.kernels.moments import Gram
from quernel.kernels.ridge import solve_ridge

# Share of the mean diagonal of x^T x: enough to make it regular, too little to hold W back.
RIDGE = 1e-3
# Samples at a time: the patches of a convolution take kernel-size times the memory.
CHUNK = 16
# Inputs that are always zero leave the weight as it is.
TINY = 1e-12
REFITTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Target:
    """The module of the original whose output a layer must match, and how its channels were merged."""

    source: str
    mix: Tensor  # (rows now, rows before)


def refit(original: nn.Module, merged: nn.Module, targets: Mapping[str, Target], context: Context) -> None:
    """Refit the named layers of ``merged`` in place, in the order in which they run."""
    with evaluating(original, merged), torch.no_grad():
        order = _call_order(merged, tuple(targets), context)
        for i, name in enumerate(order):
            context.tell(f"refit {name}", i / len(order))
            layer = merged.get_submodule(name)
            if isinstance(layer, REFITTABLE):
                _refit_one(original, merged, layer, targets[name], context)


def _call_order(model: nn.Module, names: tuple[str, ...], context: Context) -> list[str]:
    called: dict[str, None] = {}
    hooks = {model.get_submodule(name): lambda *_, name=name: called.setdefault(name) for name in names}
    with _hooked(hooks):
        context.run_batch(model, next(context.batches()))
    return list(called)


def _refit_one(original: nn.Module, merged: nn.Module, layer: Any, target: Target, context: Context) -> None:
    seen: dict[str, Tensor] = {}
    # Copies, because an in-place activation after the layer would change what was seen.
    hooks: dict[nn.Module, Callable[..., Any]] = {
        layer: lambda module, args, output: seen.update(x=args[0].clone()),
        original.get_submodule(target.source): lambda module, args, output: seen.update(y=output.clone()),
    }
    weight: Tensor = layer.weight
    d = weight[0].numel() + 1
    gram = Gram(d, device=weight.device)
    cross = torch.zeros(d, len(weight), dtype=torch.float64, device=weight.device)
    mix = target.mix.to(weight)
    with _hooked(hooks):
        for batch in context.batches():
            context.run_batch(original, batch)
            context.run_batch(merged, batch)
            x, y, mask = seen["x"], seen["y"], context.mask_of(batch)
            keep = mask if mask is not None and isinstance(layer, nn.Linear) and x.shape[:-1] == mask.shape else None
            for start in range(0, len(x), CHUNK):
                some = slice(start, start + CHUNK)
                rows, outputs = _rows(layer, x[some], y[some])
                if keep is not None:
                    here = keep[some].flatten().to(rows.device)
                    rows, outputs = rows[here], outputs[here]
                gram.update(rows)
                cross += rows.T @ (outputs @ mix.T)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    before = torch.cat([weight.flatten(1), bias[:, None]], dim=1).double()  # (rows, d)
    ridge = RIDGE * float(gram.sum.diagonal().mean().clamp_min(TINY))
    change = solve_ridge(gram, cross - gram.sum @ before.T, ridge).T
    after = before + change
    weight.copy_(after[:, :-1].reshape(weight.shape))
    if layer.bias is None:
        layer.bias = nn.Parameter(after[:, -1].to(weight), requires_grad=weight.requires_grad)
    else:
        layer.bias.copy_(after[:, -1])


def _rows(layer: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs with a column of ones, (n, d), and outputs, (n, rows), of a few samples."""
    if isinstance(layer, nn.Linear):
        rows, outputs = x.flatten(0, -2), y.flatten(0, -2)
    else:
        size, stride, dilation = (getattr(layer, n) for n in ("kernel_size", "stride", "dilation"))
        around: Any = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else str(layer.padding_mode)
        x = functional.pad(x, around, mode=mode)
        if len(size) == 1:
            x, size, stride, dilation = x[:, :, None], (1, *size), (1, *stride), (1, *dilation)
        patches = functional.unfold(x, size, dilation, stride=stride)  # (N, C kh kw, positions)
        rows, outputs = patches.mT.flatten(0, 1), y.flatten(2).mT.flatten(0, 1)
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows, outputs


class _hooked:
    """Forward hooks for the length of a with block."""

    def __init__(self, hooks: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self.hooks = hooks

    def __enter__(self) -> None:
        self.handles = [module.register_forward_hook(_quiet(hook)) for module, hook in self.hooks.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _quiet(hook: Callable[..., Any]) -> Callable[..., None]:
    # What a forward hook returns would replace the output.
    def observe(*args: Any) -> None:
        hook(*args)

    return observe
