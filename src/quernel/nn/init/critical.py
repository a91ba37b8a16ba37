"""``critical_init_``: draw the weights of a network at the critical point of its activation.

Weights are Gaussian with variance C_W / fan-in, biases with variance C_b: then neither signals nor gradients grow or
vanish by a factor a layer, however deep the network is. The first layer is scaled so that K^1 = K* where K* > 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_float, check_type
from quernel.kernels.gaussian_averages import gaussian_average
from quernel.kernels.theory.critical_points import Criticality, Universality, criticality
from quernel.kernels.theory.recursions import kernel_recursion
from quernel.nn.init.network import ActivationLike, Network, SkippedLayer, WeightLayer, read_network

_AVERAGE_POOLS = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)


@dataclass(frozen=True)
class LayerInit:
    """What one layer was drawn from: normal distributions of these standard deviations.

    ``bias_std`` is None where there is no bias, or a frozen one.
    """

    name: str
    kind: str
    fan_in: int
    weight_std: float
    bias_std: float | None


@dataclass(frozen=True)
class InitReport:
    """What ``critical_init_`` did.

    Parameters
    ----------
    critical : Criticality
        The critical point of the first activation.
    layers : tuple of LayerInit
        In the order of the model.
    skipped : tuple of SkippedLayer
        Modules with parameters that were left as they are, and why.
    warnings : tuple of str
        What the user should know before relying on the theory.
    """

    critical: Criticality
    layers: tuple[LayerInit, ...]
    skipped: tuple[SkippedLayer, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@torch.no_grad()
def critical_init_(
    module: nn.Module,
    activation: ActivationLike | None = "auto",
    residual: float = 0.0,
    *,
    input_power: float = 1.0,
    output_power: float | None = None,
    generator: torch.Generator | None = None,
) -> InitReport:
    """Initialise the linear layers and convolutions of a network at criticality, in place.

    Parameters
    ----------
    module : nn.Module
        Its layers form a chain in the order of registration, as in ``nn.Sequential``.
    activation : str, callable, nn.Module, "auto" or None, default="auto"
        Between all layers; "auto" and None find the activation modules, and take for each layer the one before it.
    residual : float, default=0.0
        c of skip connections z' = c z + W s(z) + b around all layers but the first and the last, in [0, 1). The model
        must scale its skip connections by it.
    input_power : float, default=1.0
        Mean square |x|^2 / n_0 of the inputs; 1 for standardised ones.
    output_power : float, optional
        Variance that the outputs are to have, e.g. 1 for logits; None leaves the last layer critical as the others.
    generator : torch.Generator, optional
        torch's default generator without it.

    Returns
    -------
    report : InitReport

    Raises
    ------
    QuernelError
        If an activation has no critical point (sigmoid), none is found, or an argument is out of range.

    Notes
    -----
    Convolutions have a fan-in of in_channels / groups times the kernel's places. Norms, embeddings, attention, layers
    of other kinds and frozen ones are left as they are, with a note. Time: that of drawing the weights, and some
    milliseconds for an activation that is not known by name.

    References
    ----------
    Roberts, Yaida and Hanin, "The Principles of Deep Learning Theory", arXiv 2106.10165, 2021, chapter 5.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> report = critical_init_(net)
    >>> report.critical.C_W, round(report.layers[1].weight_std ** 2 * 64, 6)
    (2.0, 2.0)
    """
    check_float("residual", residual, low=0.0, high=1.0, open_high=True)
    check_float("input_power", input_power, low=0.0, open_low=True)
    if output_power is not None:
        check_float("output_power", output_power, low=0.0, open_low=True)
    if generator is not None:
        check_type("generator", generator, torch.Generator)
    network = read_network(module, activation)
    if not network.activations:
        # One layer: a linear map, to which no activation belongs.
        network = read_network(module, "linear")
    plain = {act: criticality(act) for act in network.activations}
    inner = {act: criticality(act, residual=residual) for act in network.activations}
    for critical in plain.values():
        critical.variances()
    last = len(network.layers) - 1
    first = plain[network.activations[0]]
    drawn: list[LayerInit] = []
    frozen: list[SkippedLayer] = []
    for i, layer in enumerate(network.layers):
        if not layer.module.weight.requires_grad:
            frozen.append(SkippedLayer(layer.name, layer.kind, "it is frozen: requires_grad is False"))
            continue
        act = layer.activation or network.activations[0]
        weight, bias = (inner if 0 < i < last else plain)[act].variances()
        if i == 0 and first.K_star:
            weight = (first.K_star - bias) / input_power
        if i == last and output_power is not None:
            signal = _signal(network, first, residual, input_power) if i else input_power
            weight, bias = output_power / signal, 0.0
        drawn.append(_draw(layer, weight, bias, generator))
    warnings = (*_warnings(network, list(plain.values()), output_power), *_unaccounted(module))
    return InitReport(inner[network.activations[0]], tuple(drawn), (*network.skipped, *frozen), warnings)


def _signal(network: Network, first: Criticality, residual: float, input_power: float) -> float:
    """Return <s^2> before the last layer, by the recursion of the last layer's activation."""
    act = network.layers[-1].activation or network.activations[0]
    weight, bias = criticality(act, residual=residual).variances()
    start = first.first_kernel(input_power)
    depth = len(network.layers) - 1
    # The recursion begins at K^1 itself: a first layer that adds nothing.
    kernel = kernel_recursion((start - bias) / weight, depth, weight, bias, act, residual=residual)[-1]
    return float(gaussian_average(lambda z: act(z).square(), kernel, act.kinks))


def _draw(layer: WeightLayer, weight: float, bias: float, generator: torch.Generator | None) -> LayerInit:
    module = layer.module
    held, offset = module.weight, module.bias
    if not isinstance(held, Tensor) or not held.is_floating_point():
        raise QuernelError(f"{layer.name}: weight must be floating point to be initialised")
    std, shift = (weight / layer.fan_in) ** 0.5, bias**0.5
    held.normal_(0.0, std, generator=generator)
    if not isinstance(offset, Tensor) or not offset.requires_grad:
        return LayerInit(layer.name, layer.kind, layer.fan_in, std, None)
    offset.normal_(0.0, shift, generator=generator) if shift else offset.zero_()
    return LayerInit(layer.name, layer.kind, layer.fan_in, std, shift)


def _unaccounted(module: nn.Module) -> list[str]:
    """Say which modules without parameters change the scale of signals on their way."""
    said = []
    rates = [m.p for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and 0 < m.p < 1]
    if rates:
        said.append(
            f"{len(rates)} dropouts are not accounted for: in training each makes K up to {1 / (1 - max(rates)):.3g} "
            "times as large"
        )
    pools = sum(isinstance(m, _AVERAGE_POOLS) for m in module.modules())
    if pools:
        said.append(f"{pools} average poolings are not accounted for: each makes K smaller")
    return said


def _warnings(network: Network, points: list[Criticality], output_power: float | None) -> tuple[str, ...]:
    said = []
    if len(points) > 1:
        names = ", ".join(point.activation for point in points)
        said.append(f"several activations ({names}): each layer takes the critical point of the one before it")
    wants = any(point.cls is Universality.HALF_STABLE and point.C_b for point in points)
    without = [layer.name for layer in network.layers if layer.module.bias is None]
    if wants and without:
        said.append(f"{len(without)} layers have no bias, which {points[0].activation} needs (C_b > 0)")
    if any("norm" in skipped.kind.lower() for skipped in network.skipped):
        said.append("norms set K to 1 behind them: the critical point holds between norms only")
    first, last = (network.layers[i].module.weight.requires_grad for i in (0, -1))
    if not first and points[0].K_star:
        said.append(f"the first layer is frozen: whether signals start at K* = {points[0].K_star:.3g} is up to it")
    if not last and output_power is not None:
        said.append("the last layer is frozen: outputs keep the variance that it gives them, not output_power")
    if output_power is None and points[0].K_star:
        said.append(f"outputs have the variance K* = {points[0].K_star:.3g}; output_power=1.0 makes it 1")
    return tuple(said)
