"""Which linear layers a low-rank method may factor, tied ones together, and what their inputs look like.

Two layers that hold one Parameter are one matrix: factored once, from the inputs of both, and tied afterwards.
A weight that something else holds too (an embedding, say) is left alone, because factoring would untie it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import all_finite
from quernel.compress._context import Context, observe_inputs, tied_elsewhere
from quernel.compress._method import LayerPlan
from quernel.kernels.moments import Gram


@dataclass(frozen=True, eq=False)
class Layer:
    """One stored weight: the layers that hold it, its row blocks, and the Gram matrix of its inputs."""

    names: tuple[str, ...]
    modules: tuple[nn.Linear, ...]
    blocks: tuple[Tensor, ...]  # (m_i, n) each
    gram: Tensor | None = None  # (n, n)
    rows: int = 0

    @property
    def name(self) -> str:
        """The first name it is known by."""
        return self.names[0]


def find_layers(
    model: nn.Module,
    context: Context,
    targets: tuple[type[nn.Module], ...],
    exclude: Sequence[str],
    split: Mapping[str, int],
) -> tuple[list[Layer], list[LayerPlan]]:
    """Return the layers to look at, and those that were left out, with the reason.

    Raises
    ------
    QuernelError
        If a weight holds NaN or infinity; names the layer.
    """
    groups: dict[Tensor, list[tuple[str, nn.Linear]]] = {}
    skipped = []
    for name, module in context.selected(model, targets):
        part = next((part for part in exclude if part in name), None)
        if part is not None:
            skipped.append(LayerPlan(name, "skip", f"its name holds {part!r}, which the method excludes"))
        elif isinstance(module, nn.Linear):
            groups.setdefault(module.weight, []).append((name, module))
    layers = []
    for weight, members in groups.items():
        names, modules = tuple(name for name, _ in members), tuple(module for _, module in members)
        other = tied_elsewhere(model, weight, modules)
        if other is not None:
            skipped += [LayerPlan(name, "skip", f"its weight is tied to {other}") for name in names]
            continue
        if not all_finite(weight):
            raise QuernelError(f"the weight of {names[0]!r} holds NaN or infinity; repair or exclude the layer")
        layers.append(Layer(names, modules, _blocks(names[0], weight, split)))
    return layers, skipped


def observe_grams(model: nn.Module, context: Context, layers: Sequence[Layer]) -> tuple[list[Layer], list[LayerPlan]]:
    """Run the data and return the layers with X^T X of their inputs; a layer that never ran is skipped."""
    observers = {one.name: Gram(one.blocks[0].shape[1], device=one.blocks[0].device) for one in layers}
    observe_inputs(model, context, {name: observers[layer.name] for layer in layers for name in layer.names})
    seen, skipped = [], []
    for layer in layers:
        stats = observers[layer.name]
        if not stats.count:
            skipped += [LayerPlan(name, "skip", "the data never reached it") for name in layer.names]
            continue
        seen.append(replace(layer, gram=stats.sum, rows=stats.count))
    return seen, skipped


def _blocks(name: str, weight: Tensor, split: Mapping[str, int]) -> tuple[Tensor, ...]:
    parts = split.get(name.rpartition(".")[2], 1)
    # A fused matrix of unequal parts (grouped-query attention) is treated as one.
    return weight.detach().chunk(parts) if weight.shape[0] % parts == 0 else (weight.detach(),)
