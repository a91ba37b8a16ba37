"""SparsePointwise: run 1x1 convolutions on their nonzero weights, from one to the next in their layout (1911.09723).

Takes zeros that are there (gradual magnitude pruning leaves them) or makes them, smallest magnitudes first, a like
share in every layer.  Batch norms are folded and ReLU or ReLU6 is computed in the same pass; depthwise 3x3 and 5x5
convolutions beside such layers get channel-major kernels, so that no tensor changes its layout in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import all_finite, check_choice, check_probability, check_type
from quernel.compress._context import Context, tied_elsewhere
from quernel.compress._method import LayerPlan, Method, Plan
from quernel.compress.prune._pointwise_chains import ACTIVATIONS, Chain, find_chains
from quernel.nn import DepthwiseConv2d, SparseConv1x1, SparseLinear, replace_module
from quernel.nn.conv.depthwise import not_depthwise
from quernel.nn.conv.sparse import WORTH_IT, not_pointwise
from quernel.nn.functional import fold_batch_norm
from quernel.nn.functional.magnitude import BLOCKS, magnitude_mask
from quernel.nn.weights import SparseWeight
from quernel.nn.weights.sparse import MAX_INPUTS, row_groups

# Rows of a weight that are summed together: large temporaries go back to the system and fault in again.
ROWS = 128


@dataclass(frozen=True)
class _Kept:
    """How many weights of a layer stay, of how many, and the share of its norm that goes."""

    stored: int
    size: int
    weight_lost: float

    @property
    def zeros(self) -> float:
        """Share of the weights that is not stored."""
        return 1.0 - self.stored / self.size


@dataclass
class _Decision:
    """What ``apply`` and ``finish`` carry out; ``masks`` are held on the weights while the caller trains them."""

    sparse: tuple[str, ...]
    chains: tuple[Chain, ...]
    trains: bool
    masks: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
            nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True),
            nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 48, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(48, 5),
        )  # fmt: skip
        with torch.no_grad():
            for tensor in net.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.2, 1.0, generator=generator)
            for i in (0, 3, 6, 9):
                weight = net.get_parameter(f"{i}.weight")
                weight.normal_(generator=generator)
        return net.eval()

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(2, 3, 15, 17, generator=generator) for _ in range(2)]
    return {"method": SparsePointwise(0.8), "model": model, "data": data, "example_inputs": (data[0],)}


@register(
    "fast-sparse-convnets", pillar="compress", contract="method", paper="1911.09723", status="stable", example=_example
)
@dataclass(frozen=True)
class SparsePointwise(Method):
    """Store and multiply only the nonzero weights of 1x1 convolutions.

    For mobile-style networks, whose time goes into 1x1 convolutions, on a plain CPU.  Zeros should come from training
    (``quernel.train.GradualMagnitudePruner``); removing 70 % and more at once, without training, costs accuracy.

    Parameters
    ----------
    sparsity : float, optional
        Share of zeros to bring every layer to, smallest magnitudes first, in [``min_sparsity``, 1).  None takes the
        zeros that are there.  If the caller fine-tunes, the zeros are held while that trains.
    block : {1, 2, 4}, default=1
        Consecutive output channels that share a pattern: faster, and less accurate at the same sparsity.
    min_sparsity : float, default=0.66
        Layers with a smaller share of zeros stay dense: a dense layer, in bfloat16 at the latest, is as fast.
    fold_bn : bool, default=True
        Whether to fold batch norms into the layer before them; needs example inputs or data, to see which is where.
    linear : bool, default=False
        Whether linear layers are taken too.  They win at batches of some tens of rows and more.

    Notes
    -----
    Keep the model in torch's default layout: inputs in channels_last are copied at every layer.  Padded, grouped and
    larger convolutions stay as they are, and so do activations other than ReLU and ReLU6.

    References
    ----------
    Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723, 2019.

    Examples
    --------
    >>> import torch, quernel
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
    >>> method, x = quernel.compress.SparsePointwise(0.9), torch.randn(1, 64, 14, 14)
    >>> layer = quernel.compress.compress(net.eval(), method, example_inputs=x).model[0]
    >>> type(layer).__name__, layer.activation, round(layer.weight.sparsity, 3)
    ('SparseConv1x1', 'relu', 0.9)
    """

    sparsity: float | None = None
    block: int = 1
    min_sparsity: float = 0.66
    fold_bn: bool = True
    linear: bool = False

    stage: ClassVar[str] = "prune"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    # A layer gives what the batch norm and the activation behind it gave.
    keeps_shapes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_probability("min_sparsity", self.min_sparsity)
        check_choice("block", self.block, BLOCKS)
        for name in ("fold_bn", "linear"):
            check_type(name, getattr(self, name), bool)
        if self.sparsity is not None and not self.min_sparsity <= check_probability("sparsity", self.sparsity) < 1:
            raise QuernelError(
                f"sparsity must lie in [min_sparsity={self.min_sparsity}, 1); got {self.sparsity}. Layers with fewer "
                "zeros are slower sparse than dense; lower min_sparsity to have them anyway"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The graph, to fold batch norms."""
        return frozenset({"graph"}) if self.fold_bn else frozenset()

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """The zeros that are there, and what pruning at once may cost little."""
        return (cls(), cls(0.7), cls(0.8))

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the nonzeros of each layer and find what is computed around it."""
        kept: dict[str, _Kept] = {}
        skipped: dict[str, str] = {}
        depthwise: list[str] = []
        for i, (name, module) in enumerate(selected := context.selected(model, self.targets)):
            context.tell(f"{type(self).__name__}: {name}", i / len(selected))
            if isinstance(module, nn.Conv2d) and not not_depthwise(module):
                depthwise.append(name)
                continue
            reason = self._refusal(model, module)
            # Masks of all layers would be a quarter of a model: each is made again where it is used.
            found = None if reason else _kept(module.get_parameter("weight").detach(), self._mask(module))
            if found is not None and found.zeros < self.min_sparsity:
                reason = f"{found.zeros:.0%} of its weights are zero, fewer than min_sparsity={self.min_sparsity}"
            if found is None or reason:
                skipped[name] = reason
            else:
                kept[name] = found
        trains = self.sparsity is not None and context.finetune is not None
        plain = [n for n in skipped if self.fold_bn and isinstance(model.get_submodule(n), nn.Conv2d)]
        chains = tuple(find_chains(model, context, list(kept), depthwise, plain, self.fold_bn))
        done = {chain.layer for chain in chains}
        skipped |= dict.fromkeys(depthwise, "no sparse layer is beside it")
        layers = [plan for chain in chains for plan in _layer_plans(chain, kept, plain)]
        layers += [LayerPlan(name, "skip", reason) for name, reason in skipped.items() if name not in done]
        stored, all_of_them = sum(one.stored for one in kept.values()), sum(one.size for one in kept.values())
        summary = {
            "sparse_layers": len(kept),
            "sparsity": 1.0 - stored / all_of_them if all_of_them else 0.0,
            "depthwise_layers": len(done & set(depthwise)),
            "folded_batch_norms": sum(chain.norm is not None for chain in chains),
        }
        warnings = []
        if kept and self.min_sparsity < WORTH_IT:
            warnings.append(
                f"min_sparsity={self.min_sparsity}: below {WORTH_IT:.0%} zeros a dense layer is as fast, at the latest "
                "in bfloat16"
            )
        if kept and self.sparsity is not None and not trains:
            warnings.append(
                f"sparsity={self.sparsity} is reached at once, without training; pass finetune=, or prune while you "
                "train (quernel.train.GradualMagnitudePruner)"
            )
        return Plan(tuple(layers), _Decision(tuple(kept), chains, trains), summary, tuple(warnings))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the sparse layers in; where the caller trains first, set the zeros and hold them."""
        decision: _Decision = plan.payload
        if not decision.trains:
            self._convert(model, decision)
            return
        for name in decision.sparse:
            module = model.get_submodule(name)
            weight, mask = module.get_parameter("weight"), self._mask(module)
            decision.masks[name] = mask
            _masked_(weight.detach(), mask)
            if weight.requires_grad:
                # Without gradient and momentum they stay zero, with weight decay too.
                decision.handles.append(weight.register_hook(lambda grad, mask=mask: grad * mask))

    def finish(self, model: nn.Module, plan: Plan) -> None:
        """Put the trained layers in."""
        decision: _Decision = plan.payload
        if decision.trains:
            for handle in decision.handles:
                handle.remove()
            self._convert(model, decision)

    def _refusal(self, model: nn.Module, module: nn.Module) -> str:
        """Return why a layer cannot be sparse; empty if it can."""
        if isinstance(module, nn.Conv2d):
            problem = not_pointwise(module)
            if problem:
                return f"no 1x1 convolution that sparse kernels run: {problem}"
        elif not self.linear:
            return "a linear layer; linear=True takes them too"
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.dtype is not torch.float32:
            return "its weight is no float32 tensor"
        if not all_finite(weight):
            return "its weight holds NaN or infinity"
        if not weight.numel():
            return "it has no weights"
        if weight.shape[1] > MAX_INPUTS:
            return f"it has more than {MAX_INPUTS} inputs"
        tied = tied_elsewhere(model, weight, [module])
        return f"its weight is tied to {tied}" if tied else ""

    def _mask(self, module: nn.Module) -> Tensor:
        weight = module.get_parameter("weight").detach()
        if self.sparsity is not None:
            mask = magnitude_mask(weight, self.sparsity, block=self.block)
            for stays, values in zip(mask.split(ROWS), weight.split(ROWS), strict=True):
                stays &= values != 0
            return mask
        nonzero = [
            (rows != 0).any(1, keepdim=True).expand_as(rows) for rows in row_groups(weight.flatten(1), self.block)
        ]
        return torch.cat([rows.flatten(0, 1) for rows in nonzero]).view(weight.shape)

    def _convert(self, model: nn.Module, decision: _Decision) -> None:
        for chain in decision.chains:
            layer, norm = model.get_submodule(chain.layer), chain.norm and model.get_submodule(chain.norm)
            activation = chain.activation and ACTIVATIONS[type(model.get_submodule(chain.activation))]
            mask = None
            if chain.layer in decision.sparse:
                mask = decision.masks.pop(chain.layer) if decision.trains else self._mask(layer)
            replace_module(model, chain.layer, self._converted(layer, norm, activation, mask, chain.aligned))
            for name in (chain.norm, chain.activation):
                if name is not None:
                    replace_module(model, name, nn.Identity())

    def _converted(
        self, layer: Any, norm: Any, activation: str | None, mask: Tensor | None, aligned: bool
    ) -> nn.Module:
        weight, bias = layer.weight, layer.bias
        trains = bool(weight.requires_grad)
        if norm:
            weight, offset = _folded(weight.detach(), bias, norm, inplace=mask is not None)
            bias = nn.Parameter(offset, requires_grad=trains)
        if mask is None:
            kept = nn.Parameter(weight.detach(), requires_grad=trains)
            if not_depthwise(layer):
                return _plain_conv(layer, kept, bias)
            return DepthwiseConv2d(kept, bias, stride=layer.stride[0], activation=activation, aligned=aligned)
        # The layer goes, so its weight may be changed; a copy would be another layer in memory.
        stored = SparseWeight.from_dense(_masked_(weight.detach(), mask), self.block)
        if isinstance(layer, nn.Linear):
            return SparseLinear(stored, bias, activation=activation)
        return SparseConv1x1(stored, bias, stride=layer.stride[0], activation=activation, aligned=aligned)


def _masked_(weight: Tensor, mask: Tensor) -> Tensor:
    """Set what goes to zero, in place; a product of a whole weight with a mask would copy the mask to float."""
    for values, stays in zip(weight.split(ROWS), mask.split(ROWS), strict=True):
        values.mul_(stays)
    return weight


def _folded(weight: Tensor, bias: Tensor | None, norm: Any, *, inplace: bool) -> tuple[Tensor, Tensor]:
    """Fold a batch norm some rows at a time: float64 copies of a whole weight would be four times its size."""
    target, offsets = weight if inplace else torch.empty_like(weight), []
    vectors = (bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    with torch.no_grad():
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            parts = (None if vector is None else vector[rows] for vector in vectors)
            target[rows], offset = fold_batch_norm(weight[rows], *parts, eps=norm.eps)
            offsets.append(offset)
    return target, torch.cat(offsets)


def _kept(weight: Tensor, mask: Tensor) -> _Kept:
    lost = total = 0.0
    for values, stays in zip(weight.flatten(1).split(ROWS), mask.flatten(1).split(ROWS), strict=True):
        squares = values.double().square()
        total += float(squares.sum())
        lost += float((squares * ~stays).sum())
    share = math.sqrt(lost / total) if total else 0.0
    return _Kept(int(mask.count_nonzero()), mask.numel(), share)  # sum() would make a copy in int64


def _layer_plans(chain: Chain, kept: Mapping[str, _Kept], plain: Sequence[str]) -> list[LayerPlan]:
    details: dict[str, Any] = {"batch_norm": chain.norm, "activation": chain.activation, "aligned": chain.aligned}
    if chain.layer in plain:
        plans = [LayerPlan(chain.layer, "folded", details={"batch_norm": chain.norm})]
    elif chain.layer not in kept:
        plans = [LayerPlan(chain.layer, "channel-major", details=details)]
    else:
        found = kept[chain.layer]
        details = {"sparsity": found.zeros, "weight_lost": found.weight_lost} | details
        plans = [LayerPlan(chain.layer, "sparse", details=details)]
    later = [name for name in (chain.norm, chain.activation) if name is not None]
    return plans + [LayerPlan(name, "fused", f"computed in {chain.layer}") for name in later]


def _plain_conv(layer: nn.Conv2d, weight: nn.Parameter, bias: nn.Parameter) -> nn.Conv2d:
    """Return the same convolution with other parameters; nothing is drawn from a random generator."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    same: dict[str, Any] = {name: getattr(layer, name) for name in names}
    new = nn.Conv2d(layer.in_channels, layer.out_channels, **same, device="meta")
    new.weight, new.bias = weight, bias
    return new
