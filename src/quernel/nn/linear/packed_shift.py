"""``PackedShiftLinear``: a linear layer over power-of-two codes, 3 to 6 bits a weight (arXiv 2306.06446).

Up to four bits the codes name the integers 0, +-1, +-2, ..., +-64 and products run in int8 (``Int4TableWeight``); five
and six bits keep activations in floating point (``ShiftWeight``).  What is won is bytes, and time where reading the
weight is what costs; shifts themselves are not cheaper than products on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite, check_int, check_type
from quernel.nn._int4_packing import packed_shape
from quernel.nn._stored import StoredLinear
from quernel.nn.functional.shift import MAX_BITS, MIN_BITS, ShiftCodes, packed_codes_shape, packed_shift_codes
from quernel.nn.weights.int4 import Int4TableWeight
from quernel.nn.weights.shift import ShiftWeight

# Code of four bits -> integer: the sign above a magnitude, 0 for zero and m for 2^(m - 1).
POWERS = (0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64)
LARGEST = 64
# Three bits use the upper exponents of four.
LEAST_STORED = 4


def shift_weight(codes: ShiftCodes, bits: int) -> Int4TableWeight | ShiftWeight:
    """Store rounded weights in the format of their number of bits."""
    check_int("bits", bits, low=MIN_BITS, high=MAX_BITS)
    return _stored(codes.packed(max(bits, LEAST_STORED)), codes.scale, bits)


def _stored(codes: Tensor, scale: Tensor, bits: int) -> Int4TableWeight | ShiftWeight:
    if bits > LEAST_STORED:
        return ShiftWeight.from_codes(codes, scale, bits)
    return Int4TableWeight.from_codes(codes, scale / LARGEST, POWERS)


def packed_bytes(shape: Sequence[int], bits: int) -> int:
    """Return the bytes of codes and factors of a matrix of this shape."""
    out_features, in_features = shape
    codes = packed_codes_shape(out_features, in_features, bits) if bits > 4 else packed_shape(out_features, in_features)
    return math.prod(codes) + 4 * out_features


def _example() -> dict[str, Any]:
    linear = nn.Linear(70, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-9, 9, 420).reshape(6, 70).sin())
        linear.bias.copy_(torch.linspace(-1, 1, 6))
    return {
        "make": lambda: PackedShiftLinear.from_linear(linear, bits=5),
        "input": lambda generator: (torch.randn(4, 70, generator=generator),),
    }


@register(
    "shiftaddvit", pillar="nn", contract="module", paper="2306.06446", status="stable", headline=False, example=_example
)
class PackedShiftLinear(StoredLinear):
    """A linear layer whose weights are signed powers of two, packed; made by ``from_linear`` or ``ShiftLinear.pack``.

    Parameters
    ----------
    weight : Int4TableWeight or ShiftWeight, shape (out_features, in_features)
    bias : Tensor, shape (out_features,), optional

    Raises
    ------
    QuernelError
        If the weight is of another kind.

    Notes
    -----
    Codes do not train; gradients reach the input and the bias.  With up to four bits the rows of the input are rounded
    to int8.

    References
    ----------
    You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
    arXiv 2306.06446, 2023.  Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks",
    arXiv 1905.13298, 2019.

    Examples
    --------
    >>> import torch
    >>> linear = torch.nn.Linear(256, 256)
    >>> packed = PackedShiftLinear.from_linear(linear, bits=4)
    >>> packed.weight.nbytes < 0.13 * linear.weight.nbytes + 4 * 256
    True
    """

    weight: Int4TableWeight | ShiftWeight

    def __init__(self, weight: Int4TableWeight | ShiftWeight, bias: Tensor | None = None) -> None:
        check_type("weight", weight, (Int4TableWeight, ShiftWeight))
        super().__init__(weight, bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: int = 4, *, channel_scale: bool = True, rounding: str = "log"
    ) -> Self:
        """Round the weight of a trained layer to powers of two.

        Parameters
        ----------
        linear : nn.Linear
            Left as it is; the bias parameter is shared, not copied.
        bits : int, default=4
            3 to 6; three are stored in four.
        channel_scale, rounding
            As in ``quernel.nn.functional.shift_codes``.

        Raises
        ------
        QuernelError
            If ``bits`` is out of range or the weight holds NaN or infinity.
        """
        check_type("linear", linear, nn.Linear)
        check_int("bits", bits, low=MIN_BITS, high=MAX_BITS)
        if linear.weight.ndim != 2 or 0 in linear.weight.shape:
            raise QuernelError(f"linear.weight must be a non-empty matrix; got shape {tuple(linear.weight.shape)}")
        check_finite("linear.weight", linear.weight)
        options: dict[str, Any] = {"channel_scale": channel_scale, "rounding": rounding}
        codes, scale = packed_shift_codes(linear.weight, bits, stored=max(bits, LEAST_STORED), **options)
        return cls(_stored(codes, scale, bits), linear.bias).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``x @ W.T + bias``."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:  # codes are padded: they fit other sizes as well
            raise QuernelError(f"x must have shape (..., {self.in_features}); got {tuple(x.shape)}")
        return self.weight.linear(x, self.bias)
