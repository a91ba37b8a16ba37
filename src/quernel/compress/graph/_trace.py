"""Export a model and say which eager parameter every placeholder of the graph stands for.

``torch.export`` (non-strict) runs the forward in Python, so it reads what symbolic tracing cannot,
transformers included, and keeps the operations whole: ``aten.conv2d``, ``aten.linear``, ``aten.batch_norm``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from quernel._errors import QuernelError
from quernel.compress._context import Forward, evaluating, run_batch

# torch.export keeps its state in globals: two exports at once fail in either.
_one_export = threading.Lock()


def _after_fork() -> None:
    global _one_export
    _one_export = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Trace:
    """An exported graph; ``tensors`` maps placeholder names to the first eager name of the tensor."""

    graph: fx.Graph
    tensors: dict[str, str]
    tied: frozenset[str]


class _Run(nn.Module):
    """The model called on one batch, as every other pass over data calls it."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self.run = forward

    def forward(self, batch: Any) -> Any:
        return run_batch(self.model, batch, self.run)


def trace(model: nn.Module, example_inputs: Any, forward: Forward | None = None) -> Trace:
    """Export ``model`` in evaluation mode on one batch.

    Raises
    ------
    QuernelError
        If ``torch.export`` cannot read the model; carries its reason and the way around it.
    """
    batch = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    # Without gradients, attention layers would take opaque fast paths.
    with _one_export, evaluating(model), torch.enable_grad():
        try:
            program = torch.export.export(_Run(model, forward), (batch,), strict=False)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise QuernelError(
                f"torch.export cannot read {type(model).__name__}: {type(error).__name__}: {first_line}. Likely "
                "causes: (a) example_inputs do not fit the model, (b) the forward branches on values of its inputs, "
                "(c) an operator has no traced form. Fix it, or say which layers share channels yourself: "
                'FeatureMerging(groups=((("fc1",), ("fc2",)),)) lists (producers, consumers) by module name'
            ) from error
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), name)
    canonical = {name: first[id(tensor)] for name, tensor in named}
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {placeholder: name.removeprefix("model.") for placeholder, name in inputs.items()}
    tensors = {placeholder: canonical[name] for placeholder, name in names.items() if name in canonical}
    return Trace(program.graph, tensors, _tied(model, canonical))


def _tied(model: nn.Module, canonical: dict[str, str]) -> frozenset[str]:
    """Return tensors that two different modules own, such as an embedding tied to the output layer."""
    owners: dict[str, set[nn.Module]] = {}
    for name, first in canonical.items():
        owners.setdefault(first, set()).add(model.get_submodule(name.rpartition(".")[0]))
    return frozenset(name for name, modules in owners.items() if len(modules) > 1)
