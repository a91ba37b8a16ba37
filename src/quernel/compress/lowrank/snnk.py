"""SNNK: linear -> activation (-> linear) becomes one matrix over fixed random features (arXiv 2310.13225).

f(W x + b) ~= A Phi(x) + c with Phi(x) = m^-1/2 max(G (x - mean), 0): A and c by ridge regression on the layer's own
inputs and outputs, in closed form. A linear layer that alone reads the activation is multiplied into A ("bundling"),
so the hidden width disappears. Stored are (out + 2) m numbers and a few signs with Hadamard-structured directions.
Cost: two passes over the data, rows (m^2 + m out) multiply-adds and one m x m Cholesky factorisation a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import spawn, torch_generator
from quernel._registry import register
from quernel._validate import all_finite, check_choice, check_float, check_int, check_type
from quernel.compress._context import Context, observe_inputs, tied_elsewhere
from quernel.compress._example_models import two_layer_example
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.compress.quant._adjacent import activations_after, sole_readers
from quernel.kernels.features.hadamard import padded_size
from quernel.kernels.features.orthogonal import PROJECTIONS, Projection
from quernel.kernels.moments import Moments
from quernel.kernels.normal_equations import NormalEquations
from quernel.nn import SNNKLinear, replace_module
from quernel.nn.functional.activations import FUSIBLE

# Fewer rows than this times the features, and the fit follows the sample instead of the layer.
_ROWS_A_FEATURE = 2


@dataclass(frozen=True)
class _Chain:
    """A linear layer, the activation that alone reads it, and the linear layer that alone reads that."""

    linear: str
    activation: str
    kind: str
    following: str | None

    @property
    def linears(self) -> tuple[str, ...]:
        """The layers that it replaces."""
        return (self.linear,) if self.following is None else (self.linear, self.following)

    def skipped(self, reason: str) -> dict[str, LayerPlan]:
        """Return the plan of leaving it alone."""
        return {name: LayerPlan(name, "skip", reason) for name in self.linears}


@dataclass(frozen=True)
class _Replacement:
    chain: _Chain
    layer: SNNKLinear


class _Fit:
    """Observer: sums of features and of what the chain makes of the same inputs."""

    def __init__(self, layer: SNNKLinear, linear: nn.Linear, kind: str, following: nn.Linear | None) -> None:
        self.layer, self.linear, self.following, self.activation = layer, linear, following, FUSIBLE[kind]
        self.sums = NormalEquations(layer.n_features, layer.out_features, device=layer.weight.device)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take one batch of inputs in, padding left out."""
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        # forward() and not a call: this runs in a hook of the very layer.
        y = self.activation(self.linear.forward(rows))
        y = y if self.following is None else self.following.forward(y)
        # At least float32, whatever the model computes in: a solve follows.
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.sums.update(self.layer.phi(rows.to(wide)), y.to(wide))


def _example() -> dict[str, Any]:
    return two_layer_example(SNNK(target=0.2))


@register("snnk", pillar="compress", contract="method", paper="2310.13225", status="experimental", example=_example)
@dataclass(frozen=True)
class SNNK(Method):
    """Replace linear layers and their activations by trainable matrices over fixed random features.

    At equal bytes, truncated factors (``WeLore(whiten=True)``) keep more of a trained layer than this does in closed
    form; fine-tuning closes part of the gap. Its strengths are elsewhere: ``quernel.nn.SNNKAdapter`` trains few
    numbers, ``quernel.kernels.BundledClassifier`` fits a whole model without a gradient step.

    Parameters
    ----------
    target : float, default=0.5
        Fraction of the bytes of what is replaced to remove, in [0, 1). Ignored if ``n_features`` is given.
    n_features : int, optional
        Random features m of every replaced layer.
    bundle : bool, default=True
        Also multiply in the linear layer that alone reads the activation.
    projection : {"hadamard", "orthogonal", "gaussian"}, default="hadamard"
        How the fixed directions are drawn; dense ones are stored, in numbers of the input, for every feature.
    alpha : float, default=1e-3
        Regularisation of the fit, relative to the mean variance of the features.
    seed : int, default=0
        Decides the directions.

    Notes
    -----
    Which activation reads which layer alone, and which layer alone reads the activation, is found by running the
    model and proven by perturbing it; layers where that does not hold are left alone, with the reason in the report.

    References
    ----------
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 16))
    >>> result = quernel.compress.compress(model, quernel.compress.SNNK(), data=[torch.randn(1024, 32)])
    >>> [type(layer).__name__ for layer in result.model]
    ['SNNKLinear', 'Identity', 'Identity']
    """

    target: float = 0.5
    n_features: int | None = None
    bundle: bool = True
    projection: Projection = "hadamard"
    alpha: float = 1e-3
    seed: int = 0

    stage: ClassVar[str] = "lowrank"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def __post_init__(self) -> None:
        check_float("target", self.target, low=0.0, high=1.0, open_high=True)
        if self.n_features is not None:
            check_int("n_features", self.n_features, low=1)
        check_type("bundle", self.bundle, bool)
        check_choice("projection", self.projection, PROJECTIONS)
        check_float("alpha", self.alpha, low=0.0)
        check_int("seed", self.seed, low=0)
        # A bundled layer answers for another one: outputs cannot be compared one to one.
        object.__setattr__(self, "keeps_shapes", not self.bundle)

    @property
    def needs(self) -> frozenset[str]:
        """Data: without a fit, random features of a trained weight are a starting point at best."""
        return frozenset({"data"})

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Find the chains, and fit a layer to each."""
        linears = {n: m for n, m in context.selected(model, self.targets) if isinstance(m, nn.Linear)}
        plans: dict[str, LayerPlan] = {}
        for name, linear in linears.items():
            reason = _refusal(model, name, linear)
            if reason:
                plans[name] = LayerPlan(name, "skip", reason)
        free = [name for name in linears if name not in plans]
        chains = self._chains(model, context, free) if free else []
        taken = {name for chain in chains for name in chain.linears}
        for name in free:
            if name not in taken:
                plans[name] = LayerPlan(name, "skip", "no activation alone reads its output")
        layers = self._empty_layers(linears, chains, plans)
        fits = self._fitted(model, context, linears, layers, plans)
        warnings, payload = [], []
        for i, (chain, fit) in enumerate(fits.items()):
            context.tell(f"{type(self).__name__}: {chain.linear}", i / len(fits))
            found, rows = fit.sums.solve(self.alpha), fit.sums.count
            del fit.sums  # the solved layer takes its place
            fit.layer.set_solution(found.weight, found.intercept)
            payload.append(_Replacement(chain, fit.layer))
            details: dict[str, Scalar] = {
                "n_features": fit.layer.n_features,
                "fitted_rows": rows,
                "relative_fit_error": found.relative_error,
            }
            plans[chain.linear] = LayerPlan(
                chain.linear, " + ".join(("snnk", chain.kind, *chain.linears[1:])), details=details
            )
            for name in chain.linears[1:]:
                plans[name] = LayerPlan(name, f"bundled into {chain.linear}")
            if rows < _ROWS_A_FEATURE * fit.layer.n_features:
                warnings.append(
                    f"{chain.linear}: {fit.layer.n_features} features were fitted on {rows} rows; give "
                    "more data, or the layer follows the sample"
                )
        summary: dict[str, Scalar] = {
            "replaced layers": len(payload),
            "random features": sum(made.layer.n_features for made in payload),
        }
        return Plan(tuple(plans[name] for name in linears), tuple(payload), summary, tuple(warnings))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the fitted layers in; the activation and what was bundled become identities."""
        for made in plan.payload:
            for name in (made.chain.activation, made.chain.following):
                if name is not None:
                    replace_module(model, name, nn.Identity())
            replace_module(model, made.chain.linear, made.layer)

    def _chains(self, model: nn.Module, context: Context, free: list[str]) -> list[_Chain]:
        """Return the chains in order, each layer in one of them at most."""
        pairs = activations_after(model, context, free)
        pairs = {name: pair for name, pair in pairs.items() if context.allows(pair[0])}
        activations = [activation for activation, _ in pairs.values()]
        readers = sole_readers(model, context, activations, free) if self.bundle and activations else {}
        chains: list[_Chain] = []
        bundled: set[str] = set()
        for name in free:
            if name in pairs and name not in bundled:
                activation, kind = pairs[name]
                following = readers.get(activation)
                chains.append(_Chain(name, activation, kind, following))
                bundled |= {following} if following else set()
        return chains

    def _empty_layers(
        self, linears: Mapping[str, nn.Linear], chains: list[_Chain], plans: dict[str, LayerPlan]
    ) -> dict[_Chain, SNNKLinear]:
        layers = {}
        for chain, child in zip(chains, spawn(self.seed, len(chains)), strict=True):
            first = linears[chain.linear]
            parts = [linears[name] for name in chain.linears]
            before = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
            size = first.weight.element_size()
            shape = (first.in_features, parts[-1].out_features)
            m = self.n_features or _most_features(shape, size, self.projection, (1 - self.target) * before)
            if m < 1 or _bytes(shape, m, size, self.projection) >= before:
                reason = f"{m} random features would not be smaller than its {before} bytes" if m else "too small"
                plans |= chain.skipped(reason)
                continue
            layers[chain] = SNNKLinear(
                *shape,
                m,
                projection=self.projection,
                activation=chain.kind if chain.following is None else None,
                dtype=first.weight.dtype,
                generator=torch_generator(child),
            ).to(first.weight.device)
        return layers

    def _fitted(
        self,
        model: nn.Module,
        context: Context,
        linears: Mapping[str, nn.Linear],
        layers: Mapping[_Chain, SNNKLinear],
        plans: dict[str, LayerPlan],
    ) -> dict[_Chain, _Fit]:
        """Run the data twice: for the centre of each layer's inputs, and for the sums of the regression."""
        means = {
            chain.linear: Moments(layer.in_features, device=layer.weight.device) for chain, layer in layers.items()
        }
        if not means:
            return {}
        observe_inputs(model, context, means)
        fits: dict[_Chain, _Fit] = {}
        for chain, layer in layers.items():
            if means[chain.linear].count == 0:
                plans |= chain.skipped("the data never reached it")
                continue
            layer.phi.set_center(means[chain.linear].mean)
            following = None if chain.following is None else linears[chain.following]
            fits[chain] = _Fit(layer, linears[chain.linear], chain.kind, following)
        if fits:
            observe_inputs(model, context, {chain.linear: fit for chain, fit in fits.items()})
        return fits


def _refusal(model: nn.Module, name: str, linear: nn.Linear) -> str:
    if not all(all_finite(p) for p in linear.parameters()):
        raise QuernelError(f"{name!r} holds NaN or infinity; repair or exclude the layer")
    for parameter in linear.parameters():
        tied = tied_elsewhere(model, parameter, [linear])
        if tied:
            return f"its weight is tied to {tied}"
    return ""


def _bytes(shape: tuple[int, int], m: int, size: int, projection: str) -> int:
    """Return the stored bytes of a layer of this shape with m features."""
    inputs, outputs = shape
    trained = (m + 1) * outputs * size
    if projection != "hadamard":
        return trained + m * (inputs + 1) * size
    padded = padded_size(inputs)
    return trained + 2 * m * size + -(-m // padded) * 3 * padded


def _most_features(shape: tuple[int, int], size: int, projection: str, allowed: float) -> int:
    low, high = 0, 1
    while _bytes(shape, high, size, projection) <= allowed:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _bytes(shape, middle, size, projection) <= allowed else (low, middle)
    return low
