"""Depth against width, and learning rates by depth: what the critical point asks of the rest of a design."""

from __future__ import annotations

from dataclasses import dataclass

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.kernels.theory.critical_points import Criticality


@dataclass(frozen=True)
class LayerRate:
    """Relative learning rates of one layer: biases learn at eta ``bias``, weights at eta ``weight`` / fan-in."""

    layer: int
    bias: float
    weight: float


def best_aspect_ratio(nu: float, n_outputs: int) -> float:
    """Return r* = 4 / ((20 + 3 n_outputs) nu), the ratio of depth to width that suits a task.

    An order of magnitude: it comes from an expansion of the mutual information in depth / width, and anything from a
    third of it to three times as much is as good.

    Parameters
    ----------
    nu : float
        ``Criticality.nu``, > 0.
    n_outputs : int
        Outputs of the network, >= 1.

    Examples
    --------
    >>> best_aspect_ratio(5.0, 10)
    0.016
    """
    check_float("nu", nu, low=0.0, open_low=True)
    return 4 / ((20 + 3 * check_int("n_outputs", n_outputs, low=1)) * nu)


def layer_rates(critical: Criticality, depth: int) -> tuple[LayerRate, ...]:
    """Return learning rates at which every layer adds as much to the tangent kernel, whatever the depth.

    1 / L for both, L being the depth; for K* = 0, whose signals and gradients fall with depth by powers,
    (1 / l)^p L^(p - 1) for biases and (L / l)^(p - 1) for weights in layer l, with p = p_perp. These are for gradient
    descent; Adam, which takes out the size of gradients, needs 1 / L alone.

    Parameters
    ----------
    critical : Criticality
        Any class but "none". Without a p_perp (ELU) the rates are 1 / L.
    depth : int
        L, layers with weights, >= 1.

    Returns
    -------
    rates : tuple of LayerRate

    Examples
    --------
    >>> from quernel.kernels.theory import criticality
    >>> [rate.weight for rate in layer_rates(criticality("relu"), 4)]
    [0.25, 0.25, 0.25, 0.25]
    >>> [rate.bias for rate in layer_rates(criticality("tanh"), 4)]
    [1.0, 0.5, 0.333..., 0.25]
    """
    check_int("depth", depth, low=1)
    if critical.C_W is None:
        raise QuernelError(f"activation {critical.activation!r} has no critical initialisation. {critical.note}")
    if critical.K_star == 0.0 and critical.p_perp is not None:
        p = round(critical.p_perp, 9)
        return tuple(
            LayerRate(layer, (1 / layer) ** p * depth ** (p - 1), (depth / layer) ** (p - 1))
            for layer in range(1, depth + 1)
        )
    return tuple(LayerRate(layer, 1 / depth, 1 / depth) for layer in range(1, depth + 1))
