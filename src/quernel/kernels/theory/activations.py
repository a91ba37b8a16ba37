"""Activations as the theory takes them: any elementwise function, its slope, its kinks, whether it is scale-free.

Names, modules of torch and callables all become an ``Activation``. Kinks are found, not tabulated: the function and
its autograd slope are compared at the ends of 4,000 cells, and each cell is halved towards the larger difference until
only a jump is left of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError

Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {
    "celu": F.celu,
    "elu": F.elu,
    "erf": torch.erf,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "linear": lambda z: z,
    "mish": F.mish,
    "relu": torch.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
# Other names in use for the same functions.
_ALIASES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "identity": "linear",
    "swish": "silu",
}
# Activations are probed, and searched for kinks, between these ends; no cell begins at a round number.
_REACH, _CELLS, _OFFSET = 20.0, 4000, 1.234e-4
# A cell of 0.01 halved so often is 2e-12 wide: a slope that is no jump differs by less than _JUMP over it.
_HALVINGS, _JUMP = 32, 1e-6
_LINEAR = 1e-9


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function that the recursions can average.

    Parameters
    ----------
    name : str
        What reports call it.
    function : callable
        Float64 tensor to float64 tensor of the same shape.
    kinks : tuple of float
        Where it or its slope jumps, except 0.
    slopes : (float, float) or None
        Slopes for z < 0 and z > 0 where it is linear on both sides of 0: then it is scale-invariant.
    """

    name: str
    function: Function
    kinks: tuple[float, ...] = ()
    slopes: tuple[float, float] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return s(z)."""
        return _value(self.function, z)

    def slope(self, z: Tensor) -> Tensor:
        """Return s'(z) by autograd; at a kink the value that torch defines."""
        return _slope(self.function, z)


def as_activation(activation: str | Function | nn.Module | Activation) -> Activation:
    """Return what the recursions need to know of an activation.

    Parameters
    ----------
    activation : str, callable, nn.Module or Activation
        One of ``ACTIVATIONS``, or anything that maps a tensor to one of the same shape, elementwise. Modules are
        copied, put into eval mode and taken in float64.

    Raises
    ------
    QuernelError
        If the name is unknown; if the object cannot be called, does not act elementwise, gives NaN or infinity between
        -20 and 20, or has no autograd.

    Examples
    --------
    >>> as_activation("relu6").kinks
    (6.0,)
    >>> as_activation(torch.nn.LeakyReLU(0.1)).slopes
    (0.1, 1.0)
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        name = activation.lower()
        name = _ALIASES.get(name, name)
        if name not in ACTIVATIONS:
            known = ", ".join(sorted({*ACTIVATIONS, *_ALIASES}))
            raise QuernelError(f"activation must be a callable or one of {known}; got {activation!r}")
        return _named(name)
    if not callable(activation):
        raise QuernelError(f"activation must be a name or a callable; got {type(activation).__name__}")
    if isinstance(activation, nn.Module):
        held = _Held(type(activation), repr(activation), activation)
        # Modules of torch print all that decides what they do, but for learned slopes.
        alike = held.kind.__module__.startswith("torch.nn.") and not any(True for _ in activation.parameters())
        return _of_module(held) if alike else _of_module.__wrapped__(held)
    name = getattr(activation, "__name__", type(activation).__name__)
    return _examined("function" if name == "<lambda>" else name, activation)


@dataclass(frozen=True)
class _Held:
    """A module that counts as equal to others of its class that print alike."""

    kind: type
    text: str
    module: nn.Module = field(compare=False)


@functools.lru_cache(maxsize=64)
def _of_module(held: _Held) -> Activation:
    module = copy.deepcopy(held.module).double().requires_grad_(False).eval()
    return _examined(held.kind.__name__.lower(), module)


@functools.cache
def _named(name: str) -> Activation:
    return _examined(name, ACTIVATIONS[name])


def _examined(name: str, function: Function) -> Activation:
    # Alone, so that nothing which depends on its neighbours looks elementwise.
    grid = torch.linspace(-_REACH, _REACH, _CELLS + 1, dtype=torch.float64) + _OFFSET
    try:
        values, part, origin = (_value(function, z) for z in (grid, grid[: _CELLS // 3], grid.new_zeros(1)))
    except QuernelError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise QuernelError(f"activation {name!r} cannot be applied to a float64 vector: {error}") from error
    bad = ~values.isfinite()
    if bool(bad.any()):
        where = float(grid[bad][0])
        raise QuernelError(f"activation {name!r} is {float(values[bad][0])} at z = {where:.3g}; it must be finite")
    # Vector units round the ends of arrays otherwise than their middle.
    if not torch.allclose(values[: _CELLS // 3], part, rtol=1e-9, atol=1e-12):
        raise QuernelError(f"activation {name!r} must act elementwise: a part of its input changed its values")
    slopes = _linear_sides(grid, values, float(origin))
    kinks = () if slopes is not None else _kinks(function, grid)
    return Activation(name, function, kinks, slopes)


def _linear_sides(grid: Tensor, values: Tensor, origin: float) -> tuple[float, float] | None:
    ratio = values / grid
    sides = []
    for side in (grid < 0, grid > 0):
        slope = float(ratio[side].mean())
        if bool(((ratio[side] - slope).abs() > _LINEAR * max(1.0, abs(slope))).any()):
            return None
        # A mean over thousands of equal numbers is off in its last digits.
        sides.append(round(slope, 12))
    return (sides[0], sides[1]) if abs(origin) <= _LINEAR else None


def _kinks(function: Function, grid: Tensor) -> tuple[float, ...]:
    left, right = grid[:-1], grid[1:]
    low, high = _both(function, left), _both(function, right)
    for _ in range(_HALVINGS):
        # A cell over which next to nothing changes holds no jump.
        held = (high - low).abs().sum(0) > _JUMP * (1 + low.abs().sum(0))
        left, right, low, high = left[held], right[held], low[:, held], high[:, held]
        middle = (left + right) / 2
        between = _both(function, middle)
        lower = (between - low).abs().sum(0) >= (high - between).abs().sum(0)
        left, right = torch.where(lower, left, middle), torch.where(lower, middle, right)
        low, high = torch.where(lower, low, between), torch.where(lower, between, high)
    jumps = (high - low).abs().sum(0) > _JUMP * (1 + low.abs().sum(0))
    found = ((left + right) / 2)[jumps]
    # Rounded to what the halving resolves, so that a kink at 6 is 6.
    return tuple(place for place in (round(z, 10) + 0.0 for z in found.tolist()) if place)


def _both(function: Function, z: Tensor) -> Tensor:
    return torch.stack((_value(function, z), _slope(function, z)))


def _value(function: Function, z: Tensor) -> Tensor:
    # A copy: activations may work in place.
    values = function(z.clone())
    if not isinstance(values, Tensor) or values.shape != z.shape:
        raise QuernelError("activation must return a tensor of the shape it got")
    return values.double()


def _slope(function: Function, z: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = z if z.requires_grad else z.detach().clone().requires_grad_()
        try:
            values = _value(function, leaf)
        except (RuntimeError, TypeError) as error:
            raise QuernelError(f"activation must be differentiable by autograd: {error}") from error
        if not values.requires_grad:
            raise QuernelError("activation must be differentiable by autograd: its result does not depend on its input")
        (slope,) = torch.autograd.grad(values.sum(), leaf, create_graph=z.requires_grad)
    return slope
