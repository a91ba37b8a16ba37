"""ArchitectureAdvisor: what the effective theory of deep networks says about a design, before any training.

From activation, inputs, outputs and a budget it gives the critical variances, the depth and width that suit each other
(r = depth / width near r*), how far two seeds will differ (about nu r) and learning rates by layer. A model that
exists is read as a chain of its layers with weights and held against the same figures.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.theory.activations import as_activation
from quernel.kernels.theory.critical_points import Criticality, Universality, criticality
from quernel.kernels.theory.scaling import LayerRate, best_aspect_ratio, layer_rates
from quernel.kernels.theory.vertex import four_vertex
from quernel.nn.init.network import ActivationLike, Network, read_network

# r* is an order of magnitude.
_SLACK = 3.0
# Names of layers that are part of attention.
_ATTENTION = ("attention", "attn", "q_proj", "query", "qkv")
# Where an activation has no nu, the growth of V / K^2 over so many layers stands for it.
_LAYERS = 32
# Weights that are so far from critical shrink or blow up a signal twofold over a few layers.
_FAR = 0.1


@dataclass(frozen=True)
class Advice:
    """The diagnosis of a design.

    Parameters
    ----------
    critical : Criticality
        Class, C_W, C_b, K* of the activation.
    depth, width : int
        Layers with weights, and neurons of a hidden layer.
    outputs : int
    parameters : int
        Weights and biases.
    nu : float or None
        Growth of V / K^2 a layer.
    r, r_star : float, float or None
        depth / width, and what suits the outputs: an order of magnitude.
    fluctuation : float or None
        Predicted variance over seeds of K in the last layer, relative to K^2.
    kernels, fluctuations : tuple of float
        K^l and V^l / (width (K^l)^2) by layer; empty in class "none".
    rates : tuple of LayerRate
        Relative learning rates by layer.
    present_C_W : float or None
        Of a model: the median over hidden layers of fan-in times the variance of its weights.
    warnings : tuple of str
    """

    critical: Criticality
    depth: int
    width: int
    outputs: int
    parameters: int
    nu: float | None
    r: float
    r_star: float | None
    fluctuation: float | None
    kernels: tuple[float, ...]
    fluctuations: tuple[float, ...]
    rates: tuple[LayerRate, ...]
    present_C_W: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def r_range(self) -> tuple[float, float] | None:
        """The ratios of depth to width that are as good as r*."""
        return None if self.r_star is None else (self.r_star / _SLACK, self.r_star * _SLACK)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        found = asdict(self)
        point = found.pop("critical")
        point.pop("alternative")
        point["class"] = str(point.pop("cls"))
        return {**point, **found, "r_range": None if self.r_range is None else list(self.r_range)}

    def param_groups(self, model: nn.Module, lr: float, *, optimizer: str = "sgd") -> list[dict[str, Any]]:
        """Return groups for an optimiser with the learning rate of every layer.

        Parameters
        ----------
        model : nn.Module
            As deep as the advice.
        lr : float
            eta. For SGD of order one at any depth and width: weights learn at eta lW / fan-in, biases at eta lb.
        optimizer : {"sgd", "adam"}, default="sgd"
            Adam takes out the size of gradients: every layer then learns at eta / depth.

        Returns
        -------
        groups : list of dict
            Each parameter once; what is no layer of the theory, norms and embeddings, learns at ``lr`` / depth.
        """
        check_float("lr", lr, low=0.0, open_low=True)
        check_choice("optimizer", optimizer, ("sgd", "adam"))
        layers = read_network(model, "linear").layers
        if len(layers) != self.depth:
            raise QuernelError(f"the advice is for {self.depth} layers with weights; the model has {len(layers)}")
        if not self.rates:
            self.critical.variances()
        wanted: dict[int, float] = {}
        for layer, rate in zip(layers, self.rates, strict=True):
            if optimizer == "sgd":
                wanted[id(layer.module.weight)] = rate.weight / layer.fan_in
                wanted[id(layer.module.bias)] = rate.bias
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in model.parameters():
            groups.setdefault(wanted.get(id(parameter), 1 / self.depth), []).append(parameter)
        return [{"params": held, "lr": lr * factor} for factor, held in groups.items()]


@register("deep-learning-theory", pillar="nn", contract="diagnostic", paper="2106.10165", status="experimental")
class ArchitectureAdvisor:
    """Say which initialisation, depth, width and learning rates suit a network, before training it.

    Parameters
    ----------
    n_in, n_out : int
        Inputs and outputs.
    activation : str, callable or nn.Module
        Any elementwise function.
    params : int, optional
        Budget of weights and biases: depth and width are chosen within it, at r = r*.
    width, depth : int, optional
        Instead of ``params``: one of them, and the other is chosen; or both, and they are judged.
    residual : float, optional
        c of skip connections z' = c z + W s(z) + b, in [0, 1).
    input_power : float, default=1.0
        Mean square of the inputs.

    Notes
    -----
    The theory is about fully connected networks without norms, to first order in depth / width. It knows no data:
    r* is an order of magnitude, and a task may want another shape.

    References
    ----------
    Roberts, Yaida and Hanin, "The Principles of Deep Learning Theory", arXiv 2106.10165, 2021.

    Examples
    --------
    >>> advice = ArchitectureAdvisor(64, 10, "relu", params=200_000).suggest()
    >>> str(advice.critical.cls), advice.critical.C_W, advice.r_star
    ('scale-invariant', 2.0, 0.016)
    >>> advice.parameters <= 200_000 and advice.r_range[0] < advice.r < advice.r_range[1]
    True
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        activation: ActivationLike,
        *,
        params: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        residual: float | None = None,
        input_power: float = 1.0,
    ) -> None:
        self.n_in = check_int("n_in", n_in, low=1)
        self.n_out = check_int("n_out", n_out, low=1)
        self.activation = as_activation(activation)
        self.params = None if params is None else check_int("params", params, low=1)
        self.width = None if width is None else check_int("width", width, low=1)
        self.depth = None if depth is None else check_int("depth", depth, low=1)
        self.residual = check_float("residual", residual or 0.0, low=0.0, high=1.0, open_high=True)
        self.input_power = check_float("input_power", input_power, low=0.0, open_low=True)
        if (params is None) == (width is None and depth is None):
            raise QuernelError("give params=, a budget, or width= and depth=, or one of these two")

    def suggest(self) -> Advice:
        """Return the diagnosis, with what was left open chosen at r = r*.

        Raises
        ------
        QuernelError
            If the activation has no critical point and depth or width are open, or the budget is too small.
        """
        critical = criticality(self.activation, residual=self.residual)
        depth, width = self.depth, self.width
        if depth is None or width is None:
            critical.variances()
            nu = self._nu(critical)
            target = best_aspect_ratio(nu, self.n_out)
            if self.params is not None:
                depth, width = self._within(self.params, target)
            elif width is not None:
                depth = max(1, round(target * width))
            elif depth is not None:
                width = max(1, math.ceil(depth / target))
        return self._judge(critical, depth or 1, float(width or 1), self.count(depth or 1, width or 1), ())

    @classmethod
    def diagnose(
        cls,
        model: nn.Module,
        activation: ActivationLike | None = None,
        *,
        example_inputs: Any = None,
        residual: float | None = None,
        input_power: float = 1.0,
    ) -> Advice:
        """Return the diagnosis of a model that exists, read as a chain of its layers with weights.

        Parameters
        ----------
        model : nn.Module
        activation, example_inputs
            As in ``read_network``.
        residual, input_power
            As for the class.

        Returns
        -------
        advice : Advice
            ``width`` is the harmonic mean of the hidden widths: fluctuations add up as 1 / width.
        """
        network = read_network(model, activation, example_inputs=example_inputs)
        first, last = network.layers[0], network.layers[-1]
        act = network.activations[0] if network.activations else as_activation("linear")
        depth = len(network.layers)
        advisor = cls(
            first.width,
            last.outputs,
            act,
            depth=depth,
            width=max(1, round(network.width)),
            residual=residual,
            input_power=input_power,
        )
        critical = criticality(act, residual=advisor.residual)
        parameters = sum(p.numel() for p in model.parameters())
        present = _present(network)
        said = _about(network)
        if present is not None and critical.C_W and abs(present / critical.C_W - 1) > _FAR:
            said += (f"hidden weights stand at C_W = {present:.3g}, critical is {critical.C_W:.3g} (before training)",)
        return advisor._judge(critical, depth, network.width, parameters, said, present)

    def count(self, depth: int, width: int) -> int:
        """Return the weights and biases of a network of this shape."""
        if depth == 1:
            return (self.n_in + 1) * self.n_out
        return (self.n_in + 1) * width + (depth - 2) * (width + 1) * width + (width + 1) * self.n_out

    def widest(self, params: int, depth: int) -> int:
        """Return the largest width that a budget of weights and biases has at a depth >= 2; 0 where it has none."""
        # (depth - 2) n^2 + (n_in + n_out + depth - 1) n + n_out <= params
        a, b, c = depth - 2, self.n_in + self.n_out + depth - 1, self.n_out - params
        return max(0, math.floor(-c / b if a == 0 else (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)))

    def _within(self, params: int, target: float) -> tuple[int, int]:
        """Return the depth and width within a budget whose ratio is nearest to the target; the ratio grows by depth."""
        best: tuple[float, int, int] | None = None
        for depth in range(2, params + 2):
            width = self.widest(params, depth)
            if width < 1:
                break
            miss = abs(math.log(depth / width / target))
            if best is not None and miss > best[0]:
                break
            best = (miss, depth, width)
        if best is None:
            raise QuernelError(f"params={params} is too few for a hidden layer between {self.n_in} and {self.n_out}")
        return best[1], best[2]

    def _nu(self, critical: Criticality) -> float:
        if critical.nu is not None:
            return critical.nu
        weight, bias = critical.variances()
        found = four_vertex(
            critical.first_kernel(self.input_power), _LAYERS, weight, bias, self.activation, residual=self.residual
        )
        return float(found.relative[-1]) / (_LAYERS - 1)

    def _judge(
        self,
        critical: Criticality,
        depth: int,
        width: float,
        parameters: int,
        said: tuple[str, ...],
        present: float | None = None,
    ) -> Advice:
        r = depth / width
        shape: dict[str, Any] = {"depth": depth, "width": max(1, round(width)), "outputs": self.n_out, "r": r}
        shape["parameters"] = parameters
        if critical.C_W is None:
            warnings = (f"{critical.activation}: {critical.note}", *said)
            empty: dict[str, Any] = {"kernels": (), "fluctuations": (), "rates": (), "nu": None, "r_star": None}
            return Advice(critical, **shape, **empty, fluctuation=None, present_C_W=present, warnings=warnings)
        nu = self._nu(critical)
        target = best_aspect_ratio(nu, self.n_out)
        kernels, spread = self._by_layer(critical, depth, width)
        return Advice(
            critical,
            **shape,
            nu=nu,
            r_star=target,
            fluctuation=spread[-1],
            kernels=kernels,
            fluctuations=spread,
            rates=layer_rates(critical, depth),
            present_C_W=present,
            warnings=(*said, *_about_shape(critical, depth, r, nu, target)),
        )

    def _by_layer(self, critical: Criticality, depth: int, width: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        weight, bias = critical.variances()
        start, plain = critical.first_kernel(self.input_power), critical.residual == 0
        if plain and critical.cls in (Universality.SCALE_INVARIANT, Universality.HALF_STABLE):
            whole = max(1, round(width))
            return (start,) * depth, tuple(critical.fluctuation(layer, whole) for layer in range(1, depth + 1))
        found = four_vertex(start, depth, weight, bias, self.activation, residual=self.residual)
        return tuple(found.kernel.tolist()), tuple((found.relative / width).tolist())


def _present(network: Network) -> float | None:
    """Return the median over hidden layers of fan-in times the variance of the weights."""
    weights: list[Any] = [layer.module.weight for layer in network.layers[1:-1]]
    with torch.no_grad():
        held = [float(w.float().var()) * layer.fan_in for w, layer in zip(weights, network.layers[1:], strict=False)]
    return statistics.median(held) if held else None


def _about_shape(critical: Criticality, depth: int, r: float, nu: float, target: float) -> tuple[str, ...]:
    said = []
    if nu * r >= 1:
        said.append(f"r = {r:.2g} is above 1 / nu = {1 / nu:.2g}: seeds differ by as much as the signal itself")
    elif r > _SLACK * target and depth > 1:
        said.append(f"deeper for its width than suits: r = {r:.2g}, r* = {target:.2g}")
    elif r < target / _SLACK:
        said.append(f"wider for its depth than suits: r = {r:.2g}, r* = {target:.2g}")
    if critical.nu is None:
        said.append(f"{critical.activation}: {critical.note} nu is the growth over {_LAYERS} layers")
    if critical.K_star:
        said.append(critical.note)
    return tuple(said)


def _about(network: Network) -> tuple[str, ...]:
    """Say what of a model lies outside of the theory."""
    said = []
    if any(word in layer.name.lower() for layer in network.layers for word in _ATTENTION):
        said.append(
            "attention is outside of the theory: depth, r, r* and rates are those of a plain chain of "
            f"{len(network.layers)} layers. Query, key and value stand side by side: each counts as a layer"
        )
    convolutions = sum("Conv" in layer.kind for layer in network.layers)
    if convolutions:
        said.append(f"{convolutions} convolutions: channels count as width; places share weights, the theory has none")
    for (reason, kind), count in Counter((s.reason, s.kind) for s in network.skipped).items():
        said.append(f"{count} {kind} left out: {reason}")
    if len(network.activations) > 1:
        names = ", ".join(sorted({act.name for act in network.activations}))
        said.append(f"several activations ({names}): figures are those of {network.activations[0].name}")
    return tuple(said)
