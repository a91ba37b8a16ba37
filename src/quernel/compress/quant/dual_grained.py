"""DGQ: 4-bit weights with integer group scales, int8 activations, one integer product (arXiv 2310.04836).

W[o,k] ~= s1[o] S2[o,G] (q[o,k] - z[o,G]).  Two grid searches on the layer's inputs choose the steps of groups and the
scales of rows, then codes are rounded with error feedback; the few largest channels of the inputs are first divided
down where a norm or an up projection can take it.  Cost: one pass over the data for maxima, one for Gram matrices, then
O(O K^2) a layer (see ``dgq_search``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._module_tree import is_registered
from quernel._registry import register
from quernel._validate import all_finite, check_choice, check_float, check_int, check_type
from quernel.compress._context import Context, is_below, observe_inputs
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.compress.quant._adjacent import activations_after, scale_producer
from quernel.compress.quant._percentile import Smoothing, find_smoothing
from quernel.compress.quant._quantized_linears import example_for, refusal
from quernel.kernels.moments import AbsMax, Gram
from quernel.nn import LowRankLinear, StoredLinear, W4A8Linear, replace_module
from quernel.nn._int4_packing import GROUP_SIZES
from quernel.nn.functional.compensated_rounding import compensate
from quernel.nn.functional.dual_grained import DGQWeight, auto_group_size, check_grid, dgq_search
from quernel.nn.linear.w4a8 import ACTS
from quernel.nn.weights import Int4GroupWeight, ProductWeight

# Gram matrices (float64) kept at a time; more layers are observed in further passes over the data.
GRAM_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class _Payload:
    weights: Mapping[str, Int4GroupWeight | ProductWeight]
    inverses: Mapping[str, Tensor]
    divisors: Mapping[str, Tensor]  # producer -> what its output is divided by
    activations: Mapping[str, tuple[str, str]]  # linear -> (activation module, kind)


def _example() -> dict[str, Any]:
    return example_for(DGQ(min_tokens=32, grid=(5, 10)))


@register("dgq", pillar="compress", contract="method", paper="2310.04836", status="stable", example=_example)
@dataclass(frozen=True)
class DGQ(Method):
    """Run linear layers as 4-bit x int8 products: group-wise scales that cost no speed.

    No retraining; a few thousand unlabelled tokens.  Prefer it where bytes or single-token decoding count; int8
    (``CrossQuant``) loses less and is as fast on long inputs.  Embeddings and convolutions are left to
    ``WeightInt4`` or ``Cast``.

    Parameters
    ----------
    group_size : {"auto", 32, 64, 128}, default="auto"
        Inputs that share an integer scale; "auto" is 32 below 1024 inputs, else 128.
    act : {"token", "static", None}, default="token"
        Step of the int8 activations: from each row as it comes, or one calibrated number a layer.  None leaves
        activations in floating point: fewer bytes, no time won.
    smooth : {"percentile", None}, default="percentile"
        Divide the largest input channels down where the norm or up projection before can take the division, which
        is found and proven by running the model.
    percentile : float, default=99.5
        Channels above it are divided down to it.
    grid : (int, int), default=(20, 80)
        Ratios tried for groups and for rows.
    compensate : bool, default=True
        Let later columns of a weight make up for the rounding of earlier ones, on the same grid of codes (GPTQ).  It
        halves the loss and costs a third of the search; False is the paper's rounding to the nearest code.
    smooth_values : bool, default=False
        Smooth between value and output projections of attention too.
    fuse : bool, default=True
        Compute an activation that alone reads a layer's output inside that layer.
    strict : bool, default=False
        Refuse layers whose inputs are no whole number of groups.
    min_tokens : int, default=128
        Least number of calibration rows; layers that see fewer are left alone.

    Raises
    ------
    QuernelError
        If an argument is out of range; in ``plan`` if the data holds fewer rows than ``min_tokens``, or NaN or
        infinity, or ``strict`` is not met.

    Notes
    -----
    Low-rank layers get both factors in 4 bits, with activations by token.  Every layer is calibrated on the model as it
    was, so codes wait until all are found: an eighth of the model, beside at most 512 MB of Gram matrices (or the
    largest one).  Differs from the authors' code: error
    feedback, which they do not have; errors use all calibration data, not the last batch; ranges include zero; what can
    be smoothed is found by running, not by name.

    References
    ----------
    Zhang et al., "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM", arXiv 2310.04836, 2023.

    Examples
    --------
    >>> import torch, quernel
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(256, 256)).eval(), torch.randn(512, 256)
    >>> result = quernel.compress.compress(model, quernel.compress.DGQ(), data=[x])
    >>> result.report.layers[0].relative_error < 0.12, result.report.bytes_after < 0.16 * result.report.bytes_before
    (True, True)
    """

    group_size: int | Literal["auto"] = "auto"
    act: Literal["token", "static"] | None = "token"
    smooth: Literal["percentile"] | None = "percentile"
    percentile: float = 99.5
    grid: tuple[int, int] = (20, 80)
    compensate: bool = True
    smooth_values: bool = False
    fuse: bool = True
    strict: bool = False
    min_tokens: int = 128

    stage: ClassVar[str] = "quantise"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, LowRankLinear)

    def __post_init__(self) -> None:
        check_choice("group_size", self.group_size, ("auto", *GROUP_SIZES))
        check_choice("act", self.act, ACTS)
        check_choice("smooth", self.smooth, ("percentile", None))
        check_float("percentile", self.percentile, low=0.0, high=100.0, open_low=True)
        check_grid(self.grid)
        for name in ("compensate", "smooth_values", "fuse", "strict"):
            check_type(name, getattr(self, name), bool)
        check_int("min_tokens", self.min_tokens, low=1)

    @property
    def needs(self) -> frozenset[str]:
        """Data: a search on weights alone would not know which errors matter."""
        return frozenset({"data"})

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Return the defaults, and half a bit less."""
        return (cls(), cls(group_size=128))

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Calibrate, smooth, and search the codes of every layer."""
        selected: dict[str, Any] = dict(context.selected(model, self.targets))
        maxima = {name: AbsMax(m.in_features, device=_device(m)) for name, m in selected.items()}
        if maxima:
            observe_inputs(model, context, maxima)
        refused = self._refused(model, selected, maxima)
        chosen = {name: m for name, m in selected.items() if name not in refused}
        plain = {name: maxima[name].value.float() for name, m in chosen.items() if type(m) is nn.Linear}
        smoothing = Smoothing({}, {})
        if self.smooth and plain:
            smoothing = find_smoothing(model, context, plain, self.percentile, mixing=self.smooth_values)
        activations = activations_after(model, context, plain) if self.fuse and plain else {}
        weights: dict[str, Int4GroupWeight | ProductWeight] = {}
        inverses: dict[str, Tensor] = {}
        layers = [LayerPlan(name, "skip", reason) for name, reason in refused.items()]
        action = f"int4 x {'float' if self.act is None else 'int8'}"
        for name, gram in self._grams(model, context, chosen):
            context.tell(f"{type(self).__name__}: {name}", len(weights) / len(chosen))
            details: dict[str, Scalar]
            if name not in plain:
                weights[name], errors = self._factors(name, chosen[name], gram)
                details = {}
            else:
                weight, peak, errors = self._layer(name, chosen[name].weight.detach(), gram, plain[name], smoothing)
                if self.act == "static":
                    inverses[name] = torch.full_like(plain[name], 1 / peak)
                weights[name] = weight
                details = {"group_size": weight.group_size, "bits_per_weight": weight.bits_per_weight}
                details["smoothed_channels"] = int((smoothing.readers.get(name, torch.zeros(1)) > 1).sum())
                details |= {"activation": activations[name][1]} if name in activations else {}
            details |= {"phase_1_error": errors[0], "calibration_error": errors[1]}
            layers.append(LayerPlan(name, action, details=details))
        layers += _not_linear(model, context, selected) if selected else []
        summary: dict[str, Scalar] = {
            "4-bit layers": len(weights),
            "fused activations": len(activations),
            "smoothed layers": len(smoothing.readers),
            "calibration tokens": max((m.count for m in maxima.values()), default=0),
        }
        payload = _Payload(weights, inverses, smoothing.producers, activations)
        return Plan(tuple(layers), payload, summary)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Scale producers, put the layers in, drop absorbed activations."""
        payload: _Payload = plan.payload
        for producer, divisor in payload.divisors.items():
            module = model.get_submodule(producer)
            scale_producer(module, 1.0 / divisor.to(module.get_parameter("weight")))
        for name, weight in payload.weights.items():
            bias = model.get_submodule(name).bias
            if isinstance(weight, ProductWeight):
                new: StoredLinear = StoredLinear(weight, bias)
            else:
                kind = payload.activations[name][1] if name in payload.activations else None
                inverse = payload.inverses.get(name)
                new = W4A8Linear.from_weight(weight, bias, inverse, act=self.act, activation=kind)
            replace_module(model, name, new)
        for absorbed, _ in payload.activations.values():
            replace_module(model, absorbed, nn.Identity())

    def _refused(self, model: nn.Module, selected: Mapping[str, Any], maxima: Mapping[str, AbsMax]) -> dict[str, str]:
        most = max((seen.count for seen in maxima.values()), default=0)
        if 0 < most < self.min_tokens:
            raise QuernelError(
                f"data holds {most} rows, fewer than min_tokens={self.min_tokens}; pass more batches, or lower "
                "min_tokens if the loss may be larger"
            )
        reasons = {}
        for name, module in selected.items():
            count = maxima[name].count
            if isinstance(module, LowRankLinear):
                finite = all_finite(module.weight.a) and all_finite(module.weight.b)
                reason = "" if finite else "its factors hold NaN or infinity"
                reason = reason if count else "the data never reached it"
            else:
                reason = refusal(model, module, count > 0)
            size = _bytes(module, self.group_size)
            if not reason and size[1] >= size[0]:
                reason = f"its {size[0]} bytes would become {size[1]}: rows are padded to 128 values"
            if not reason and count < self.min_tokens:
                reason = f"the data gave it {count} rows, fewer than min_tokens={self.min_tokens}"
            if reason:
                reasons[name] = reason
        return reasons

    def _grams(self, model: nn.Module, context: Context, chosen: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer with ``X^T X`` of its inputs, holding only so many at a time."""
        waiting = list(chosen)
        while waiting:
            batch, room = [waiting[0]], GRAM_BYTES - _gram_bytes(chosen[waiting[0]])
            for name in waiting[1:]:
                room -= _gram_bytes(chosen[name])
                if room < 0:
                    break
                batch.append(name)
            observers = {name: Gram(chosen[name].in_features, device=_device(chosen[name])) for name in batch}
            observe_inputs(model, context, observers)
            for name in batch:
                yield name, observers.pop(name).sum
            waiting = waiting[len(batch) :]

    def _search(self, name: str, weight: Tensor, gram: Tensor) -> DGQWeight:
        size = auto_group_size(weight.shape[1]) if self.group_size == "auto" else self.group_size
        try:
            found = dgq_search(weight, gram, size, self.grid, strict=self.strict)
        except QuernelError as error:
            raise QuernelError(f"layer {name!r}: {error}") from error
        return compensate(weight, gram, found) if self.compensate else found

    def _layer(
        self, name: str, weight: Tensor, gram: Tensor, absmax: Tensor, smoothing: Smoothing
    ) -> tuple[Int4GroupWeight, float, tuple[float, float]]:
        """Return a layer's codes, what its inputs are divided by, and the errors of the search."""
        columns = smoothing.readers.get(name)
        if columns is not None:
            weight, absmax, scale = weight * columns.to(weight), absmax / columns, columns.to(gram)
            gram = gram / (scale[:, None] * scale)
        found = self._search(name, weight, gram)
        divisor = smoothing.producers.get(name, torch.ones(1, device=weight.device))
        # Inputs that are always zero have no range.
        peak = (float(absmax.max()) or 1.0) if self.act == "static" else 1.0
        stored = Int4GroupWeight.from_search(replace(found, s1=found.s1 * peak / divisor.to(found.s1)))
        return stored, peak, found.relative_errors

    def _factors(self, name: str, module: LowRankLinear, gram: Tensor) -> tuple[ProductWeight, tuple[float, float]]:
        """Search the second factor on what the first one, quantised, makes of the inputs."""
        b = self._search(name, module.weight.b.detach(), gram)
        inner = b.dense().to(gram)
        a = self._search(name, module.weight.a.detach(), inner @ gram @ inner.T)
        factors = ProductWeight(Int4GroupWeight.from_search(a), Int4GroupWeight.from_search(b))
        return factors, a.relative_errors


def _bytes(module: Any, group_size: int | Literal["auto"]) -> tuple[int, int]:
    """Return what the weight takes, and what it would take in 4 bits."""
    parts = [module.weight.a, module.weight.b] if isinstance(module, LowRankLinear) else [module.weight]
    sizes = [auto_group_size(w.shape[1]) if group_size == "auto" else group_size for w in parts]
    stored = [Int4GroupWeight(w.shape, size).nbytes for w, size in zip(parts, sizes, strict=True)]
    return sum(w.numel() * w.element_size() for w in parts), sum(stored)


def _not_linear(model: nn.Module, context: Context, selected: Mapping[str, Any]) -> list[LayerPlan]:
    """List what holds matrices but is none of the targets."""
    inserted = tuple(name for name, m in model.named_modules() if name and is_registered(m))
    return [
        LayerPlan(name, "skip", f"{type(m).__name__} is no linear layer; WeightInt4 or Cast may take it")
        for name, m in model.named_modules()
        if name not in selected
        and name not in inserted
        and not is_below(name, inserted)
        and context.allows(name)
        and any(p.ndim > 1 for p in m.parameters(recurse=False))
    ]


def _gram_bytes(module: nn.Module) -> int:
    size: int = module.in_features  # type: ignore[assignment]
    return 8 * size**2


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
