"""``ShiftWeight``: signed powers of two in 5 or 6 bits a weight, with one float32 factor an output.

W[o, k] = scale[o] * sign * 2^p with p in -14..0 (5 bits) or -30..0 (6 bits), and zero.  Activations stay in floating
point; forms of up to four bits are an ``Int4TableWeight``, whose products run in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite, check_int
from quernel.nn.functional.shift import (
    decode_codes,
    pack_codes,
    packed_codes_shape,
    packed_shift_codes,
    shift_linear,
    unpack_codes,
)
from quernel.nn.weights._base import StoredWeight
from quernel.nn.weights.int8 import keep_float32

# A multiple of the four rows that a kernel reads together.
_PACKED_ROWS = 64


def _example() -> dict[str, Any]:
    return {
        "make": lambda: ShiftWeight.from_dense(torch.linspace(-1, 1, 350).reshape(5, 70).sin(), 5),
        "input": lambda generator: (torch.randn(3, 70, generator=generator),),
    }


@register("shiftaddvit", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example)
class ShiftWeight(StoredWeight):
    """A matrix of signed powers of two times a factor a row.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in)``.
    bits : {5, 6}, default=5
        Bits of a code: its sign, zero, and 15 or 31 exponents.

    Notes
    -----
    ``scale`` stays float32 when a module around it is cast.

    Examples
    --------
    >>> import torch
    >>> weight = ShiftWeight.from_dense(torch.tensor([[0.5, -0.26, 0.0]]))
    >>> weight.unpack().tolist()  # 2^0, -2^-1, 0, in units of the row's factor
    [[15, 30, 0]]
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int], bits: int = 5) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise QuernelError(f"shape must be (out, in) with sizes of at least 1; got {self.shape}")
        self.bits = check_int("bits", bits, low=5, high=6)
        self.register_buffer("codes", torch.zeros(packed_codes_shape(*self.shape, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(self.shape[0]))

    @classmethod
    def from_dense(cls, weight: Tensor, bits: int = 5, *, channel_scale: bool = True, rounding: str = "log") -> Self:
        """Round ``weight``, shape (out, in), to powers of two; options as in ``shift_codes``."""
        check_finite("weight", weight)
        return cls.from_codes(*packed_shift_codes(weight, bits, channel_scale=channel_scale, rounding=rounding), bits)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bits: int = 5) -> Self:
        """Store ``codes``, shape (out, in), uint8: sign above magnitude; and ``scale``, shape (out,)."""
        new = cls(tuple(codes.shape), bits).to(codes.device)
        if tuple(scale.shape) != new.shape[:1]:
            raise QuernelError(f"scale must have shape {new.shape[:1]}; got {tuple(scale.shape)}")
        check_finite("scale", scale)
        # Some rows at a time: planes and shifted copies of all codes would be several times their size.
        for part, packed in zip(codes.split(_PACKED_ROWS), new.codes.split(_PACKED_ROWS), strict=True):
            packed.copy_(pack_codes(part, bits))
        new.scale = scale.detach().float().clone()
        return new

    def unpack(self) -> Tensor:
        """Return the codes, shape (out, in), uint8."""
        return unpack_codes(self.codes[: self.shape[0]], self.bits, self.shape[1])

    def dense(self) -> Tensor:
        """Return the weight in float32."""
        return decode_codes(self.unpack(), self.bits) * self.scale[:, None]

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` in the dtype of ``x``."""
        return self.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:  # x: (..., in) -> (..., out)
        """Return the whole layer as one operation."""
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:  # codes are padded: they fit other sizes as well
            raise QuernelError(f"x must have shape (..., {self.shape[1]}); got {tuple(x.shape)}")
        return shift_linear(x, self.codes, self.scale, bias, bits=self.bits)

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Decode only the rows of ``ids``."""
        codes = unpack_codes(self.codes[: self.shape[0]][ids], self.bits, self.shape[1])
        return decode_codes(codes, self.bits) * self.scale[ids].unsqueeze(-1)

    def config(self) -> dict[str, Any]:
        """Return shape and bits."""
        return {"shape": list(self.shape), "bits": self.bits}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(config["shape"], config["bits"])

    def extra_repr(self) -> str:
        """Show shape, bits and bytes."""
        return f"shape={self.shape}, bits={self.bits}, nbytes={self.nbytes}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
