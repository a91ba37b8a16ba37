"""What all methods of low-rank factors share: find the matrices, choose ranks, factor, and say what was won.

A subclass only chooses ranks.  A matrix whose reduction is too small to pay stays dense and untouched (N-LRC);
the others (LRC) become two thin factors.  Rank reduction and parameter reduction are different numbers: half the
ranks of a square matrix save no parameter.  Every plan gives both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.compress._context import Context
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.compress.lowrank._accounting import Totals
from quernel.compress.lowrank._layers import Layer, find_layers, observe_grams
from quernel.compress.lowrank._ranks import (
    MinRatio,
    RankChoice,
    Shape,
    allowed_parameters,
    is_low_rank,
    saves,
    stored_parameters,
)
from quernel.nn import LowRankLinear, StoredLinear, replace_module
from quernel.nn.weights import DenseWeight, LowRankWeight, StackedWeight

Split = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class LowRankMethod(Method):
    """Base of the methods that factor linear layers; see ``WeLore`` for the fields."""

    target: float = 0.5
    budget: Literal["rank", "params"] = "rank"
    min_ratio: MinRatio = "auto"
    exclude: tuple[str, ...] = ("lm_head", "embed")
    whiten: bool = False
    split: Split | Mapping[str, int] = (("qkv", 3),)

    stage: ClassVar[str] = "lowrank"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def __post_init__(self) -> None:
        check_float("target", self.target, low=0.0, high=1.0, open_high=True)
        check_choice("budget", self.budget, ("rank", "params"))
        if self.min_ratio != "auto":
            if isinstance(self.min_ratio, str):
                raise QuernelError(f'min_ratio must be "auto" or a number in [0, 1); got {self.min_ratio!r}')
            check_float("min_ratio", self.min_ratio, low=0.0, high=1.0, open_high=True)
        check_type("whiten", self.whiten, bool)
        if isinstance(self.exclude, str) or not all(isinstance(part, str) and part for part in self.exclude):
            raise QuernelError(f"exclude must be a sequence of non-empty name parts; got {self.exclude!r}")
        pairs = self.split.items() if isinstance(self.split, Mapping) else self.split
        # Frozen and hashable, whatever the caller or a recipe's JSON wrote.
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "split", tuple((str(name), check_int("split", n, low=2)) for name, n in pairs))

    @property
    def needs(self) -> frozenset[str]:
        """Data if whitened, else nothing."""
        return frozenset({"data"}) if self.whiten else frozenset()

    def config(self) -> dict[str, Any]:
        """Return the JSON-able fields."""
        return super().config() | {"split": dict(self.split)}

    def choose(self, layers: Sequence[Layer], shapes: Sequence[Shape]) -> RankChoice:
        """Return the kept rank of every matrix, in the order of the layers' blocks."""
        raise TypeError(f"{type(self).__name__} must define choose()")

    def factored(self, shape: Shape, rank: int) -> bool:
        """Say whether a matrix of this shape and kept rank is stored as factors."""
        if rank >= min(shape) or not is_low_rank(shape, rank, self.min_ratio):
            return False
        return self.budget == "rank" or saves(shape, rank)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose ranks over the whole model and factor the low-rank components."""
        layers, skipped = find_layers(model, context, self.targets, self.exclude, dict(self.split))
        if self.whiten and layers:
            layers, unseen = observe_grams(model, context, layers)
            skipped += unseen
        if not layers:
            return Plan(tuple(skipped), payload={})
        shapes = [(block.shape[0], block.shape[1]) for layer in layers for block in layer.blocks]
        choice = self.choose(layers, shapes)
        self._check_reached(shapes, choice)
        return self._factor(model, context, layers, skipped, choice)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the factored layers in, at every alias."""
        for name, new in plan.payload.items():
            replace_module(model, name, new)

    def _factor(
        self, model: nn.Module, context: Context, layers: list[Layer], skipped: list[LayerPlan], choice: RankChoice
    ) -> Plan:
        plans, totals = list(skipped), Totals()
        payload: dict[str, nn.Module] = {}
        ranks = iter(choice.ranks)
        for i, layer in enumerate(layers):
            context.tell(f"{type(self).__name__}: {layer.name}", i / len(layers))
            kept = [next(ranks) for _ in layer.blocks]
            flags = [self.factored((b.shape[0], b.shape[1]), k) for b, k in zip(layer.blocks, kept, strict=True)]
            weight = _stored(layer, kept, flags) if any(flags) else None
            details = totals.count(layer, kept, flags, weight) | {"tau": choice.tau}
            action = "keep" if weight is None else "low-rank"
            reason = (
                f"N-LRC: {_share(kept, layer)} of its ranks would go, not more than min_ratio={self.min_ratio}"
                if weight is None
                else ""
            )
            plans.append(LayerPlan(layer.name, action, reason, details))
            plans += [LayerPlan(name, action, f"shares the weight of {layer.name}") for name in layer.names[1:]]
            if weight is not None:
                payload |= {n: _layer_over(weight, m) for n, m in zip(layer.names, layer.modules, strict=True)}
        summary = self._summary(model, choice, totals)
        return Plan(tuple(plans), payload, summary, tuple(self._warnings(layers, totals)))

    def _check_reached(self, shapes: Sequence[Shape], choice: RankChoice) -> None:
        stored = stored_parameters(shapes, choice.ranks, self.min_ratio)
        if self.budget == "params" and stored > allowed_parameters(shapes, self.target):
            most = 1 - stored / sum(m * n for m, n in shapes)
            raise QuernelError(
                f"target={self.target} of the parameters is out of reach with min_ratio={self.min_ratio}: at most "
                f"{most:.4f} can go. Lower min_ratio or target"
            )

    def _summary(self, model: nn.Module, choice: RankChoice, totals: Totals) -> dict[str, Scalar]:
        before = sum(p.numel() for p in model.parameters())
        after = before - totals.weights + totals.weights_stored
        return {
            "budget": self.budget,
            "target": self.target,
            "tau": choice.tau,
            "matrices": totals.matrices,
            "low_rank_matrices": totals.low_rank,
            "rank_reduction_attempted": totals.ranks_cut / totals.ranks,
            "rank_reduction_achieved": totals.ranks_gone / totals.ranks,
            "weight_reduction": totals.weight_reduction,
            "model_parameters_before": before,
            "model_parameters_after": after,
            "model_parameter_reduction": 1 - after / before,
        }

    def _warnings(self, layers: list[Layer], totals: Totals) -> list[str]:
        found = []
        cut = totals.ranks_cut / totals.ranks
        if self.budget == "rank" and abs(totals.ranks_cut - self.target * totals.ranks) > totals.matrices:
            found.append(
                f"target={self.target} of the ranks is out of reach: {cut:.4f} can go, because flat spectra are kept "
                "whole and every matrix keeps a rank"
            )
        if self.target > 0 and not totals.low_rank:
            found.append(
                f"nothing was factored: {cut:.1%} of all ranks would go, but in no matrix more than "
                f"min_ratio={self.min_ratio} allows. Raise target, or count parameters with budget='params'"
            )
        if totals.weight_reduction < 0:
            found.append(
                f"min_ratio={self.min_ratio} factors matrices above break-even: {-totals.weight_reduction:.1%} more "
                'weights are stored than before. Use min_ratio="auto"'
            )
        few = [layer.name for layer in layers if layer.gram is not None and layer.rows < layer.blocks[0].shape[1]]
        if few:
            found.append(
                f"{len(few)} layers (first {few[0]!r}) saw fewer calibration rows than they have inputs; their "
                "whitening rests on the ridge. Pass more data"
            )
        return found


def _stored(layer: Layer, ranks: list[int], flags: list[bool]) -> LowRankWeight | StackedWeight:
    parts = [
        LowRankWeight.from_dense(block, rank, layer.gram)
        if flag
        else DenseWeight.from_dense(block.detach().clone(), str(block.dtype).removeprefix("torch."))
        for block, rank, flag in zip(layer.blocks, ranks, flags, strict=True)
    ]
    weight = parts[0] if len(parts) == 1 else StackedWeight(parts)
    weight.requires_grad_(layer.modules[0].weight.requires_grad)
    return weight


def _layer_over(weight: LowRankWeight | StackedWeight, module: nn.Linear) -> StoredLinear:
    if isinstance(weight, LowRankWeight):
        return LowRankLinear.from_weight(weight, module.bias)
    return StoredLinear(weight, module.bias)


def _share(ranks: list[int], layer: Layer) -> str:
    full = sum(min(block.shape) for block in layer.blocks)
    return f"{(full - sum(ranks)) / full:.0%}"
