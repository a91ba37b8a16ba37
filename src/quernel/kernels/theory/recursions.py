"""Infinite width: the kernel of preactivations and the tangent kernel, layer by layer, for one input or several.

    K^1 = C_b + C_W G,    K^(l+1) = c^2 K^l + C_b + C_W <s s>_(K^l),                    G = x.x' / n_0
    Theta^1 = lb + lW G,  Theta^(l+1) = lb + lW <s s>_(K^l) + (c^2 + C_W <s' s'>_(K^l)) Theta^l

c is the share of a skip connection z' = c z + W s(z) + b, 0 without one. Pairs of inputs are averaged by quadrature in
two variables; scale-invariant activations have closed forms (arc-cosine kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int
from quernel.kernels.gaussian_averages import gaussian_product_average
from quernel.kernels.layer_maps import layer_map
from quernel.kernels.theory.activations import Activation, Function, as_activation
from quernel.kernels.theory.averages import averages, mean_slope_square, mean_square

# Gram matrices may be off symmetry by rounding in float32.
_SYMMETRY = 1e-5


@dataclass(frozen=True, eq=False)
class TangentKernel:
    """Kernel and tangent kernel by layer; index 0 is layer 1.

    Parameters
    ----------
    kernel, ntk : Tensor, shape (depth, *gram.shape), float64
    """

    kernel: Tensor
    ntk: Tensor


def kernel_recursion(
    x_gram: Tensor | float,
    depth: int,
    C_W: float,
    C_b: float,
    activation: str | Function | nn.Module | Activation,
    *,
    residual: float = 0.0,
) -> Tensor:
    """Return the kernel of preactivations at infinite width, by layer.

    Parameters
    ----------
    x_gram : Tensor, shape (n, n), (n,) or (); or float
        Mean products x.x' / n_0 of inputs. A vector or a number holds mean squares alone, each an input by itself.
    depth : int
        Layers with weights, >= 1.
    C_W, C_b : float
        Variances: of a weight times its fan-in, and of a bias; >= 0.
    activation : str, callable or nn.Module
    residual : float, default=0.0
        c of z' = c z + W s(z) + b, in [0, 1); layer 1 has no skip connection.

    Returns
    -------
    kernel : Tensor, shape (depth, *x_gram.shape), float64
        ``kernel[l - 1]`` is K^l: variances of preactivations, and covariances between inputs.

    Raises
    ------
    QuernelError
        If an argument is out of range or the Gram matrix is not symmetric with a diagonal >= 0.

    Notes
    -----
    Time depth x n^2 averages, 11,520 evaluations each (for kinks away from 0 some 50,000; closed forms where the
    activation is scale-invariant).

    References
    ----------
    Roberts, Yaida and Hanin, "The Principles of Deep Learning Theory", arXiv 2106.10165, 2021, chapters 4 and 5.

    Examples
    --------
    >>> kernel_recursion(1.0, 3, 2.0, 0.0, "relu").tolist()
    [2.0, 2.0, 2.0]
    """
    gram, act = _checked(x_gram, depth, C_W, C_b, activation, residual)
    kernels = [C_b + C_W * gram]
    for _ in range(depth - 1):
        last = kernels[-1]
        kernels.append(residual**2 * last + C_b + C_W * products(act, last))
    return torch.stack(kernels)


def ntk_recursion(
    x_gram: Tensor | float,
    depth: int,
    C_W: float,
    C_b: float,
    activation: str | Function | nn.Module | Activation,
    lb: float | Sequence[float] = 1.0,
    lW: float | Sequence[float] = 1.0,
    *,
    residual: float = 0.0,
) -> TangentKernel:
    """Return kernel and neural tangent kernel at infinite width, by layer.

    Parameters
    ----------
    x_gram, depth, C_W, C_b, activation, residual
        As in ``kernel_recursion``.
    lb, lW : float or sequence of ``depth`` floats, default=1.0
        Relative learning rates by layer: biases learn at eta lb, weights at eta lW / fan-in.

    Returns
    -------
    recursion : TangentKernel
        ``ntk[l - 1]`` is Theta^l: how fast outputs of layer l move under gradient descent, by pairs of inputs.

    Raises
    ------
    QuernelError
        As ``kernel_recursion``; if a sequence of rates does not have one a layer.

    References
    ----------
    Roberts, Yaida and Hanin, arXiv 2106.10165, chapters 8 and 9.

    Examples
    --------
    >>> ntk_recursion(1.0, 3, 2.0, 0.0, "relu", lb=0.0, lW=1.0).ntk.tolist()
    [1.0, 2.0, 3.0]
    """
    gram, act = _checked(x_gram, depth, C_W, C_b, activation, residual)
    bias, weight = _rates("lb", lb, depth), _rates("lW", lW, depth)
    kernels, tangents = [C_b + C_W * gram], [bias[0] + weight[0] * gram]
    for layer in range(1, depth):
        last = kernels[-1]
        signal, back = products(act, last), slope_products(act, last)
        kernels.append(residual**2 * last + C_b + C_W * signal)
        tangents.append(bias[layer] + weight[layer] * signal + (residual**2 + C_W * back) * tangents[-1])
    return TangentKernel(torch.stack(kernels), torch.stack(tangents))


def susceptibilities(
    kernel: Tensor | float, C_W: float, activation: str | Function | nn.Module | Activation, *, residual: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return chi_par and chi_perp at K: by how much a layer multiplies small changes of length, and of angle.

    Parameters
    ----------
    kernel : Tensor of any shape, or float
        K > 0.
    C_W, activation, residual
        As in ``kernel_recursion``.

    Returns
    -------
    chi_par, chi_perp : Tensor, shape of ``kernel``, float64
        c^2 + C_W d<s^2>/dK and c^2 + C_W <s'^2>. Both are 1 where a network is critical; above 1 gradients explode
        with depth, below 1 they vanish, exponentially.

    Examples
    --------
    >>> [round(float(chi), 6) for chi in susceptibilities(1.0, 2.0, "relu")]
    [1.0, 1.0]
    """
    act = as_activation(activation)
    k = torch.as_tensor(kernel, dtype=torch.float64)
    if not bool((k > 0).all()):
        raise QuernelError("kernel must be > 0 and not NaN")
    c = check_float("residual", residual, low=0.0, high=1.0, open_high=True)
    found = averages(act, k)
    return c**2 + C_W * found.square_slope, c**2 + C_W * found.slope_square


def products(act: Activation, kernel: Tensor) -> Tensor:
    """Return <s s>: of every pair for a matrix, of each input with itself otherwise."""
    if kernel.ndim < 2:
        return mean_square(act, kernel)
    if act.slopes is not None:
        return layer_map(act)[0](kernel, kernel.diagonal(), kernel.diagonal())
    return _pairs(act, act, kernel, mean_square(act, kernel.diagonal()))


def slope_products(act: Activation, kernel: Tensor) -> Tensor:
    """Return <s' s'>: of every pair for a matrix, of each input with itself otherwise."""
    if kernel.ndim < 2:
        return mean_slope_square(act, kernel)
    if act.slopes is not None:
        return layer_map(act)[1](kernel, kernel.diagonal(), kernel.diagonal())
    return _pairs(act, act.slope, kernel, mean_slope_square(act, kernel.diagonal()))


def _pairs(act: Activation, f: Function, kernel: Tensor, diagonal: Tensor) -> Tensor:
    """Average f(u) f(v) over the pairs above the diagonal, which one variable gives more exactly."""
    n = len(kernel)
    i, j = torch.triu_indices(n, n, offset=1)
    lengths = kernel.diagonal()
    above = gaussian_product_average(f, f, lengths[i], lengths[j], kernel[i, j], act.kinks)
    whole = torch.diag(diagonal)
    whole[i, j] = above
    whole[j, i] = above
    return whole


def _checked(
    x_gram: Tensor | float, depth: int, C_W: float, C_b: float, activation: object, residual: float
) -> tuple[Tensor, Activation]:
    check_int("depth", depth, low=1)
    check_float("C_W", C_W, low=0.0)
    check_float("C_b", C_b, low=0.0)
    check_float("residual", residual, low=0.0, high=1.0, open_high=True)
    gram = torch.as_tensor(x_gram, dtype=torch.float64).detach()
    check_finite("x_gram", gram)
    if gram.ndim > 2 or (gram.ndim == 2 and gram.shape[0] != gram.shape[1]):
        raise QuernelError(f"x_gram must be a number, or have the shape (n,) or (n, n); got {tuple(gram.shape)}")
    squares = gram.diagonal() if gram.ndim == 2 else gram
    if not bool((squares >= 0).all()):
        raise QuernelError("x_gram must hold mean squares >= 0 (on its diagonal, where it is a matrix)")
    if gram.ndim == 2:
        if bool(((gram - gram.T).abs() > _SYMMETRY * (1 + gram.abs())).any()):
            raise QuernelError("x_gram must be symmetric: the mean products x.x' / n_0 of inputs with each other")
        gram = (gram + gram.T) / 2
    return gram, as_activation(activation)  # type: ignore[arg-type]


def _rates(name: str, rates: float | Sequence[float], depth: int) -> list[float]:
    held = list(rates) if isinstance(rates, Sequence) else [rates] * depth
    if len(held) != depth:
        raise QuernelError(f"{name} must be a number or one number for each of {depth} layers; got {len(held)}")
    return [check_float(name, rate, low=0.0) for rate in held]
