"""Networks of rows inside a model: runs of children that map (B, d) to (B, C), each row by itself.

They are found by running one batch: the children of an ``nn.Sequential`` from the first on that is given rows, or a
module that ``include`` names. What is found can be replaced by one layer that answers for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quernel.compress._context import Context, evaluating, is_below, opaque_parents, tied_elsewhere
from quernel.nn._running import device_of
from quernel.nn.weights import unique_bytes

# Outputs of rows in another order, in float32.
_SAME = 1e-3
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Network:
    """A run of modules that are called one after the other, or why it cannot be taken as one.

    Attributes
    ----------
    names : tuple of str
        Of the modules, in order; the first gets the rows.
    modules : tuple of nn.Module
    in_features, out_features : int
        Sizes d and C; 0 where it is refused.
    refusal : str
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    in_features: int = 0
    out_features: int = 0
    refusal: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes stored in the modules, shared storage counted once."""
        return unique_bytes(nn.ModuleList(self.modules))

    @property
    def device(self) -> torch.device:
        """Where the modules' tensors are."""
        return device_of(nn.ModuleList(self.modules))

    def inputs(self, model: nn.Module, context: Context, most: int) -> Tensor:
        """Run the data and return the rows that the network gets, float32 on the CPU, at most about ``most``."""
        held: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            if sum(map(len, held)) < most:
                held.append(args[0].detach().float().cpu())

        handle = self.modules[0].register_forward_pre_hook(take)
        try:
            context.run(model)
        finally:
            handle.remove()
        return torch.cat(held)[:most] if held else torch.zeros(0, self.in_features)

    @torch.no_grad()
    def answers(self, rows: Tensor) -> Tensor:
        """Return what the network makes of rows, float32 on the CPU."""
        first = next((p for m in self.modules for p in m.parameters() if p.is_floating_point()), rows)
        with evaluating(*self.modules):
            return torch.cat([_through(self.modules, part.to(first)).float().cpu() for part in rows.split(_ROWS)])


def find_networks(model: nn.Module, context: Context) -> list[Network]:
    """Return the outermost candidates that ``include`` and ``exclude`` allow, refused ones with their reason."""
    candidates = list(_candidates(model, context))
    seen = _watched(model, context, {m for _, modules in candidates for m in modules}) if candidates else {}
    found: list[Network] = []
    taken: list[str] = []
    for names, modules in candidates:
        if is_below(names[0], taken):
            continue
        network = _judged(model, names, modules, seen)
        found.append(network)
        if not network.refusal:
            taken += network.names
    return found


def _candidates(model: nn.Module, context: Context) -> Iterator[tuple[tuple[str, ...], tuple[nn.Module, ...]]]:
    opaque = opaque_parents(model)
    for name, module in model.named_modules():
        if is_below(name, opaque):
            continue
        if name and name in context.include:
            yield (name,), (module,)
        elif (
            isinstance(module, nn.Sequential)
            and len(module)
            and (context.allows(name) if name else not context.include)
        ):
            prefix = f"{name}." if name else ""
            pairs = [(f"{prefix}{child}", m) for child, m in module.named_children()]
            if all(context.allows(child) for child, _ in pairs):
                yield tuple(child for child, _ in pairs), tuple(m for _, m in pairs)


def _watched(
    model: nn.Module, context: Context, modules: set[nn.Module]
) -> dict[nn.Module, list[tuple[Tensor | None, Tensor | None]]]:
    """Run the first batch and return what each module was given and gave, call by call."""
    seen: dict[nn.Module, list[tuple[Tensor | None, Tensor | None]]] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        seen.setdefault(module, []).append((given, output if isinstance(output, Tensor) else None))

    handles = [module.register_forward_hook(watch, with_kwargs=True) for module in modules]
    try:
        with evaluating(model), torch.no_grad():
            context.run_batch(model, next(context.batches()))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _judged(
    model: nn.Module,
    names: tuple[str, ...],
    modules: tuple[nn.Module, ...],
    seen: dict[nn.Module, list[tuple[Tensor | None, Tensor | None]]],
) -> Network:
    """Return the run from the first module that is given rows and has parameters, or a refusal."""

    def refused(reason: str) -> Network:
        return Network(names, modules, refusal=reason)

    start = next((i for i, m in enumerate(modules) if _gets_rows(seen.get(m, []))), None)
    if start is None:
        return refused("it is not given rows of numbers (B, d)")
    while start < len(modules) - 1 and not any(True for _ in modules[start].parameters()):
        start += 1
    run = modules[start:]
    calls = [seen.get(m, []) for m in run]
    if any(len(call) != 1 for call in calls):
        return refused("it is called several times, or its parts are")
    x, y = calls[0][0][0], calls[-1][0][1]
    if (
        x is None
        or y is None
        or y.ndim != 2
        or not y.is_floating_point()
        or len(y) != len(x)
        or not _gets_rows(calls[0])
    ):
        return refused("it does not map rows (B, d) to rows (B, C)")
    inside = [m for part in run for m in part.modules()]
    if sum(isinstance(getattr(m, "in_features", None), int) for m in inside) < 2:
        return refused("it has fewer than two linear layers")
    shared = [tied_elsewhere(model, p, inside) for part in run for p in part.parameters()]
    if any(shared):
        return refused(f"a weight of it is tied to {next(filter(None, shared))}")
    if not _by_rows(run, x, y):
        return refused("the answer for a row depends on the rows beside it")
    return Network(names[start:], run, x.shape[1], y.shape[1])


def _gets_rows(calls: list[tuple[Tensor | None, Tensor | None]]) -> bool:
    given = calls[0][0] if calls else None
    return given is not None and given.ndim == 2 and given.is_floating_point()


@torch.no_grad()
def _by_rows(run: tuple[nn.Module, ...], x: Tensor, y: Tensor) -> bool:
    """Say whether the first rows alone, in another order, get the same answers."""
    half = max(1, len(x) // 2)
    with evaluating(*run):
        again = _through(run, x[:half].flip(0)).flip(0)
    return bool(torch.allclose(again.float(), y[:half].float(), rtol=_SAME, atol=_SAME * float(y.float().abs().max())))


def _through(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x
