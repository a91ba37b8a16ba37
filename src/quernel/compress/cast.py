"""Cast: store what is left in a smaller floating dtype; the honest baseline of every compression claim.

On CPUs with bfloat16 units this is also fast: 3x float32 end to end on an encoder. Linear layers and 2-D
convolutions compute in the dtype they store and take inputs of any dtype; every other floating parameter
and buffer is cast in place, except in layer, group and batch norms, inside what another method put in, and
what a module names in ``keeps_float32``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quernel._module_tree import is_registered
from quernel._registry import register
from quernel._validate import check_choice
from quernel.compress._context import Context, is_below, opaque_parents
from quernel.compress._method import LayerPlan, Method, Plan
from quernel.nn import StoredConv2d, StoredLinear, replace_module
from quernel.nn.weights import DenseWeight
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES

HALF = ("bfloat16", "float16")
# These read half-precision inputs with float32 parameters and answer in the input's dtype; the other way round
# torch refuses, and a model whose first layer is a norm would no longer take float32 inputs.
MIXED_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()

    data = [torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)]
    return {"method": Cast(), "model": model, "data": data, "example_inputs": (data[0],)}


@register("cast", pillar="compress", contract="method", paper=None, status="stable", example=_example)
@dataclass(frozen=True)
class Cast(Method):
    """Store every floating tensor that no other method took in a smaller dtype.

    Parameters
    ----------
    dtype : {"bfloat16", "float16", "float32", "float64"}, default="bfloat16"
        The dtype of storage and of computation.

    Notes
    -----
    Halves the bytes of a float32 model. bfloat16 keeps the range of float32 and 8 bits of mantissa.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> result = quernel.compress.compress(model, quernel.compress.Cast("bfloat16"))
    >>> result.report.bytes_after / result.report.bytes_before
    0.5
    """

    dtype: str = "bfloat16"

    stage: ClassVar[str] = "cast"
    targets: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, tuple(DTYPES))

    @classmethod
    def menu(cls) -> tuple[Cast, ...]:
        """Return bfloat16: float16 is slow on most CPUs."""
        return (cls("bfloat16"),)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """List every module that holds floating tensors of its own in another dtype."""
        layers, left_out = [], []
        inserted = None
        fused = opaque_parents(model)
        half = self.dtype in HALF
        for name, module in model.named_modules():
            if inserted is not None and name.startswith(f"{inserted}."):
                continue
            if name and is_registered(module):
                inserted = name
            elif not self._casts(module):
                continue
            elif not context.allows(name):
                left_out.append(name)
            elif half and isinstance(module, MIXED_NORMS) and not is_below(name, fused):
                layers.append(LayerPlan(name, "keep", "norms take both dtypes"))
            else:
                layers.append(LayerPlan(name, self.dtype))
        # Layers that the user left out keep their numbers, but must take what their neighbours now send.
        adapted = tuple(n for n in left_out if _is_plain(model.get_submodule(n)) and not is_below(n, fused))
        return Plan(tuple(layers), (adapted if layers else (), fused))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Replace linear layers and convolutions by stored ones, cast the others' tensors."""
        adapted, fused = plan.payload
        dtypes = dict.fromkeys(adapted) | {layer.name: self.dtype for layer in plan.layers if not layer.skipped}
        for name, dtype in dtypes.items():
            module = model.get_submodule(name)
            if name and _is_plain(module) and not is_below(name, fused):
                replace_module(model, name, _stored(module, dtype or dtype_name(module.get_parameter("weight").dtype)))
            else:
                # As model.bfloat16() does: torch's fused attention needs all its tensors in one dtype.
                self._cast_own(module)

    def _casts(self, module: nn.Module) -> bool:
        return any(t.dtype != DTYPES[self.dtype] for t in self._own(module).values())

    def _own(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the floating tensors that the module itself holds, without those it needs in float32."""
        own = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
        kept = getattr(module, "keeps_float32", ()) if self.dtype in HALF else ()
        return {name: t for name, t in own.items() if t.is_floating_point() and name not in kept}

    def _cast_own(self, module: nn.Module) -> None:
        dtype = DTYPES[self.dtype]
        for name, tensor in self._own(module).items():
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(dtype)
            else:
                setattr(module, name, tensor.to(dtype))


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Conv2d)


def _stored(module: nn.Module, dtype: str) -> nn.Module:
    weight = DenseWeight.over(module.get_parameter("weight"), dtype)
    old = module.bias
    bias = nn.Parameter(old.detach().to(DTYPES[dtype]), old.requires_grad) if isinstance(old, Tensor) else None
    if isinstance(module, nn.Conv2d):
        new = StoredConv2d.like(module, weight)
        new.bias = bias
        return new
    return StoredLinear(weight, bias)
