"""ShiftAdd: a vision transformer of additions and shifts (ShiftAddViT, arXiv 2306.06446).

Stage 1 replaces softmax attention by binary linear attention and fine-tunes, stage 2 replaces linear layers by
power-of-two ones, or by mixtures of a multiplying and a shifting expert, and fine-tunes again; then everything that
shifts is packed.  Without attention and mixtures no training is needed: trained weights are rounded and packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import all_finite, check_choice, check_float, check_int, check_type
from quernel.compress._context import OPAQUE, Context, is_below, opaque_parents, tied_elsewhere
from quernel.compress._method import LayerPlan, Method, Plan
from quernel.nn import (
    BinaryLinearAttention,
    BinaryMultiheadAttention,
    MultShiftMoE,
    PackedShiftLinear,
    ShiftLinear,
    replace_module,
)
from quernel.nn.attention.shift_add import TAUS
from quernel.nn.functional.binary_attention import CONSTANTS
from quernel.nn.functional.shift import MAX_BITS, MIN_BITS
from quernel.nn.functional.straight_through import TURNING
from quernel.nn.linear.packed_shift import packed_bytes

Kind = Literal["mixture", "shift"]
BINARY, MIXTURE = "binary attention", "mixture"


@dataclass(frozen=True)
class _Payload:
    finetune: Callable[[nn.Module], Any] | None
    # Projections that have no name in the model before its attention is replaced, and what becomes of them.
    inner: dict[str, str]


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        layers = [nn.Linear(64, 96), nn.Linear(96, 8)]
        with torch.no_grad():
            for parameter in (p for layer in layers for p in layer.parameters()):
                parameter.uniform_(-0.1, 0.1, generator=generator)
        return nn.Sequential(layers[0], nn.GELU(), layers[1]).eval()

    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    return {"method": ShiftAdd(None, "shift", bits=4), "model": model, "data": [x], "example_inputs": (x,)}


@register("shiftaddvit", pillar="compress", contract="method", paper="2306.06446", status="stable", example=_example)
@dataclass(frozen=True)
class ShiftAdd(Method):
    """Replace attention by binary linear attention, and linear layers by shifts or mixtures.

    Shift codes are for bytes: 3 to 6 bits a weight, and faster products with few tokens; integers of four bits
    (``DGQ``) lose less at equal bytes.  Binary attention is for long sequences: its cost is linear in their length.

    Parameters
    ----------
    attention : {"binary", None}, default="binary"
        What becomes of self-attention: modules with linear layers ``qkv`` and ``proj``, an int ``num_heads`` and no
        other tensors, and ``nn.MultiheadAttention``.  Needs ``finetune=``.
    mlp : {"mixture", "shift", None}, default="mixture"
        What becomes of the linear layers outside attention; leave the head out by ``exclude=``.  A mixture keeps a
        dense expert beside the packed one, so it is larger than before; it needs ``finetune=``, which adds
        ``quernel.nn.collect_aux_loss(model)`` to its loss in every step.
    projections : {"mixture", "shift", None}, default=None
        The same for the projections of attention.
    bits : int, default=5
        Bits of a shift code, 3 to 6; three are stored in four.  Products of up to four bits run in int8.
    channel_scale : bool, default=True
        A factor for each output, which moves the few exponents to where its weights are.
    rounding : {"log", "nearest"}, default="log"
        Halfway between two powers in the logarithm, or in value.
    latencies : "measure" or pair of float, default="measure"
        Time a token of the multiplying and the shifting expert; tokens are shared out inversely.
    noise : float, default=0.5
        Of the routers while training.
    balance : float, default=0.01
        Factor of the balance loss.
    tau, constant, conv_kernel
        Of ``quernel.nn.BinaryLinearAttention``.
    seed : int, default=0
        Of the routers' first weights.

    Raises
    ------
    QuernelError
        If an argument is out of range or nothing is asked for.

    Notes
    -----
    ``finetune(model)`` is called after each stage.  Layers that another method quantised are left alone, and so are
    those that codes would make larger.  Convolutions of a replaced attention start at zero.

    References
    ----------
    You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
    arXiv 2306.06446, 2023.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    >>> result = quernel.compress.compress(model, quernel.compress.ShiftAdd(attention=None, mlp="shift", bits=4))
    >>> result.report.bytes_after < 0.15 * result.report.bytes_before
    True
    """

    attention: Literal["binary"] | None = "binary"
    mlp: Kind | None = "mixture"
    projections: Kind | None = None
    bits: int = 5
    channel_scale: bool = True
    rounding: Literal["log", "nearest"] = "log"
    latencies: Literal["measure"] | tuple[float, float] = "measure"
    noise: float = 0.5
    balance: float = 0.01
    tau: Literal["running", "row", "batch"] = "running"
    constant: Literal["self", "sum"] = "self"
    conv_kernel: int = 9
    seed: int = 0

    stage: ClassVar[str] = "quantise"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ("binary", None))
        for name in ("mlp", "projections"):
            check_choice(name, getattr(self, name), ("mixture", "shift", None))
        if (self.attention, self.mlp, self.projections) == (None, None, None):
            raise QuernelError("attention, mlp and projections are all None; ask for at least one replacement")
        check_int("bits", self.bits, low=MIN_BITS, high=MAX_BITS)
        check_type("channel_scale", self.channel_scale, bool)
        check_choice("rounding", self.rounding, tuple(TURNING))
        if self.latencies != "measure":
            if not isinstance(self.latencies, tuple) or len(self.latencies) != 2:
                raise QuernelError(f'latencies must be "measure" or a pair of numbers; got {self.latencies!r}')
            for value in self.latencies:
                check_float("latencies", value, low=0.0, open_low=True)
        check_float("noise", self.noise, low=0.0)
        check_float("balance", self.balance, low=0.0)
        check_choice("tau", self.tau, TAUS)
        check_choice("constant", self.constant, CONSTANTS)
        if check_int("conv_kernel", self.conv_kernel, low=1) % 2 == 0:
            raise QuernelError(f"conv_kernel must be odd; got {self.conv_kernel}")
        check_int("seed", self.seed, low=0)

    @property
    def needs(self) -> frozenset[str]:
        """Fine-tuning, where attention or mixtures come in: neither computes what the trained model did."""
        trained = self.attention is not None or MIXTURE in (self.mlp, self.projections)
        return frozenset({"finetune"} if trained else ())

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Return codes alone, and for callers who fine-tune binary attention with codes or mixtures."""
        codes = tuple(cls(None, "shift", "shift", bits) for bits in (4, 5))
        return (*codes, cls("binary", "shift", "shift", 4), cls())

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Find attention modules and linear layers, and say what becomes of each."""
        opaque = opaque_parents(model)
        found = {n: m for n, m in model.named_modules() if n and _looks_like_attention(m)}
        layers = []
        for name, module in found.items():
            if self.attention and context.allows(name):
                reason = OPAQUE if is_below(name, opaque) else _attention_refusal(module)
                layers.append(LayerPlan(name, "skip" if reason else BINARY, reason))
        for name, linear in context.selected(model, self.targets):
            kind = self.projections if is_below(name, found) else self.mlp
            if kind and isinstance(linear, nn.Linear):
                reason = self._refusal(model, linear, kind)
                action = "skip" if reason else MIXTURE if kind == MIXTURE else f"shift, {self.bits} bits"
                layers.append(LayerPlan(name, action, reason))
        inner = {
            f"{layer.name}.{part}": str(self.projections)
            for layer in layers
            if layer.action == BINARY and self.projections and isinstance(found[layer.name], nn.MultiheadAttention)
            for part in ("qkv", "proj")
        }
        plan = Plan(tuple(layers), _Payload(context.finetune, inner))
        kinds = list(_second_stage(plan).values())
        summary = {
            "attention modules": sum(layer.action == BINARY for layer in layers),
            "mixtures": kinds.count(MIXTURE),
            "shift layers": kinds.count("shift"),
        }
        return replace(plan, summary=summary)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Replace attention, fine-tune if more is to come, replace linear layers."""
        finetune = plan.payload.finetune
        first = [layer.name for layer in plan.layers if layer.action == BINARY]
        for name in first:
            replace_module(model, name, self._binary(model.get_submodule(name)))
        second = _second_stage(plan)
        if first and second and finetune is not None:
            finetune(model)
        generator = torch.Generator().manual_seed(self.seed)
        for name, kind in second.items():
            linear: Any = model.get_submodule(name)
            replace_module(model, name, self._layer(linear, kind, finetune is not None, generator))

    def finish(self, model: nn.Module, plan: Plan) -> None:
        """Pack what was trained as shifts."""
        for name in _second_stage(plan):
            layer = model.get_submodule(name)
            if isinstance(layer, ShiftLinear | MultShiftMoE):
                replace_module(model, name, layer.pack())

    def _binary(self, attention: nn.Module) -> nn.Module:
        options: dict[str, Any] = {"tau": self.tau, "constant": self.constant, "conv_kernel": self.conv_kernel}
        if isinstance(attention, nn.MultiheadAttention):
            return BinaryMultiheadAttention.from_attention(attention, **options)
        return BinaryLinearAttention.from_attention(attention, **options)

    def _layer(self, linear: nn.Linear, kind: str, trains: bool, generator: torch.Generator) -> nn.Module:
        options: dict[str, Any] = {"channel_scale": self.channel_scale, "rounding": self.rounding}
        if kind == "shift":
            cls: Any = ShiftLinear if trains else PackedShiftLinear
            return cls.from_linear(linear, self.bits, **options)
        options |= {"noise": self.noise, "balance": self.balance, "generator": generator}
        return MultShiftMoE.from_linear(linear, self.bits, self.latencies, **options)

    def _refusal(self, model: nn.Module, linear: nn.Linear, kind: str) -> str:
        weight = linear.weight
        if not all_finite(weight):
            return "its weight holds NaN or infinity"
        tied = tied_elsewhere(model, weight, [linear])
        if tied:
            return f"its weight is tied to {tied}"
        if kind == "shift" and packed_bytes(weight.shape, self.bits) >= weight.numel() * weight.element_size():
            return f"codes of a {tuple(weight.shape)} weight would not be smaller"
        return ""


def _second_stage(plan: Plan) -> dict[str, str]:
    """Return the linear layers to be replaced and their kind."""
    named = {
        layer.name: MIXTURE if layer.action == MIXTURE else "shift"
        for layer in plan.layers
        if not layer.skipped and layer.action != BINARY
    }
    return named | plan.payload.inner


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    parts = (getattr(module, "qkv", None), getattr(module, "proj", None))
    return all(isinstance(part, nn.Module) for part in parts) and isinstance(getattr(module, "num_heads", None), int)


def _attention_refusal(module: nn.Module) -> str:
    """Say why binary attention cannot take the place of an attention module, or nothing."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            return "its queries, keys and values are not projected by one matrix, or it adds a key"
        return ""
    qkv, proj = module.qkv, module.proj
    if type(qkv) is not nn.Linear or type(proj) is not nn.Linear or qkv.out_features != 3 * qkv.in_features:
        return "its projections are not plain linear layers of one size"
    own = {id(t) for part in (qkv, proj) for t in part.state_dict(keep_vars=True).values()}
    # A bias table of windows or a causal mask is something that binary attention would drop without a word.
    other = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if id(t) not in own]
    if other:
        return f"it has tensors of its own: {', '.join(other[:3])}"
    if getattr(module, "is_causal", False) or getattr(module, "causal", False):
        return "it is causal"
    needed = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is inspect.Parameter.empty and p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return "" if len(needed) == 1 else f"its forward takes more than the tokens: {', '.join(needed)}"
