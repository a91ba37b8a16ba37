"""``ShiftLinear``: a trainable linear layer whose weights are signed powers of two (DeepShift, arXiv 1905.13298).

Form "q" keeps a dense weight and rounds it in every forward pass, w = sign * 2^round(log2|w|), with the gradient of the
identity.  Form "ps" trains exponents p and signs s, w = sign(round(s)) * 2^round(p), with dL/dp = g w ln 2 and
dL/ds = g.  Training costs a dense layer and the rounding; ``pack()`` gives the small one for inference.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int, check_type
from quernel.nn.functional.shift import ShiftCodes, exponent_range, shift_codes
from quernel.nn.functional.straight_through import TURNING, decode_powers, floor_through, pass_through
from quernel.nn.linear.packed_shift import PackedShiftLinear, shift_weight


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return ShiftLinear(12, 5)

    return {"make": make, "input": lambda generator: (torch.randn(4, 12, generator=generator),)}


@register(
    "shiftaddvit", pillar="nn", contract="module", paper="2306.06446", status="stable", headline=False, example=_example
)
class ShiftLinear(nn.Module):
    """A linear layer that trains weights of signed powers of two.

    Parameters
    ----------
    in_features, out_features : int
        As in ``torch.nn.Linear``.
    bias : bool, default=True
        Whether to add a learned vector.
    bits : int, default=5
        3 to 6: a sign, zero, and 3, 7, 15 or 31 exponents up to 2^0.
    form : {"q", "ps"}, default="q"
        Train a dense weight that is rounded, or exponents and signs.
    channel_scale : bool, default=True
        Factor of each output, which moves its few exponents to where its weights are: found anew from the weight in
        every forward pass in form "q", trained in form "ps".
    act_bits : int, optional
        Round inputs and bias to fixed point, by floor, with half of these bits (even, 4 to 32) behind the point; the
        authors' code has 32.  Such a layer cannot be packed.
    rounding : {"log", "nearest"}, default="log"
        As in ``quernel.nn.functional.power_of_two``.
    device, dtype : optional
        As in ``torch.nn.Linear``.

    Raises
    ------
    QuernelError
        If an argument is out of range.

    Notes
    -----
    Differs from the authors' code: (1) both forms use the exponents that fit beside a zero, -(2^(bits - 1) - 2) .. 0,
    where theirs gives form "q" one more and no zero; (2) no parameter is edited in place; (3) a channel scale.

    References
    ----------
    Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks", arXiv 1905.13298, 2019.
    You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
    arXiv 2306.06446, 2023.

    Examples
    --------
    >>> import torch
    >>> layer = ShiftLinear.from_linear(torch.nn.Linear(64, 64), bits=5)
    >>> x = torch.randn(2, 64)
    >>> torch.allclose(layer.pack()(x), layer(x), atol=1e-4)
    True
    """

    weight: nn.Parameter
    shift: nn.Parameter
    sign: nn.Parameter
    scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 5,
        form: Literal["q", "ps"] = "q",
        channel_scale: bool = True,
        act_bits: int | None = None,
        *,
        rounding: Literal["log", "nearest"] = "log",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_int("in_features", in_features, low=1)
        self.out_features = check_int("out_features", out_features, low=1)
        self.low, self.high = exponent_range(bits)
        self.bits, self.channel_scale = bits, check_type("channel_scale", channel_scale, bool)
        self.form = check_choice("form", form, ("q", "ps"))
        self.rounding = check_choice("rounding", rounding, tuple(TURNING))
        if act_bits is not None and check_int("act_bits", act_bits, low=4, high=32) % 2:
            raise QuernelError(f"act_bits must be even, half of them behind the point; got {act_bits}")
        self.act_bits = act_bits
        plain = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias", plain.bias)
        self._hold(plain.weight)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 5,
        form: Literal["q", "ps"] = "q",
        channel_scale: bool = True,
        act_bits: int | None = None,
        *,
        rounding: Literal["log", "nearest"] = "log",
    ) -> Self:
        """Start from a trained layer, which is copied; options as in the class."""
        check_type("linear", linear, nn.Linear)
        check_finite("linear.weight", linear.weight)
        options: dict[str, Any] = {"form": form, "channel_scale": channel_scale, "act_bits": act_bits}
        sizes = (linear.in_features, linear.out_features, linear.bias is not None, bits)
        # On meta, so that no initial values are drawn.
        new = cls(*sizes, **options, rounding=rounding, device="meta", dtype=linear.weight.dtype)
        new._hold(nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad))
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return new.train(linear.training)

    def _hold(self, weight: Any) -> None:
        """Make the parameters of the form from a dense weight."""
        if self.form == "q":
            self.weight = weight
            return
        if weight.is_meta:
            codes = ShiftCodes(weight, weight, weight.new_empty(len(weight)))
        else:
            codes = shift_codes(weight, self.bits, channel_scale=self.channel_scale, rounding=self.rounding)
        trains = weight.requires_grad
        # Copies: the three must not share memory.
        self.shift, self.sign = (nn.Parameter(t.to(weight.dtype, copy=True), trains) for t in codes[:2])
        self.register_parameter(
            "scale", nn.Parameter(codes.scale.to(weight.dtype), trains) if self.channel_scale else None
        )

    def codes(self) -> ShiftCodes:
        """Return what the weight is rounded to."""
        if self.form == "q":
            return shift_codes(self.weight, self.bits, channel_scale=self.channel_scale, rounding=self.rounding)
        exponents = self.shift.detach().round().clamp(self.low, self.high).to(torch.int32)
        signs = self.sign.detach().round().sign().to(torch.int32)
        scale = torch.ones(self.out_features, device=signs.device) if self.scale is None else self.scale.detach()
        return ShiftCodes(exponents, signs, scale.float())

    def shifted_weight(self) -> Tensor:
        """Return the weight that the layer multiplies by, shape (out_features, in_features), with its gradients."""
        codes = self.codes()
        if self.form == "q":
            return pass_through(self.weight, codes.dense().to(self.weight.dtype))
        powers = decode_powers(codes.exponents, torch.ones_like(codes.exponents)).to(self.shift.dtype)
        weight: Tensor = _SignedPower.apply(self.shift, self.sign, powers, codes.signs.to(self.sign.dtype))  # type: ignore[no-untyped-call]
        return weight if self.scale is None else weight * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``x @ W.T + bias`` with the rounded weight."""
        weight = self.shifted_weight()
        bias: Tensor | None = self.bias
        y = x.to(weight.dtype)
        if self.act_bits is not None:
            y, bias = self._fixed_point(y), None if bias is None else self._fixed_point(bias)
        return F.linear(y, weight, bias).to(x.dtype)

    def _fixed_point(self, x: Tensor) -> Tensor:
        half = (self.act_bits or 0) // 2
        bound = 2.0 ** (half - 1)
        return (floor_through(x * 2.0**half) / 2.0**half).clamp(-bound, bound - 1)

    def pack(self) -> PackedShiftLinear:
        """Return the layer for inference, ``bits`` a weight (three are stored in four); the bias is shared.

        Raises
        ------
        QuernelError
            If ``act_bits`` is set: packed layers have their own way with activations.
        """
        if self.act_bits is not None:
            raise QuernelError(f"act_bits must be None in a layer to be packed; got {self.act_bits}")
        return PackedShiftLinear(shift_weight(self.codes(), self.bits), self.bias).train(self.training)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("in_features", "out_features", "bits", "form", "channel_scale", "act_bits", "rounding")
        return {name: getattr(self, name) for name in names} | {"bias": self.bias is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained layer from ``config()``."""
        return cls(**config)

    def extra_repr(self) -> str:
        """Show features, bits and form."""
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts += [f"bits={self.bits}, form={self.form!r}", *([] if self.channel_scale else ["channel_scale=False"])]
        return ", ".join(parts + ([] if self.act_bits is None else [f"act_bits={self.act_bits}"]))


class _SignedPower(torch.autograd.Function):
    """``signs * powers``; the gradient of an exponent is g w ln 2, that of a sign is g."""

    generate_vmap_rule = True

    @staticmethod
    def forward(shift: Tensor, sign: Tensor, powers: Tensor, signs: Tensor) -> Tensor:
        return powers * signs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] * weight * math.log(2), grads[0], None, None
