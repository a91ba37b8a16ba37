"""Which module reads which module's output, and nothing else does: found by running, proven by running.

Hooks note whose output object is whose input. That suggests a pair; whether the output also goes elsewhere
(a residual stream, say) is then settled exactly. A fused activation must leave the model's output bit-equal,
and so must a scaling by powers of two that is put into the producer's weight and taken off before the reader:
floating point multiplies by powers of two without rounding, so any other reader, or a producer whose output does
not follow its weight, shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quernel.compress._context import Context, evaluating, run_batch, tied_elsewhere
from quernel.nn.functional.activations import FUSIBLE

Pairs = dict[str, str]


def activations_after(model: nn.Module, context: Context, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return ``{linear: (activation module, its kind)}`` where the activation alone reads the linear's output."""
    known = dict(model.named_modules())
    kinds = {name: kind for name, m in known.items() if (kind := activation_kind(m)) is not None}
    readers = readers_of(model, context, list(linears), list(kinds))
    found = {producer: (names[0], kinds[names[0]]) for producer, names in readers.items() if len(names) == 1}
    # One activation module called from several places must stay a module of its own.
    uses = [activation for activation, _ in found.values()]
    found = {producer: pair for producer, pair in found.items() if uses.count(pair[0]) == 1}

    @contextlib.contextmanager
    def fused(chosen: Mapping[str, tuple[str, str]]) -> Iterator[None]:
        handles = []
        for producer, (activation, _) in chosen.items():
            handles.append(known[producer].register_forward_hook(_then(known[activation].forward)))
            handles.append(known[activation].register_forward_hook(lambda module, args, output: args[0]))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return _proven(model, context, found, fused)


def scalable_producers(model: nn.Module, context: Context, linears: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return ``{norm or linear: linears}`` where these linears alone read the output, so it can take their scale."""
    known = dict(model.named_modules())
    producers = [name for name, m in known.items() if name and can_scale(model, m)]
    readers = readers_of(model, context, producers, list(linears))
    groups = {producer: tuple(names) for producer, names in readers.items()}

    @contextlib.contextmanager
    def scaled(chosen: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
        handles, before = [], []
        for producer, consumers in chosen.items():
            up, down = _powers_of_two(known[consumers[0]].get_parameter("weight").shape[1])
            before += [(p, p.detach().clone()) for p in known[producer].parameters(recurse=False)]
            scale_producer(known[producer], up)
            handles += [known[consumer].register_forward_pre_hook(_first_times(down)) for consumer in consumers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for parameter, values in before:
                    parameter.copy_(values)

    return _proven(model, context, groups, scaled)


def sole_readers(
    model: nn.Module, context: Context, producers: Iterable[str], linears: Iterable[str]
) -> dict[str, str]:
    """Return ``{module: linear}`` where this one linear alone reads the module's output, whatever the module is."""
    known = dict(model.named_modules())
    readers = readers_of(model, context, list(producers), list(linears))
    found = {producer: names[0] for producer, names in readers.items() if len(names) == 1}

    @contextlib.contextmanager
    def scaled(chosen: Mapping[str, str]) -> Iterator[None]:
        handles = []
        for producer, reader in chosen.items():
            up, down = _powers_of_two(known[reader].get_parameter("weight").shape[1])
            handles.append(known[producer].register_forward_hook(_output_times(up)))
            handles.append(known[reader].register_forward_pre_hook(_first_times(down)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return _proven(model, context, found, scaled)


def scalable_pairs(
    model: nn.Module, context: Context, linears: Iterable[str], *, mixing: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return ``{linear: (linear,)}`` of one parent where the second's input is linear in the first's output.

    Channel by channel, so that a scale can move from the second's columns to the first's rows: the up and down
    projections of a gated feed-forward network, or two layers around a ReLU.  ``mixing=True`` finds the pairs too
    that mix rows on the way (value and output projections of attention).

    Layers that have the names of others under their parents are taken to be wired like them: the first such pair is
    tried alone, and where it fails the others are left.
    """
    known = dict(model.named_modules())
    names = list(linears)
    alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for first, second in _in_order(model, context, names):
        parent, _, child = first.rpartition(".")
        other, _, reader = second.rpartition(".")
        sizes = known[first].get_parameter("weight").shape[0], known[second].get_parameter("weight").shape[1]
        if parent == other and sizes[0] == sizes[1] and can_scale(model, known[first]):
            alike.setdefault((child, reader), []).append((first, second))

    @contextlib.contextmanager
    def scaled(chosen: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
        handles, before = [], []
        for producer, (consumer,) in chosen.items():
            up, down = _powers_of_two(known[consumer].get_parameter("weight").shape[1])
            before += [(p, p.detach().clone()) for p in known[producer].parameters(recurse=False)]
            scale_producer(known[producer], up)
            handles.append(known[consumer].register_forward_pre_hook(_first_times(down)))
            if not mixing:
                handles.append(known[producer].register_forward_hook(_rows_times(1)))
                handles.append(known[consumer].register_forward_pre_hook(_first_rows_times(-1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for parameter, values in before:
                    parameter.copy_(values)

    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for pairs in alike.values():
        chosen = {first: (second,) for first, second in pairs if first not in found and second not in taken}
        trial = dict([next(iter(chosen.items()))]) if chosen else {}
        if trial and _proven(model, context, trial, scaled):
            proven = _proven(model, context, chosen, scaled)
            found |= proven
            taken |= {second for (second,) in proven.values()}
    return found


def activation_kind(module: nn.Module) -> str | None:
    """Return which known activation a parameter-free leaf module computes, told by its numbers."""
    if next(module.children(), None) is not None or next(iter(module.state_dict()), None) is not None:
        return None
    if type(module).forward is nn.Module.forward or isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
        return None
    probe = torch.linspace(-8, 8, 65)
    try:
        with torch.no_grad():
            value = module(probe.clone())
    except (TypeError, RuntimeError, ValueError, IndexError):  # not a function of one tensor of any shape
        return None
    if not isinstance(value, Tensor) or value.shape != probe.shape:
        return None
    return next((kind for kind, f in FUSIBLE.items() if torch.allclose(value, f(probe), rtol=1e-6, atol=1e-6)), None)


def can_scale(model: nn.Module, module: nn.Module) -> bool:
    """Say whether scaling ``weight`` (and ``bias``) may scale the module's output; running it then decides."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or not (type(module) is nn.Linear or weight.ndim == 1):
        return False
    return all(tied_elsewhere(model, p, [module]) is None for p in module.parameters(recurse=False))


def scale_producer(module: nn.Module, factor: Tensor) -> None:
    """Multiply a producer's output channels by ``factor`` through its weight and bias."""
    weight, bias = module.get_parameter("weight"), dict(module.named_parameters(recurse=False)).get("bias")
    with torch.no_grad():
        weight.mul_(factor if weight.ndim == 1 else factor[:, None])
        if bias is not None:
            bias.mul_(factor)


def readers_of(model: nn.Module, context: Context, producers: list[str], readers: list[str]) -> dict[str, list[str]]:
    """Return for each producer the readers whose input is its very output, when all its calls agree."""
    known = dict(model.named_modules())
    made: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used twice
    seen: dict[str, list[list[str]]] = {name: [] for name in producers}
    calls: dict[str, int] = dict.fromkeys(readers, 0)

    def produced(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (name, output)
                seen[name].append([])

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] += 1
            source = made.get(id(args[0])) if args else None
            if source is not None and source[1]._version == 0 and seen[source[0]]:
                seen[source[0]][-1].append(name)

        return hook

    handles = [known[name].register_forward_hook(produced(name)) for name in producers]
    handles += [known[name].register_forward_pre_hook(read(name)) for name in readers]
    try:
        _output(model, context)
    finally:
        for handle in handles:
            handle.remove()
    agreed = {
        name: lists[0] for name, lists in seen.items() if lists and lists[0] and lists.count(lists[0]) == len(lists)
    }
    # A reader that is also called on something else keeps its own input.
    return {name: found for name, found in agreed.items() if all(calls[reader] == len(seen[name]) for reader in found)}


def _in_order(model: nn.Module, context: Context, linears: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of linears that run once each, one after the other, on different inputs."""
    known = dict(model.named_modules())
    runs: list[tuple[str, Tensor]] = []  # holds the tensors, so that no id is used twice

    def read(name: str) -> Callable[..., None]:
        return lambda module, args: runs.append((name, args[0])) if args else None

    handles = [known[name].register_forward_pre_hook(read(name)) for name in linears]
    try:
        _output(model, context)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in runs]
    once = [(name, x) for name, x in runs if names.count(name) == 1]
    return [(a, b) for i, (a, x) in enumerate(once) for b, y in once[i + 1 :] if x is not y]


def _proven(
    model: nn.Module,
    context: Context,
    chosen: dict[str, Any],
    changed: Callable[[Any], contextlib.AbstractContextManager[None]],
) -> dict[str, Any]:
    """Keep the entries that leave the output bit-equal; try all at once, then one by one."""
    wanted = _output(model, context) if chosen else []
    if not wanted:
        return {}  # nothing to prove it on: an output without tensors that can be seen

    def holds(some: dict[str, Any]) -> bool:
        with changed(some):
            got = _output(model, context)
        return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    return chosen if holds(chosen) else {name: value for name, value in chosen.items() if holds({name: value})}


def _output(model: nn.Module, context: Context) -> list[Tensor]:
    batch = next(context.batches())
    with evaluating(model), torch.no_grad():
        return _tensors(run_batch(model, batch, context.forward))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.clone()]
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []


def _then(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda module, args, output: function(output)


def _output_times(factor: Tensor) -> Callable[..., Tensor]:
    return lambda module, args, output: output * factor.to(output)


def _first_times(factor: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (args[0] * factor.to(args[0]), *args[1:])


def _rows_times(sign: int) -> Callable[..., Tensor]:
    return lambda module, args, output: output * _row_powers(output, sign)


def _first_rows_times(sign: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (args[0] * _row_powers(args[0], sign), *args[1:])


def _row_powers(x: Tensor, sign: int) -> Tensor:
    rows = torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1)
    return torch.exp2(sign * (rows % 3 - 1).to(x.dtype))


def _powers_of_two(n: int) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(n) % 5 - 2
    return torch.exp2(exponents.float()), torch.exp2(-exponents.float())
