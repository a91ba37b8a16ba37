"""What the theory sees of a network: its layers with weights in order, and the activation before each.

Layers come in the order in which they are registered. Activations are found by what they do: a leaf without buffers
that acts elementwise and is not linear. Where a network calls functions instead, they are watched while it runs on an
example.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from quernel._errors import QuernelError
from quernel.kernels.theory.activations import ACTIVATIONS, Activation, as_activation
from quernel.nn._running import device_of, evaluating, to_device

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_WEIGHTED = (nn.Linear, *_CONV)
# Whole machines: what is inside of them is no layer of a chain.
_CLOSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# Leaves that are tried as activations have at most as many parameters (PReLU has one).
_FEW = 1
# Gates and rotary positions are not what signals go through; they count where nothing else is called.
_GATES = ("sigmoid", "sin")
# ``F.linear`` is a layer, not the activation of that name.
_WATCHED = frozenset(ACTIVATIONS) - {"linear"}

ActivationLike = str | Callable[[Tensor], Tensor] | nn.Module | Activation


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A linear layer or a convolution.

    Parameters
    ----------
    name : str
        Dotted path in the model.
    module : nn.Module
    fan_in : int
        Terms of the sum behind one output: in_features, or in_channels / groups times the kernel's places.
    width : int
        Neurons that it reads: in_features or in_channels.
    outputs : int
        Neurons that it feeds.
    activation : Activation or None
        The one before it; None before the first layer.
    """

    name: str
    module: nn.Module
    fan_in: int
    width: int
    outputs: int
    activation: Activation | None

    @property
    def kind(self) -> str:
        """Class of the module."""
        return type(self.module).__name__


@dataclass(frozen=True)
class SkippedLayer:
    """A module with parameters that the theory has no word on, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True, eq=False)
class Network:
    """Layers with weights in order, the activations between them, and what was passed over."""

    layers: tuple[WeightLayer, ...]
    activations: tuple[Activation, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def width(self) -> float:
        """Harmonic mean of the hidden widths: fluctuations of layers add up as 1 / width."""
        hidden = [layer.width for layer in self.layers[1:]]
        return len(hidden) / sum(1 / n for n in hidden) if hidden else float(self.layers[0].outputs)


def read_network(model: nn.Module, activation: ActivationLike | None = None, *, example_inputs: Any = None) -> Network:
    """Return the layers of a model as a chain.

    Parameters
    ----------
    model : nn.Module
    activation : str, callable or nn.Module, optional
        The activation of all layers; without it, or with "auto", found.
    example_inputs : tensor, tuple or mapping, optional
        Run through the model where no module is an activation, to see which functions it calls; or a function that
        gives them, called only then.

    Returns
    -------
    network : Network

    Raises
    ------
    QuernelError
        If the model has no linear layer and no convolution, has lazy parameters, or no activation is found.
    """
    if not isinstance(model, nn.Module):
        raise QuernelError(f"model must be an nn.Module; got {type(model).__name__}")
    given = None if activation is None or activation == "auto" else as_activation(activation)
    found = _Walk(given is None)
    found.visit(model, "")
    if not found.layers:
        raise QuernelError(f"{type(model).__name__} has no linear layer and no convolution that can be initialised")
    activations = [given] if given is not None else list(found.known.values())
    if not activations and example_inputs is not None:
        activations = _called(model, example_inputs)
    if not activations and len(found.layers) > 1:
        raise QuernelError(
            f"no module of {type(model).__name__} is an activation that acts elementwise (softmax and gated units are "
            "none). If it calls a function, name that: activation='relu'"
        )
    default = activations[0] if activations else None
    layers = [
        WeightLayer(name, module, *_sizes(module), (before or default) if i else None)
        for i, (name, module, before) in enumerate(found.layers)
    ]
    return Network(tuple(layers), tuple(activations), tuple(found.skipped))


class _Walk:
    """One pass over the modules, each once."""

    def __init__(self, find: bool) -> None:
        self.find = find
        self.layers: list[tuple[str, nn.Module, Activation | None]] = []
        self.skipped: list[SkippedLayer] = []
        self.known: dict[tuple[type, str], Activation] = {}
        self.tried: dict[tuple[type, str], Activation | None] = {}
        self.seen: set[int] = set()
        self.last: Activation | None = None

    def visit(self, module: nn.Module, name: str) -> None:
        """Enter a module and what is in it."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        own = list(module.parameters(recurse=False))
        if any(is_lazy(p) for p in own):
            raise QuernelError(f"{name or type(module).__name__} has lazy parameters; run the model once first")
        reason = _reason(module, own)
        if reason is not None:
            self.skipped.append(SkippedLayer(name, type(module).__name__, reason))
            return
        if isinstance(module, _WEIGHTED):
            weight = id(module.weight)
            if weight in self.seen:
                self.skipped.append(SkippedLayer(name, type(module).__name__, "its weight is that of another layer"))
                return
            self.seen.add(weight)
            self.layers.append((name, module, self.last))
            return
        if self.find:
            self.last = self._activation(module) or self.last
        for child, inner in module.named_children():
            self.visit(inner, f"{name}.{child}" if name else child)

    def _activation(self, module: nn.Module) -> Activation | None:
        if any(True for _ in module.children()) or any(True for _ in module.buffers(recurse=False)):
            return None
        # Modules that print alike are alike: 50 of one kind are examined once. A learned slope is not printed.
        key = (type(module), repr(module) + repr([p.tolist() for p in module.parameters()]))
        if key not in self.tried:
            self.tried[key] = _elementwise(module)
        found = self.tried[key]
        if found is not None:
            self.known.setdefault(key, found)
        return found


def _reason(module: nn.Module, own: list[nn.Parameter]) -> str | None:
    """Say why a module is passed over, with all that is in it; None where it is not."""
    kind = type(module).__name__.lower()
    if is_parametrized(module):
        return "its weight is computed from other parameters"
    if isinstance(module, _CLOSED):
        return "attention and recurrence are no layers of the theory"
    if isinstance(module, _WEIGHTED) or any(True for _ in module.children()):
        return None
    if "norm" in kind:
        return "a norm sets K to 1 behind it, whatever the weights before"
    if not own or (len(own) == 1 and own[0].numel() <= _FEW):
        return None
    return "a look-up has no fan-in" if "embed" in kind else "no linear layer or convolution of torch"


def _elementwise(module: nn.Module) -> Activation | None:
    try:
        act = as_activation(module)
    except QuernelError:
        return None
    # Identity, and dropout in eval mode.
    return None if act.slopes is not None and act.slopes[0] == act.slopes[1] else act


def _sizes(module: nn.Module) -> tuple[int, int, int]:
    """Return fan-in, neurons read and neurons fed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.in_features, module.out_features
    if isinstance(module, _CONV):
        places = math.prod(module.kernel_size)
        if isinstance(module, _TRANSPOSED):
            # Of the kernel's places, every stride-th reaches one output.
            places = max(1, round(places / math.prod(module.stride)))
        return module.in_channels // module.groups * places, module.in_channels, module.out_channels
    raise QuernelError(f"{type(module).__name__} is no linear layer and no convolution")


def _called(model: nn.Module, example_inputs: Any) -> list[Activation]:
    """Return the activation that a model calls as a function, the most frequent one, by running it."""
    inputs = example_inputs() if callable(example_inputs) else example_inputs
    if inputs is None:
        return []
    inputs, watch = to_device(inputs, device_of(model)), _Watch()
    with evaluating(model), torch.no_grad(), watch:
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, Sequence):
            model(*inputs)
        else:
            model(inputs)
    counts = watch.seen
    if set(counts) - set(_GATES):
        counts = Counter({name: n for name, n in counts.items() if name not in _GATES})
    return [as_activation(counts.most_common(1)[0][0])] if counts else []


class _Watch(TorchFunctionMode):
    """Counts calls of functions that are activations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", "")).rstrip("_")
        if name == "gelu" and (kwargs or {}).get("approximate") == "tanh":
            name = "gelu_tanh"
        if name in _WATCHED:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))
