"""What concerns all views of one array at once: learning rates, gradient scales, and the projection of weights.

Slot p of the array is read by c weights with scales lambda_1..lambda_c. With s = sum lambda and q = sum lambda^2 over
them, the exact gradient is sum lambda_i g_i, and a step of gradient descent on the array moves weight j by
lambda_j sum lambda_i g_i: the more weights share a slot and the larger their scales, the longer the step. Dividing the
gradient by q makes it the least-squares projection of the step that each weight would take alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float
from quernel.nn._shared_array import SharedArray
from quernel.nn.hashed._robe import Robe
from quernel.nn.weights.hashed import HashedWeight

GradientScale = Literal["none", "mean-sq", "s", "s/c", "sqrt q", "q"]
Reader = HashedWeight | Robe

# What the gradient of a slot is divided by, from count, sum and sum of squares of the scales of its weights.
DIVISORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda c, s, q: torch.ones_like(c),
    "mean-sq": lambda c, s, q: s.square() / c,
    "s": lambda c, s, q: s,
    "s/c": lambda c, s, q: s / c,
    "sqrt q": lambda c, s, q: q.sqrt(),
    "q": lambda c, s, q: q,
}


def readers_of(model: nn.Module) -> list[Reader]:
    """Return the views of shared arrays in a model, each once."""
    return [module for module in model.modules() if isinstance(module, Reader)]


def slot_sums(readers: Iterable[Reader], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return count c, sum s and sum of squares q of the scales of the weights in every slot, float64 (size,) each."""
    c, s, q = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for reader in readers:
        for scale, counts in reader.part_counts():
            held = counts.cpu()
            c += held
            # Signs are apart: a scale counts by its size.
            s += abs(scale) * held
            q += scale**2 * held
    return c, s, q


def gradient_divisors(readers: Iterable[Reader], size: int, kind: GradientScale) -> Tensor:
    """Return what the gradient of every slot is divided by, float64 (size,); 1 where nothing reads the slot."""
    check_choice("kind", kind, tuple(DIVISORS))
    c, s, q = slot_sums(readers, size)
    return torch.where(c > 0, DIVISORS[kind](c.clamp_min(1), s, q), 1.0)


def scale_memory_gradients(model: nn.Module, kind: GradientScale = "q") -> list[Any]:
    """Divide the gradients of every shared array of a model by what its slots share, from now on.

    Parameters
    ----------
    model : nn.Module
        With all its views in place: their scales are counted now.
    kind : {"none", "mean-sq", "s", "s/c", "sqrt q", "q"}, default="q"
        With c weights in a slot, s the sum and q the sum of squares of their scales: divide by 1, s^2 / c, s, s / c,
        the root of q, or q. "q" makes a step of gradient descent the projection of the dense step. Adam
        divides by the size of gradients itself; leave them as they are there.

    Returns
    -------
    handles : list
        Each has ``remove()``. Copies of the model do not inherit the hooks.

    Examples
    --------
    >>> from quernel.nn import RoastLinear, SharedArray, scale_memory_gradients
    >>> layer = RoastLinear(64, 32, memory=SharedArray(1500))
    >>> handles = scale_memory_gradients(layer, "q")
    >>> len(handles)
    1
    """
    handles = []
    arrays = _by_array(model)
    if not arrays:
        raise QuernelError("model holds no layer over a shared array; build it of RoastLinear or apply Roast first")
    for values, readers in arrays.values():
        if values.requires_grad:
            divisors = gradient_divisors(readers, len(values), kind).to(values.device, values.dtype)
            handles.append(values.register_hook(lambda grad, d=divisors: grad / d))
    return handles


def roast_param_groups(
    model: nn.Module, lr: float, *, memory_lr_factor: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for Adam and its kin: every shared array apart, with the rate that its scales ask for.

    A step on an array moves weights by their scale times as much, so its rate is ``memory_lr_factor * lr`` over the
    root mean square of the scales, which is 1 where the array was made at the size of the weights. It gets no
    weight decay: a slot is many weights with different signs.

    Parameters
    ----------
    model : nn.Module
        Its layers may be those of ROAST and of ROBE.
    lr : float
        The rate that a dense model would get.
    memory_lr_factor : float, default=1.0
        Of the arrays' rate.
    weight_decay : float, default=0.0
        For everything but the arrays.

    Returns
    -------
    groups : list of dict
        The arrays first, then the rest.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import RoastLinear, SharedArray, roast_param_groups
    >>> layer = RoastLinear(64, 32, memory=SharedArray(1500, bound=0.125))
    >>> [round(group["lr"], 5) for group in roast_param_groups(layer, 1e-3)]
    [0.001, 0.001]
    >>> optimizer = torch.optim.Adam(roast_param_groups(layer, 1e-3))
    """
    rate = check_float("lr", lr, low=0.0) * check_float("memory_lr_factor", memory_lr_factor, low=0.0)
    groups: list[dict[str, Any]] = []
    arrays = _by_array(model)
    for values, readers in arrays.values():
        if not values.requires_grad:
            continue
        parts = [part for reader in readers for part in reader.parts()]
        mean_square = sum(n * scale**2 for scale, n in parts) / sum(n for _, n in parts)
        scale = mean_square**0.5 if mean_square > 0 else 1.0
        groups.append({"params": [values], "lr": rate / scale, "weight_decay": 0.0})
    rest = [p for p in model.parameters() if id(p) not in arrays and p.requires_grad]
    if rest:
        groups.append({"params": rest, "lr": lr, "weight_decay": check_float("weight_decay", weight_decay, low=0.0)})
    return groups


@torch.no_grad()
def project(memory: SharedArray, targets: Mapping[HashedWeight, Tensor]) -> None:
    """Set the array to what fits given weights best: sum lambda sign W over sum lambda^2, in every slot.

    Parameters
    ----------
    memory : SharedArray
        Slots that nothing reads keep their numbers.
    targets : mapping of HashedWeight to Tensor
        The views of ``memory`` and the weights that they should stand for.
    """
    total = torch.zeros(memory.size, dtype=torch.float64)
    for weight, target in targets.items():
        total += weight.scale * weight.fold(target.detach().double().reshape(len(target), -1).cpu())
    _, _, q = slot_sums(targets, memory.size)
    values = memory.values
    found = torch.where(q > 0, total / q.clamp_min(1e-300), values.detach().double().cpu())
    values.copy_(found.to(values.device, values.dtype))


def _by_array(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[Reader]]]:
    """Return every shared parameter and its readers; several SharedArray objects may hold one parameter."""
    found: dict[int, tuple[nn.Parameter, list[Reader]]] = {}
    for reader in readers_of(model):
        values = reader.memory.values
        found.setdefault(id(values), (values, []))[1].append(reader)
    return found
