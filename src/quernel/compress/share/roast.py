"""Roast: every large weight of a model becomes a hashed view of one small array (arXiv 2207.10702).

    W_l[n, k] = lambda_l * sign * M[slot_l(n, k)],   lambda_l = rms(W_l) / rms(M)

Trained, saved and sent are the m numbers of M, with their gradients and optimiser state, and what stays dense: biases,
norms, small or depthwise layers. A model is made small *before* or *between* training: signs and places are random, so
a trained weight that is projected onto M loses most of what it knew (sqrt(1 - 1/c) of its length for c weights a slot).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._module_tree import is_registered
from quernel._random import spawn, torch_generator
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.compress._context import Context, is_below, tied_elsewhere
from quernel.compress._example_models import two_layer_example
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.hashing import BlockMap, TileMap
from quernel.nn import RoastConv2d, RoastEmbedding, RoastLinear, SharedArray, replace_module
from quernel.nn.hashed._memory import project
from quernel.nn.weights import unique_bytes
from quernel.nn.weights.hashed import HashedBlockWeight, HashedTileWeight, HashedWeight, Mode

# An array has room for at least so many tiles side by side; below, tiles get smaller.
_TILES = 4
_TARGETS = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True, eq=False)
class _Group:
    """Layers that hold one weight, and that weight."""

    layers: dict[str, nn.Module]
    weight: nn.Parameter

    @property
    def rms(self) -> float:
        """Root mean square of the weight; of one that is all zero, that of what torch would draw."""
        found = float(self.weight.detach().double().square().mean().sqrt())
        return found if found > 0 else (3 * self.weight[0].numel()) ** -0.5


@dataclass(frozen=True, eq=False)
class _Share:
    """Weights that will be made of one array."""

    groups: list[_Group]
    size: int
    rms: float


def _example() -> dict[str, Any]:
    return two_layer_example(Roast(ratio=0.2, tile=8, min_numel=64))


@register("roast", pillar="compress", contract="method", paper="2207.10702", status="stable", example=_example)
@dataclass(frozen=True)
class Roast(Method):
    """Let all large weights share one small array; the model is then trained, or trained on.

    Parameters
    ----------
    ratio : float, default=0.1
        Numbers of the shared arrays over numbers of the weights that they replace, in (0, 1].
    sharing : {"global", "local"}, default="global"
        One array for all weights, and one for those that are frozen; or one a weight.
    tile : int, default=32
        Side of a tile; where an array is smaller than four tiles, the largest power of two that fits.
    min_numel : int, default=4096
        Weights of fewer numbers stay dense.
    init : {"std", "project"}, default="std"
        "std": fresh random numbers, every weight at the size it has now, to train from scratch.
        "project": what fits the present weights best, to fine-tune.
    signs : bool, default=True
        Whether numbers are read with random signs.
    mode : {"memory", "speed"}, default="memory"
        As in ``quernel.nn.RoastLinear``.
    seed : int, default=0
        Of maps and fresh numbers.

    Notes
    -----
    Train with ``quernel.nn.roast_param_groups(model, lr)``. Tied weights become one view. Depthwise convolutions stay
    dense. Without training the result of either ``init`` is of no use, so the budget search does not try it.
    Differs from the authors' converter: weights start at the size they had (theirs are smaller by sqrt 3), maps are
    repeatable, and nothing is stored a weight.

    References
    ----------
    Desai et al., "Efficient model compression with Random Operation Access Specific Tile (ROAST) hashing",
    arXiv 2207.10702, 2022.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    >>> small = quernel.compress.compress(model, quernel.compress.Roast(ratio=0.05)).model
    >>> sum(p.numel() for p in small.parameters())
    7066
    """

    ratio: float = 0.1
    sharing: Literal["global", "local"] = "global"
    tile: int = 32
    min_numel: int = 4096
    init: Literal["std", "project"] = "std"
    signs: bool = True
    mode: Mode = "memory"
    seed: int = 0

    stage: ClassVar[str] = "lowrank"
    targets: ClassVar[tuple[type[nn.Module], ...]] = _TARGETS

    def __post_init__(self) -> None:
        check_float("ratio", self.ratio, low=0.0, high=1.0, open_low=True)
        check_choice("sharing", self.sharing, ("global", "local"))
        check_int("tile", self.tile, low=1)
        check_int("min_numel", self.min_numel, low=1)
        check_choice("init", self.init, ("std", "project"))
        check_type("signs", self.signs, bool)
        check_choice("mode", self.mode, ("memory", "speed"))
        check_int("seed", self.seed, low=0)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the weights, draw or fit the arrays, and build the layers."""
        plans: dict[str, LayerPlan] = {}
        taken: dict[int, dict[str, nn.Module]] = {}
        selected = context.selected(model, self.targets)
        for name, module in selected:
            reason = self._reason_to_skip(model, name, module, [m for _, m in selected])
            if reason:
                plans[name] = LayerPlan(name, "keep", reason)
            else:
                taken.setdefault(id(module.weight), {})[name] = module
        groups = [_Group(layers, cast(Any, next(iter(layers.values()))).weight) for layers in taken.values()]
        made: dict[str, nn.Module] = {}
        arrays = 0
        for share, child in zip(self._shares(groups), spawn(self.seed, len(groups)), strict=False):
            memory = self._array(share, torch_generator(child), int(child.generate_state(1, "uint64")[0]))
            views = {group: self._view(memory, group, share.rms) for group in share.groups}
            if self.init == "project":
                project(memory, {view: group.weight for group, view in views.items()})
            arrays += unique_bytes(memory)
            for group, view in views.items():
                for name, module in group.layers.items():
                    made[name] = _layer(module, view)
                    plans[name] = LayerPlan(name, f"view of {_described(share)}", details=_details(view, group))
        plans |= {name: plan for name, plan in _unsupported(model, context, self.min_numel) if name not in plans}
        before = unique_bytes(model)
        replaced = sum(group.weight.numel() * group.weight.element_size() for group in groups)
        after = before - replaced + arrays
        summary: dict[str, Scalar] = {"replaced bytes": replaced, "array bytes": arrays, "compression": before / after}
        order = [name for name, _ in model.named_modules() if name in plans]
        return Plan(tuple(plans[n] for n in order), made, summary, self._warnings(context, made, before, after))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the layers in."""
        for name, layer in plan.payload.items():
            replace_module(model, name, layer)

    @staticmethod
    def to_dense(model: nn.Module) -> nn.Module:
        """Return a copy of a model with torch's own layers in place of hashed ones; tied weights stay tied.

        Parameters
        ----------
        model : nn.Module
            Left as it is.

        Notes
        -----
        The padding row of a table that is tied to another layer keeps the numbers that the other layer reads.

        Examples
        --------
        >>> import torch
        >>> from quernel.nn import RoastLinear, SharedArray
        >>> Roast.to_dense(torch.nn.Sequential(RoastLinear(64, 32, memory=SharedArray(1500))))
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
        )
        """
        work = copy.deepcopy(model)
        kinds = RoastLinear | RoastConv2d | RoastEmbedding
        layers = {name: layer for name, layer in work.named_modules() if isinstance(layer, kinds)}
        readers = Counter(layer.weight for layer in layers.values())
        weights: dict[HashedWeight, nn.Parameter] = {}
        for name, layer in layers.items():
            if layer.weight not in weights:
                own = layer.materialize() if readers[layer.weight] == 1 else layer.weight.dense()
                weights[layer.weight] = nn.Parameter(own.detach().clone(), layer.memory.values.requires_grad)
            dense = _dense(layer, weights[layer.weight])
            if not name:
                return dense.train(layer.training)
            replace_module(work, name, dense)
        return work

    def _reason_to_skip(self, model: nn.Module, name: str, module: Any, targets: list[nn.Module]) -> str:
        weight = module.weight
        if not isinstance(weight, nn.Parameter):
            return "its weight is computed from others"
        if weight.numel() < self.min_numel:
            return f"{weight.numel()} numbers are fewer than min_numel={self.min_numel}"
        if isinstance(module, nn.Conv2d) and module.groups > 1 and weight.shape[1] == 1:
            return "depthwise convolutions are small already"
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            return "max_norm and scale_grad_by_freq need rows of their own"
        if not bool(weight.isfinite().all()):
            raise QuernelError(f"{name!r} holds NaN or infinity; repair or exclude the layer")
        holders = [m for m in targets if cast(Any, m).weight is weight]
        if any(isinstance(m, nn.Conv2d) for m in holders) and len(holders) > 1:
            return "its kernel is tied to another layer"
        tied = tied_elsewhere(model, weight, holders)
        return f"its weight is tied to {tied}, which stays dense" if tied else ""

    def _shares(self, groups: list[_Group]) -> Iterator[_Share]:
        """Say which weights share an array, of how many numbers and which root mean square."""
        # A frozen weight must not move with the others: frozen ones have an array of their own.
        kinds = [[g for g in groups if g.weight.requires_grad is trained] for trained in (True, False)]
        for together in filter(None, kinds) if self.sharing == "global" else [[group] for group in groups]:
            numbers = sum(group.weight.numel() for group in together)
            total = sum(group.weight.numel() * group.rms**2 for group in together)
            yield _Share(together, max(1, round(self.ratio * numbers)), (total / numbers) ** 0.5)

    def _array(self, share: _Share, generator: torch.Generator, seed: int) -> SharedArray:
        weights = [group.weight for group in share.groups]
        devices = {weight.device for weight in weights}
        if len(devices) > 1:
            raise QuernelError(
                f"sharing='global' needs all weights on one device; they are on {sorted(map(str, devices))}"
            )
        dtype = weights[0].dtype
        for weight in weights[1:]:
            dtype = torch.promote_types(dtype, weight.dtype)
        bound = 3**0.5 * share.rms
        memory = SharedArray(share.size, seed=seed, bound=bound, dtype=dtype, generator=generator)
        memory.values.requires_grad_(weights[0].requires_grad)
        return memory.to(weights[0].device)

    def _view(self, memory: SharedArray, group: _Group, rms: float) -> HashedWeight:
        scale, shape, size = group.rms / rms, tuple(group.weight.shape), memory.size
        side = self.tile
        while side > 1 and _TILES * side * side > size:
            side = 1 << ((side - 1).bit_length() - 1)
        seed = memory.next_seed()
        if all(isinstance(layer, nn.Embedding) for layer in group.layers.values()):
            table = BlockMap(size, shape[1], min(side, shape[1]), seed, self.signs)
            return HashedBlockWeight(memory, table, shape[0], scale, self.mode)
        tiles = TileMap(size, (shape[0], group.weight[0].numel()), (side, side), seed, self.signs)
        return HashedTileWeight(memory, tiles, scale, self.mode, shape)

    def _warnings(self, context: Context, made: dict[str, nn.Module], before: int, after: int) -> tuple[str, ...]:
        found = []
        if made and after >= before:
            found.append(f"nothing is saved: {before} bytes before, {after} after; lower ratio or min_numel")
        if made and context.finetune is None:
            state = "fresh random numbers" if self.init == "std" else "a rough projection of the trained ones"
            found.append(f"the weights are {state}: train the model, or pass finetune=")
        frozen = [name for name, layer in made.items() if not cast(Any, layer).memory.values.requires_grad]
        if frozen:
            names = ", ".join(frozen[:3]) + (f" and {len(frozen) - 3} more" if len(frozen) > 3 else "")
            found.append(f"frozen weights stay frozen, so nothing trains what they are now: {names}")
        return tuple(found)


def _described(share: _Share) -> str:
    return f"{share.size} shared numbers" if len(share.groups) > 1 else f"{share.size} numbers"


def _details(view: HashedWeight, group: _Group) -> dict[str, Scalar]:
    tile = view.mapped.tile[0] if isinstance(view.mapped, TileMap) else view.mapped.block
    with torch.no_grad():
        target = group.weight.detach()
        error = float((view.dense().to(target.dtype) - target).norm() / target.norm().clamp_min(1e-30))
    return {"tile": tile, "scale": view.scale, "relative weight error": error}


def _layer(module: nn.Module, view: HashedWeight) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return RoastEmbedding.over(view, module.padding_idx)
    weight = check_type("view", view, HashedTileWeight)
    if isinstance(module, nn.Conv2d):
        return RoastConv2d.like(module, cast(HashedTileWeight, weight))
    return RoastLinear.over(cast(HashedTileWeight, weight), cast(Tensor | None, module.bias))


def _dense(layer: RoastLinear | RoastConv2d | RoastEmbedding, weight: nn.Parameter) -> nn.Module:
    """Return torch's layer around a weight."""
    new: nn.Module
    if isinstance(layer, RoastEmbedding):
        new = nn.Embedding(weight.shape[0], weight.shape[1], layer.padding_idx, device="meta")
    else:
        biased = layer.bias is not None
        if isinstance(layer, RoastLinear):
            new = nn.Linear(layer.in_features, layer.out_features, biased, device="meta")
        else:
            plain = layer._plain[0]
            options: dict[str, Any] = {"kernel_size": plain.kernel_size, "stride": plain.stride, "groups": plain.groups}
            options |= {"padding": plain.padding, "dilation": plain.dilation, "padding_mode": plain.padding_mode}
            new = nn.Conv2d(plain.in_channels, plain.out_channels, bias=biased, device="meta", **options)
        new.bias = layer.bias
    new.weight = weight
    return new


def _unsupported(model: nn.Module, context: Context, min_numel: int) -> Iterator[tuple[str, LayerPlan]]:
    """List what holds large tensors of its own and is of a kind that is not read through a map."""
    inserted = [name for name, module in model.named_modules() if is_registered(module)]
    for name, module in model.named_modules():
        own = max((p.numel() for p in module.parameters(recurse=False)), default=0)
        free = name and type(module) not in _TARGETS and context.allows(name) and not is_below(name, inserted)
        if own >= min_numel and free:
            yield name, LayerPlan(name, "keep", f"{type(module).__name__} is not a kind that is read from an array")
