"""What int8 activation methods share: calibrate, choose a scale a channel, fold, fuse, and put int8 layers in.

For Y = X W^T any positive channel scale s can move from the activations to the weight, Y = (X / s)(s W)^T.
The division is folded into the producer where a norm or linear feeds nothing else, else done inside the int8
layer's quantise pass. A subclass only chooses s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import all_finite, check_choice, check_float, check_int, check_type
from quernel.compress._context import Context, observe_inputs, tied_elsewhere
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.compress.cast import Cast
from quernel.compress.quant._adjacent import activations_after, scalable_producers, scale_producer
from quernel.compress.quant._calibration import Calibration
from quernel.nn import CrossQuantLinear, replace_module


@dataclass(frozen=True)
class Decision:
    """What will be done to one linear layer."""

    scale: Tensor  # (in_features,): x is divided by it, W multiplied
    folded: bool = False
    activation: str | None = None


@dataclass(frozen=True)
class _Payload:
    decisions: dict[str, Decision]
    folds: dict[str, Tensor]  # producer -> scale its output is divided by
    absorbed: tuple[str, ...]  # activation modules that become identities
    rest: Plan  # how everything else is cast


@dataclass(frozen=True)
class QuantizedLinears(Method):
    """Base of the int8 x int8 methods; see ``CrossQuant`` for the fields."""

    wbits: int = 8
    abits: int = 8
    mode: Literal["static", "fold", "dynamic"] = "static"
    percentile: float = 100.0
    activations: Literal["bfloat16", "keep"] = "bfloat16"
    fuse: bool = True

    stage: ClassVar[str] = "quantise"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def __post_init__(self) -> None:
        check_choice("wbits", self.wbits, (4, 8))
        check_int("abits", self.abits, low=4, high=8)
        check_choice("mode", self.mode, ("static", "fold", "dynamic"))
        if self.mode == "dynamic" and self.wbits != 8:
            raise QuernelError(
                f'mode="dynamic" needs wbits=8; got {self.wbits}. Use mode="static" or "fold" with 4 bits'
            )
        check_float("percentile", self.percentile, low=0.0, high=100.0, open_low=True)
        check_choice("activations", self.activations, ("bfloat16", "keep"))
        check_type("fuse", self.fuse, bool)

    @property
    def needs(self) -> frozenset[str]:
        """Data: the channel scales must be known before inference."""
        return frozenset({"data"})

    def choose(self, weight: Tensor, stats: Calibration) -> tuple[Tensor, Mapping[str, Scalar]]:
        """Return the channel scale, shape (in_features,), and what the report should say about it."""
        raise TypeError(f"{type(self).__name__} must define choose()")

    def layer(self, linear: nn.Linear, decision: Decision, details: Mapping[str, Scalar]) -> nn.Module:
        """Return the quantised layer; its activation is fused where ``decision`` says so."""
        scale = torch.ones_like(decision.scale) if decision.folded else decision.scale
        return CrossQuantLinear.from_scale(
            linear, scale, wbits=self.wbits, abits=self.abits, activation=decision.activation, **self.row_step(details)
        )

    def row_step(self, details: Mapping[str, Scalar]) -> dict[str, Any]:
        """Return the layer's options of the row step."""
        return {}

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Calibrate all linear layers, choose their scales, and find what can be folded and fused."""
        selected = {n: m for n, m in context.selected(model, self.targets) if isinstance(m, nn.Linear)}
        stats = {name: Calibration(m.in_features, self.percentile) for name, m in selected.items()}
        if stats:
            observe_inputs(model, context, stats)
        layers: dict[str, LayerPlan] = {}
        decisions: dict[str, Decision] = {}
        for i, (name, module) in enumerate(selected.items()):
            context.tell(f"{type(self).__name__}: {name}", i / len(selected))
            reason = refusal(model, module, stats[name].seen)
            if reason:
                layers[name] = LayerPlan(name, "skip", reason)
                continue
            scale, details = self.choose(module.weight.detach().float(), stats[name])
            decisions[name] = Decision(scale)
            layers[name] = LayerPlan(name, f"int{self.wbits} x int{self.abits}", details=details)
        folds = self._fold(model, context, decisions, stats) if self.mode == "fold" and decisions else {}
        absorbed = self._fuse(model, context, decisions) if self.fuse and decisions else ()
        for name, decision in decisions.items():
            extra: dict[str, Scalar] = {"folded": decision.folded} if self.mode == "fold" else {}
            extra |= {"activation": decision.activation} if decision.activation else {}
            old = layers[name]
            layers[name] = LayerPlan(name, old.action, details={**old.details, **extra})
        unfolded = sum(not d.folded for d in decisions.values())
        summary: dict[str, Scalar] = {f"int{self.wbits} layers": len(decisions), "fused activations": len(absorbed)}
        if self.mode == "fold":
            summary |= {"folded layers": len(decisions) - unfolded, "divided at run time": unfolded}
        rest = self._rest(model, context, decisions, absorbed)
        plans = (*layers.values(), *(layer for layer in rest.layers if layer.name not in layers))
        return Plan(plans, _Payload(decisions, folds, absorbed, rest), summary)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Scale producers, convert the layers one by one, drop absorbed activations, cast the rest."""
        payload: _Payload = plan.payload
        for producer, scale in payload.folds.items():
            module = model.get_submodule(producer)
            scale_producer(module, 1.0 / scale.to(module.weight))  # type: ignore[arg-type]
        details = {layer.name: layer.details for layer in plan.layers}
        for name, decision in payload.decisions.items():
            linear = model.get_submodule(name)
            if decision.folded:
                with torch.no_grad():
                    linear.weight.mul_(decision.scale.to(linear.weight))  # type: ignore[operator, arg-type]
            replace_module(model, name, self.layer(linear, decision, details[name]))  # type: ignore[arg-type]
        for name in payload.absorbed:
            replace_module(model, name, nn.Identity())
        if payload.rest.layers:
            Cast(self.activations).apply(model, payload.rest)

    def _fold(
        self, model: nn.Module, context: Context, decisions: dict[str, Decision], stats: Mapping[str, Calibration]
    ) -> dict[str, Tensor]:
        folds = {}
        for producer, readers in scalable_producers(model, context, decisions).items():
            if not context.allows(producer):
                continue
            # Readers of one output must share one scale; the largest keeps each inside its own range.
            shared = torch.stack([decisions[name].scale for name in readers]).amax(dim=0)
            folds[producer] = shared
            for name in readers:
                decisions[name] = Decision(shared, folded=True)
        return folds

    def _rest(
        self, model: nn.Module, context: Context, decisions: Mapping[str, Decision], absorbed: tuple[str, ...]
    ) -> Plan:
        """Plan the cast of what is neither quantised nor absorbed."""
        if self.activations == "keep" or not decisions:
            return Plan(())
        plan = Cast(self.activations).plan(model, context)
        taken = {*decisions, *absorbed}
        return replace(plan, layers=tuple(layer for layer in plan.layers if layer.name not in taken))

    def _fuse(self, model: nn.Module, context: Context, decisions: dict[str, Decision]) -> tuple[str, ...]:
        pairs = activations_after(model, context, decisions)
        for name, (_, kind) in pairs.items():
            decisions[name] = Decision(decisions[name].scale, decisions[name].folded, kind)
        return tuple(module for module, _ in pairs.values())


def refusal(model: nn.Module, module: nn.Linear, seen: bool) -> str:
    """Return why a layer cannot be quantised, or an empty string."""
    if not seen:
        return "the data never reached it"
    if not all_finite(module.weight):
        return "its weight holds NaN or infinity"
    tied = tied_elsewhere(model, module.weight, [module])
    # A quantised copy beside the tied original would add bytes.
    return f"its weight is tied to {tied}" if tied else ""


def example_for(method: Method) -> dict[str, Any]:
    """Return what the conformance suite needs: a small norm-linear-GELU-linear model and data with an outlier."""

    def model() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()

    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(16, 32, generator=generator) for _ in range(3)]
    for x in data:
        x[:, 3] *= 30
    return {"method": method, "model": model, "data": data, "example_inputs": (data[0],)}
