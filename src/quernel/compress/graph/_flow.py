"""Follow channels through an exported graph: which position of which axis carries which channel.

Every axis of every value is either untracked (None) or an array with one channel id a position.  Weights
create ids (their rows) or read them (their columns); operations hand ids on, declare two of them equal
(residual additions), or block them with a reason.  Concatenation and flattening are then just array
operations on ids; the classes of equal ids are found at the end, all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from quernel.compress.graph._trace import Trace

Ids = NDArray[np.int64]
Axes = tuple[Ids | None, ...]
OUTPUT = "is an output of the model"
Role = Literal["row", "gain", "shift", "column", "folded"]


@dataclass(frozen=True, eq=False)
class Use:
    """An axis of a tensor that carries channels: ``ids[i]`` is the channel of position i."""

    tensor: str
    axis: int
    role: Role
    ids: Ids


@dataclass
class Flow:
    """Everything learned on the way through the graph."""

    trace: Trace
    values: dict[fx.Node, Any] = field(default_factory=dict)
    count: int = 0
    uses: list[Use] = field(default_factory=list)
    equal: list[tuple[Ids, Ids]] = field(default_factory=list)
    blocked: list[tuple[Ids, str]] = field(default_factory=list)
    bent: list[tuple[Ids, str]] = field(default_factory=list)
    folds: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)

    def new(self, n: int) -> Ids:
        """Return ``n`` fresh channel ids."""
        self.count += n
        return np.arange(self.count - n, self.count)

    def axes(self, operand: fx.Node, reader: str = "") -> Axes:
        """Return the axes of an activation; a weight that is read as one is out of its layer's control."""
        name = self.tensor(operand)
        if name is not None:
            self.foreign.setdefault(name, reader)
        value = self.values[operand]
        return value if isinstance(value, tuple) else ()

    def tensor(self, operand: Any) -> str | None:
        """Return the eager name of a parameter or buffer."""
        return self.trace.tensors.get(operand.name) if isinstance(operand, fx.Node) else None

    def call(self, tensor: str) -> None:
        """Count a layer's use of its weight."""
        self.calls[tensor] = self.calls.get(tensor, 0) + 1

    def use(self, tensor: str | None, axis: int, role: Role, ids: Ids | None) -> None:
        """Note that an axis of a tensor carries these channels."""
        if tensor is not None and ids is not None:
            self.uses.append(Use(tensor, axis, role, ids))

    def block(self, axes: Axes, reason: str) -> None:
        """Leave these channels alone."""
        self.blocked += [(ids, reason) for ids in axes if ids is not None]

    def bend(self, axes: Axes, operation: str) -> None:
        """Note an operation with f(2z) != 2 f(z): summing two equal features is not exact there."""
        self.bent += [(ids, operation) for ids in axes if ids is not None]


Rule = Callable[[Flow, fx.Node, dict[str, Any]], Any]


def follow(trace: Trace, rules: dict[str, Rule], fallback: Rule) -> Flow:
    """Send channel ids through the graph, one rule an operation."""
    flow = Flow(trace)
    for node in trace.graph.nodes:
        if node.op == "call_function":
            name = operation_name(node)
            flow.values[node] = rules.get(name, fallback)(flow, node, arguments(node))
        elif node.op == "output":
            for operand in node.all_input_nodes:
                flow.block(all_axes(flow, operand), OUTPUT)
        else:
            flow.values[node] = untracked(node)
    return flow


def all_axes(flow: Flow, operand: fx.Node) -> Axes:
    """Return the axes of a value that may hold several tensors, one after the other."""
    value = flow.values[operand]
    if isinstance(value, list):
        return tuple(ids for axes in value for ids in axes)
    return flow.axes(operand)


def operation_name(node: fx.Node) -> str:
    """Return e.g. "relu" for ``aten.relu_.default``: in-place forms move channels alike."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else getattr(target, "__name__", str(target))
    return name.rstrip("_")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the operands by their names in the operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return bound | dict(node.kwargs)


def untracked(node: fx.Node) -> Any:
    """Return axes without channels, in the structure of the node's value."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return [(None,) * v.ndim if isinstance(v, Tensor) else () for v in value]
    return (None,) * value.ndim if isinstance(value, Tensor) else ()


def shape(operand: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value on the example inputs."""
    return tuple(int(n) for n in operand.meta["val"].shape)
