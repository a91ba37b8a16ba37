"""Power-of-two weights: rounding a matrix to them, and ``shift_linear``, a linear layer over 5- or 6-bit codes.

    W[o, k] ~= scale[o] * sign[o, k] * 2^p[o, k],    p in -(2^(bits - 1) - 2) .. 0, and zero

(DeepShift, arXiv 1905.13298).  A row is divided by its largest magnitude before rounding, so that the few exponents lie
where its weights are; ``scale`` is then the least-squares factor.  On the CPU the product of powers is no cheaper than
any other: what codes save is bytes, and thereby time where reading the weight is what costs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges, workspace
from quernel._validate import check_int
from quernel.nn._shift_kernels import BLOCK, HALF, ROWS, block_bytes, expand, products, top_exponent
from quernel.nn.functional.straight_through import decode_powers, power_codes

MIN_BITS, MAX_BITS = 3, 6
# Up to here the kernel over codes beats expanding them and torch's product.
CODED_ROWS = 4
# A thread gets at least this many bytes of codes; starting a team costs about 5 us.
GRAIN_BYTES = 2**18
# Bytes of a matrix expanded at a time: larger temporaries go back to the system and fault in again.
EXPANDED_BYTES = 2**22


class ShiftCodes(NamedTuple):
    """Exponents and signs (int32, the shape of the weight; sign 0 is a zero) and the factor of each row (float32)."""

    exponents: Tensor
    signs: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """Return ``scale * signs * 2^exponents`` in float32."""
        return decode_powers(self.exponents, self.signs) * self.scale[:, None]

    def packed(self, bits: int) -> Tensor:
        """Return one number a weight, uint8: the magnitude in the low bits, 0 for zero, and the sign above them."""
        magnitude = torch.where(self.signs == 0, 0, self.exponents + top_exponent(bits))
        return (magnitude + torch.where(self.signs < 0, 2 ** (bits - 1), 0)).to(torch.uint8)


def exponent_range(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest exponent of a code with a sign, zero and ``bits`` bits: 5 gives -14, 0."""
    return 1 - top_exponent(check_int("bits", bits, low=MIN_BITS, high=MAX_BITS)), 0


def shift_codes(weight: Tensor, bits: int, *, channel_scale: bool = True, rounding: str = "log") -> ShiftCodes:
    """Round a matrix to signed powers of two.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
        Any floating dtype.
    bits : int
        3 to 6: a sign, zero, and 3, 7, 15 or 31 exponents up to 2^0.
    channel_scale : bool, default=True
        Divide each row by its largest magnitude before rounding, and give the least-squares factor; else the factor
        is 1 and magnitudes above sqrt(2) are clipped to 1.
    rounding : {"log", "nearest"}, default="log"
        As in ``power_of_two``.

    Returns
    -------
    codes : ShiftCodes

    Notes
    -----
    Rounding a result again changes nothing.
    """
    low, high = exponent_range(bits)
    held = weight.detach()
    if not channel_scale:
        exponents, signs = power_codes(held, low, high, rounding=rounding)
        return ShiftCodes(exponents, signs, torch.ones(len(held), device=held.device))
    wide = held.to(torch.float64 if held.dtype == torch.float64 else torch.float32)
    largest = wide.abs().amax(1, keepdim=True) if wide.shape[1] else wide.new_ones(len(wide), 1)
    exponents, signs = power_codes(wide / torch.where(largest > 0, largest, 1.0), low, high, rounding=rounding)
    # float64: a factor that was found once must come out again to the last bit.
    powers = decode_powers(exponents, signs).double()
    square = powers.square().sum(1)
    scale = (powers * wide.double()).sum(1) / torch.where(square > 0, square, 1.0)
    return ShiftCodes(exponents, signs, torch.where(square > 0, scale, 1.0).float())


def packed_shift_codes(
    weight: Tensor, bits: int, *, stored: int | None = None, channel_scale: bool = True, rounding: str = "log"
) -> tuple[Tensor, Tensor]:
    """Return ``ShiftCodes.packed(stored)`` and the factors, some rows at a time.

    Exponents, signs and float64 powers of a whole matrix would be ten times its size.
    """
    rows = max(1, EXPANDED_BYTES // (16 * max(1, weight.shape[1])))
    packed = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    for part, *made in zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True):
        codes = shift_codes(part, bits, channel_scale=channel_scale, rounding=rounding)
        made[0].copy_(codes.packed(stored or bits))
        made[1].copy_(codes.scale)
    return packed, scale


def pack_codes(codes: Tensor, bits: int) -> Tensor:  # (out, in) uint8 -> (rows, blocks, 8 * bits) uint8
    """Pack 5- or 6-bit codes in blocks of 64, rows filled up to a multiple of four with zeros.

    Raises
    ------
    QuernelError
        If the codes are no uint8 matrix, or leave 0 .. 2^bits - 1.
    """
    check_int("bits", bits, low=5, high=6)
    if codes.ndim != 2 or codes.dtype is not torch.uint8:
        raise QuernelError(f"codes must be uint8 of shape (out, in); got {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise QuernelError(f"codes must lie in 0..{2**bits - 1} to fit {bits} bits; got {int(codes.max())}")
    out_features, in_features = codes.shape
    rows, blocks, _ = packed_codes_shape(out_features, in_features, bits)
    whole = codes.new_zeros(rows, blocks, BLOCK)
    whole.view(rows, -1)[:out_features, :in_features] = codes
    planes = [whole[..., :HALF] & 15 | whole[..., HALF:] << 4, _bit_plane(whole >> (bits - 1))]
    if bits == 6:
        planes.append(_bit_plane(whole >> 4 & 1))
    return torch.cat(planes, -1)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:  # (..., blocks, 8 * bits) -> (..., in) uint8
    """Return the codes that ``pack_codes`` took, of any selection of its rows."""
    octets, signs, *above = packed.split((HALF, 8, *[8] * (bits - 5)), -1)
    codes = torch.cat([octets & 15, octets >> 4], -1) | _spread(signs) << (bits - 1)
    if above:
        codes = codes | _spread(above[0]) << 4
    return codes.flatten(-2)[..., :in_features]


def packed_codes_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """Return the shape that ``pack_codes`` gives."""
    return -(-out_features // ROWS) * ROWS, -(-in_features // BLOCK), block_bytes(bits)


def decode_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the powers of two, float32, that codes as of ``ShiftCodes.packed`` stand for."""
    magnitude = codes.to(torch.int32) & top_exponent(bits)
    sign = torch.where(magnitude == 0, 0, 1 - 2 * (codes.to(torch.int32) >> (bits - 1)))
    return decode_powers(magnitude - top_exponent(bits), sign)


def shift_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, bits: int = 5) -> Tensor:
    """Multiply by a matrix of powers of two kept in 5 or 6 bits a weight.

    Parameters
    ----------
    x : Tensor, shape (..., in_features)
        Floating point.
    codes : Tensor, shape (4 * ceil(out_features / 4), ceil(in_features / 64), 8 * bits), uint8
        As ``pack_codes`` gives them.
    scale : Tensor, shape (out_features,)
        Factor of each output.
    bias : Tensor, shape (out_features,), optional
    bits : {5, 6}, default=5

    Returns
    -------
    y : Tensor, shape (..., out_features)
        Dtype of ``x``.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit.

    Notes
    -----
    Up to four rows of ``x`` are multiplied by the codes themselves, with 16 bits of precision a number and sums in
    float32; more of them by torch, with the matrix expanded block by block.  Gradients reach ``x`` and ``bias``.

    Examples
    --------
    >>> import torch
    >>> codes = pack_codes(torch.tensor([[15, 30]], dtype=torch.uint8), bits=5)
    >>> shift_linear(torch.tensor([[1.0, 1.0]]), codes, torch.ones(1))
    tensor([[0.5000]])
    """
    check_int("bits", bits, low=5, high=6)
    needs = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if needs or x.device.type != "cpu":
        _check(x, codes, scale, bias, bits)
        powers = decode_codes(unpack_codes(codes[: len(scale)], bits, x.shape[-1]), bits)
        wide = x if x.dtype == torch.float64 else x.float()
        y = F.linear(wide, powers.to(wide.dtype)) * scale
        return (y if bias is None else y + bias).to(x.dtype)
    return _op(x, codes, scale, bias, bits)


def _compute(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    _check(x, codes, scale, bias, bits)
    out_features, in_features = len(scale), x.shape[-1]
    rows = (
        x.detach().reshape(-1, in_features) if x.numel() else x.detach().new_empty(math.prod(x.shape[:-1]), in_features)
    )
    packed = codes.contiguous()
    if 0 < len(rows) <= CODED_ROWS and out_features and x.dtype is not torch.float64:
        y = _coded(rows.float(), packed, scale, bias, bits)
    else:
        y = _expanded(rows, packed, scale, bits)
        y = y if bias is None else y.add_(bias.detach().to(y.dtype))
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def _coded(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """Multiply a few rows by the codes; x: (n, in) float32."""
    out = torch.empty(len(x), len(scale), dtype=torch.float32, device="cpu")
    blocks = codes.shape[1]
    whole = F.pad(x, (0, blocks * BLOCK - x.shape[1])).view(len(x), blocks, BLOCK)
    first = whole.bfloat16()
    # What bfloat16 lost; nothing where it overflowed.
    rest = torch.where(first.isfinite(), whole - first.float(), 0.0).bfloat16()
    halves = torch.stack([first, rest], 2).view(torch.int16).numpy().view(np.uint16)
    factors = scale.detach().float().contiguous().numpy()
    offset = np.zeros_like(factors) if bias is None else bias.detach().float().contiguous().numpy()
    places, y = codes.numpy(), out.numpy()
    grain = max(1, GRAIN_BYTES // (ROWS * blocks * codes.shape[2]))

    def work(start: int, stop: int) -> None:
        products(places, bits, halves, factors, offset, y, start, stop)

    parallel_ranges(work, len(codes) // ROWS, grain=grain)
    return out


def _expanded(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Multiply many rows by blocks of the expanded matrix; powers of two are exact in the dtype of ``x``."""
    dtype = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
    wide = x.to(torch.float64 if x.dtype is torch.float64 else dtype)
    out = torch.empty(len(x), len(scale), dtype=wide.dtype, device="cpu")
    columns, places = x.shape[1], codes.numpy()
    factors = scale.detach().to(torch.promote_types(out.dtype, torch.float32))
    step = max(1, EXPANDED_BYTES // max(1, columns * dtype.itemsize))
    kind = torch.int16 if dtype is torch.bfloat16 else torch.int32
    for first in range(0, len(scale), step):
        last = min(first + step, len(scale))
        held = workspace("shift_linear expanded", (last - first) * columns, kind).view(last - first, columns)
        bits_of_rows = held.numpy().view(np.uint16 if dtype is torch.bfloat16 else np.uint32)

        def work(start: int, stop: int, first: int = first, rows: Any = bits_of_rows) -> None:
            expand(places, bits, rows[start:stop], first + start, first + stop)

        parallel_ranges(work, last - first, grain=max(1, GRAIN_BYTES // max(1, columns)))
        torch.mul(F.linear(wide, held.view(dtype).to(wide.dtype)), factors[first:last], out=out[:, first:last])
    return out


def _check(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if x.ndim == 0 or not x.is_floating_point():
        raise QuernelError(f"x must be floating of shape (..., in_features); got {x.dtype} of shape {tuple(x.shape)}")
    if scale.ndim != 1 or not scale.is_floating_point():
        raise QuernelError(f"scale must be a floating vector; got {scale.dtype} of shape {tuple(scale.shape)}")
    wanted = packed_codes_shape(scale.shape[0], x.shape[-1], bits)
    if tuple(codes.shape) != wanted or codes.dtype is not torch.uint8:
        raise QuernelError(
            f"codes must be uint8 of shape {wanted} to fit {scale.shape[0]} outputs and {x.shape[-1]} inputs in {bits} "
            f"bits; got {codes.dtype} of shape {tuple(codes.shape)}"
        )
    if bias is not None and (bias.shape != scale.shape or not bias.is_floating_point()):
        raise QuernelError(
            f"bias must be floating of shape {tuple(scale.shape)}; got {bias.dtype} of shape {tuple(bias.shape)}"
        )


def _bit_plane(bits: Tensor) -> Tensor:  # (..., 64) of 0 and 1 -> (..., 8)
    weights = 2 ** torch.arange(8, device=bits.device)
    return (bits.unflatten(-1, (8, 8)) * weights).sum(-1).to(torch.uint8)


def _spread(octets: Tensor) -> Tensor:  # (..., 8) -> (..., 64) of 0 and 1
    return (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=octets.device) & 1).flatten(-2)


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "shift_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("shift_linear", _compute, "CPU")
_op = torch.ops.quernel.shift_linear.default


@torch.library.register_fake("quernel::shift_linear", lib=_library)
def _fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    _check(x, codes, scale, bias, bits)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _warmup() -> None:
    """Compile the products and the expansion; ``quernel warmup`` calls it."""
    for bits in (5, 6):
        codes = torch.zeros(packed_codes_shape(ROWS, BLOCK, bits), dtype=torch.uint8)
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, CODED_ROWS + 1):
                _compute(torch.ones(rows, BLOCK, dtype=dtype), codes, torch.ones(ROWS), None, bits)
