"""FactorizeConv: convolutions by one-way filters, before training or after it (arXiv 2304.04964).

K[o, i, y, x] = sum_r channel[o, r, i] rows[o, r, y] columns[o, r, x] with R products a filter: C_out R (C_in + kh + kw)
numbers for C_out C_in kh kw.  The paper fixes the format before training (``mode="init"``, R = 1): fewer parameters,
faster steps, less overfitting.  ``mode="decompose"`` fits the filters of a trained model by alternating least squares;
kernels are seldom of low rank by themselves, so that costs accuracy which fine-tuning has to win back.
Cost of a fit: O(C_out C_in kh kw R) a sweep, at most ``iters`` sweeps a rank tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from quernel._errors import QuernelError
from quernel._random import torch_generator
from quernel._registry import register
from quernel._validate import all_finite, check_choice, check_float, check_int, check_type
from quernel.compress._context import Context, tied_elsewhere
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.nn import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
    replace_module,
)
from quernel.nn.functional import one_way_parameters

FACTORIZED: dict[type[nn.Module], Any] = {
    cls.plain: cls
    for cls in (
        FactorizedConv1d,
        FactorizedConv2d,
        FactorizedConv3d,
        FactorizedConvTranspose1d,
        FactorizedConvTranspose2d,
        FactorizedConvTranspose3d,
    )
}
# Above this relative error of a kernel the layer computes something else until it is trained.
LARGE_ERROR = 0.5


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        convs = [nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, (1, 5), bias=False)]
        with torch.no_grad():
            for conv in convs:
                outputs, inputs, *kernel = conv.weight.shape
                parts = [torch.randn(outputs, n, generator=generator) / n**0.5 for n in (inputs, *kernel)]
                conv.weight.copy_(torch.einsum("oi,oy,ox->oiyx", *parts))
                if conv.bias is not None:
                    conv.bias.uniform_(-0.1, 0.1, generator=generator)
        return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]).eval()

    data = [torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)]
    return {"method": FactorizeConv(), "model": model, "data": data, "example_inputs": (data[0],)}


@register(
    "factorized-conv", pillar="compress", contract="method", paper="2304.04964", status="stable", example=_example
)
@dataclass(frozen=True)
class FactorizeConv(Method):
    """Write convolutions as sums of products of one-way filters, before training or after it.

    Before training (``mode="init"``) small layers learn surrogates of waves and the like as well as dense ones.  A
    trained model has to be fine-tuned after a rank that saves much; then prefer quantisation for fewest bytes.

    Parameters
    ----------
    rank : int or "auto", default="auto"
        Products a filter, R.  "auto" is, for a trained layer, the lowest rank within ``tolerance``, and 1 for a fresh
        one.
    min_kernel : int, default=3
        Layers whose largest side is smaller stay dense.
    skip_first : bool, default=True
        Leave the model's first convolution, which has few input channels and gains nothing.
    mode : {"decompose", "init"}, default="decompose"
        Fit the filters to the weights, or draw fresh ones for training from scratch.
    tolerance : float, default=0.25
        Largest relative Frobenius error of a kernel for ``rank="auto"``, in (0, 1).
    iters : int, default=30
        Most sweeps of alternating least squares.
    init : {"dirac", "kaiming"}, default="dirac"
        Initial values of ``mode="init"``, as in ``nn.FactorizedConv2d``; transposed layers always take "kaiming".
    seed : int, default=0
        Of the initial values.

    Raises
    ------
    QuernelError
        If an argument is out of range.

    Notes
    -----
    Layers with groups, with tied weights, or for which the format saves nothing stay dense, with the reason in the
    report.  Biases and dtypes are kept.  No data is needed.

    References
    ----------
    "A priori compression of convolutional neural networks for wave simulators", arXiv 2304.04964, 2023.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3))
    >>> small = quernel.compress.compress(model, quernel.compress.FactorizeConv(rank=1, mode="init")).model
    >>> type(small[2]).__name__, sum(p.numel() for p in small.parameters())
    ('FactorizedConv2d', 6336)
    """

    rank: int | Literal["auto"] = "auto"
    min_kernel: int = 3
    skip_first: bool = True
    mode: Literal["decompose", "init"] = "decompose"
    tolerance: float = 0.25
    iters: int = 30
    init: Literal["dirac", "kaiming"] = "dirac"
    seed: int = 0

    stage: ClassVar[str] = "lowrank"
    targets: ClassVar[tuple[type[nn.Module], ...]] = tuple(FACTORIZED)

    def __post_init__(self) -> None:
        if self.rank != "auto":
            if isinstance(self.rank, str):
                raise QuernelError(f'rank must be "auto" or an integer of at least 1; got {self.rank!r}')
            check_int("rank", self.rank, low=1)
        check_int("min_kernel", self.min_kernel, low=1)
        check_type("skip_first", self.skip_first, bool)
        check_choice("mode", self.mode, ("decompose", "init"))
        check_float("tolerance", self.tolerance, low=0.0, high=1.0, open_low=True, open_high=True)
        check_int("iters", self.iters, low=0)
        check_choice("init", self.init, ("dirac", "kaiming"))
        check_int("seed", self.seed, low=0)

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Fits of a trained model, from mild to strong; fresh filters need training, which a search does not do."""
        return (cls(tolerance=0.15), cls(), cls(6), cls(4))

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose ranks; the layers of a whole model beside it would take too much memory, so they are fitted again."""
        every = [name for name, module in model.named_modules() if type(module) in self.targets]
        selected = context.selected(model, self.targets)
        layers: list[LayerPlan] = []
        ranks: dict[str, int] = {}
        for i, (name, module) in enumerate(selected):
            context.tell(f"{type(self).__name__}: {name}", i / len(selected))
            reason = self._reason_to_skip(model, module, first=name == every[0])
            rank, error = 1 if self.rank == "auto" else self.rank, 0.0
            if not reason and self.mode == "decompose":
                rank, error, reason = self._fitting_rank(module)
            if reason:
                layers.append(LayerPlan(name, "keep", reason))
                continue
            ranks[name] = rank
            layers.append(LayerPlan(name, f"one-way filters, {self.mode}", details=_details(module, rank, error)))
        return Plan(tuple(layers), ranks, _summary(model, layers), tuple(self._warnings(layers)))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Make the layers one by one and put them in, at every alias."""
        generators: dict[torch.device, torch.Generator] = {}
        for name, rank in plan.payload.items():
            module = model.get_submodule(name)
            if self.mode == "init":
                device = module.get_parameter("weight").device
                if device not in generators:
                    generators[device] = torch_generator(self.seed, device)
                new = self._fresh(module, rank, generators[device])
            else:
                new = self._fit(module, rank)
            replace_module(model, name, new)

    def _reason_to_skip(self, model: nn.Module, module: Any, *, first: bool) -> str:
        if first and self.skip_first:
            return "the first convolution, left by skip_first"
        if module.groups != 1:
            return f"its {module.groups} groups make it small already"
        if max(module.kernel_size) < self.min_kernel:
            return f"its kernel of {module.kernel_size} is below min_kernel={self.min_kernel}"
        weight = module.weight
        if not isinstance(weight, nn.Parameter):
            return "its weight is computed from others"
        if not all_finite(weight):
            return "its weight holds NaN or infinity"
        if _saving_rank(module) < (1 if self.rank == "auto" else self.rank):
            return f"rank {1 if self.rank == 'auto' else self.rank} would save nothing"
        other = tied_elsewhere(model, weight, [module])
        return "" if other is None else f"its weight is tied to {other}"

    def _fresh(self, module: nn.Module, rank: int, generator: torch.Generator) -> nn.Module:
        cls = FACTORIZED[type(module)]
        init = self.init if "shared" in cls.flags else "kaiming"
        layer: nn.Module = cls.like(module, rank, init=init, generator=generator)
        return layer

    def _fitting_rank(self, module: Any) -> tuple[int, float, str]:
        """Return the rank and its relative error, or why none is good enough."""
        if self.rank != "auto":
            return self.rank, self._error(module, self.rank), ""
        low, high = 1, _saving_rank(module)
        error = self._error(module, high)
        if error > self.tolerance:
            return 0, 0.0, f"even rank {high} is off by {error:.2f} and the next saves nothing"
        # Errors fall with the rank, so bisection finds the lowest that will do.
        while low < high:
            middle = (low + high) // 2
            off = self._error(module, middle)
            if off <= self.tolerance:
                high, error = middle, off
            else:
                low = middle + 1
        return high, error, ""

    def _fit(self, module: nn.Module, rank: int) -> Any:
        return FACTORIZED[type(module)].from_conv(module, rank, self.iters)

    def _error(self, module: Any, rank: int) -> float:
        layer, weight = self._fit(module, rank), module.weight.detach()
        lost = float((layer.kernel().detach() - weight).norm(dtype=torch.float64))
        return lost / max(float(weight.norm(dtype=torch.float64)), torch.finfo(torch.float64).tiny)

    def _warnings(self, layers: Sequence[LayerPlan]) -> list[str]:
        changed = [layer for layer in layers if not layer.skipped]
        if self.mode == "init" and changed:
            return [f"{len(changed)} layers hold fresh filters: train the result"]
        far = [layer.name for layer in changed if float(layer.details["relative_frobenius_error"] or 0) > LARGE_ERROR]
        if far:
            found = f"{len(far)} kernels (first {far[0]!r}) are off by more than {LARGE_ERROR:.0%}"
            return [f"{found}: raise rank, or pass finetune= to compress"]
        return []


def _saving_rank(module: Any) -> int:
    """Return the largest rank with fewer numbers than the dense kernel; 0 if there is none."""
    dense = module.in_channels * math.prod(module.kernel_size)
    return (dense - 1) // (module.in_channels + sum(module.kernel_size))


def _details(module: Any, rank: int, error: float) -> dict[str, Scalar]:
    bias = 0 if module.bias is None else module.out_channels
    kept = one_way_parameters(module.out_channels, module.in_channels, module.kernel_size, rank)
    return {
        "rank": rank,
        "relative_frobenius_error": error,
        "parameters_before": module.weight.numel() + bias,
        "parameters_after": kept + bias,
    }


def _summary(model: nn.Module, layers: Sequence[LayerPlan]) -> dict[str, Scalar]:
    before = sum(p.numel() for p in model.parameters())
    saved = sum(
        int(layer.details["parameters_before"] or 0) - int(layer.details["parameters_after"] or 0)
        for layer in layers
        if not layer.skipped
    )
    return {
        "factorized_convolutions": sum(not layer.skipped for layer in layers),
        "model_parameters_before": before,
        "model_parameters_after": before - saved,
        "model_parameter_reduction": saved / before if before else 0.0,
    }
