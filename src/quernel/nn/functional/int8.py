"""``int8_linear``: a whole linear layer in int8, from float activations to float activations.

quantise rows -> int8 GEMM (``torch._int_mm``, exact int32 sums) -> scale, bias and activation, as one custom op
``quernel::int8_linear``.  With codes q = round(x * inverse * levels / t), t the largest entry of the row,

    y = activation((q @ codes.T) * (t / levels) * scale + bias).

The rows run in blocks, each through all three passes while its int32 sums are in the cache.
"""

from __future__ import annotations

import functools
import struct
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._intrinsics import portable
from quernel._validate import check_choice, check_int, check_probability
from quernel.nn import _int8_chain
from quernel.nn._int8_kernels import ACTIVATIONS, SMALLEST, dequantiser, quantiser

# From this many products of 127 * 127 on, an int32 sum could overflow.
MAX_FEATURES = (2**31 - 1) // 127**2
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TINY = float(SMALLEST)


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    inverse: Tensor | None = None,
    bits: int = 8,
    row: str = "tight",
    alpha: float = 1.0,
    activation: str | None = None,
) -> Tensor:
    """Quantise the rows of ``x``, multiply in int8, scale back, add the bias, activate.

    Parameters
    ----------
    x : Tensor, shape (..., in_features)
        float32 and bfloat16 are read and written as they are; float16 and float64 pass through float32.
    codes : Tensor, shape (out_features, in_features), int8
        Weight codes in [-127, 127], row-major.
    scale : Tensor, shape (out_features,)
        Step of each output channel: the weight is ``codes * scale[:, None]``.
    bias : Tensor, shape (out_features,), optional
    inverse : Tensor, shape (in_features,), optional
        Factor of each input channel, applied before quantisation: 1 / s where s is folded into the weight.
    bits : int, default=8
        Bits of the activation codes, 4 to 8; the largest code is 2^(bits - 1) - 1.
    row : {"tight", "bound"}, default="tight"
        Step of a row: ``max|x * inverse| / levels``, or ``max|x|^alpha / levels`` with codes clamped.
    alpha : float, default=1.0
        Exponent of ``row="bound"``, in [0, 1].
    activation : {None, "relu", "gelu", "gelu_tanh", "silu"}
        Applied before the result is rounded to the dtype of ``x``.

    Returns
    -------
    y : Tensor, shape (..., out_features)
        Dtype of ``x``.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit, an option is unknown, or ``in_features`` exceeds 133 144.

    Notes
    -----
    The codes and their sums are the same integers on every device and thread count.  A row with NaN or infinity
    comes out as NaN; one that is zero, or below 1e-36, as ``activation(bias)``.  Gradients are straight-through:
    rounding counts as the identity; ``x`` and ``bias`` receive them, the other operands are constants.

    Examples
    --------
    >>> import torch
    >>> codes, scale = torch.tensor([[127, 0], [0, 127]], dtype=torch.int8), torch.full((2,), 1 / 127)
    >>> int8_linear(torch.tensor([[1.0, -0.5]]), codes, scale).round(decimals=2)
    tensor([[ 1.0000, -0.5000]])
    """
    check_choice("row", row, ("tight", "bound"))
    check_choice("activation", activation, tuple(ACTIVATIONS))
    exponent = check_probability("alpha", alpha) if row == "bound" else None
    return apply_int8_linear(x, codes, scale, bias, inverse, levels_of(bits), exponent, activation)


def levels_of(bits: int) -> int:
    """Return the largest code of a symmetric quantiser of 4 to 8 bits."""
    return 2 ** (check_int("bits", bits, low=4, high=8) - 1) - 1


def apply_int8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inverse: Tensor | None,
    levels: int,
    alpha: float | None,
    activation: str | None,
) -> Tensor:
    """``int8_linear`` for layers that checked their options when they were built; ``alpha=None`` is "tight"."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _StraightThrough.apply(x, codes, scale, bias, inverse, levels, alpha, activation)  # type: ignore[no-untyped-call]
    return _op(x, codes, scale, bias, inverse, levels, alpha, activation)


def compute(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inverse: Tensor | None,
    levels: int,
    alpha: float | None,
    activation: str | None,
) -> Tensor:
    _check(x, codes, scale, bias, inverse)
    bf16 = x.dtype is torch.bfloat16
    if not bf16 and x.dtype is not torch.float32:
        return compute(x.float(), codes, scale, bias, inverse, levels, alpha, activation).to(x.dtype)
    out_features, in_features = codes.shape
    # torch's int8 GEMM leaves its output unwritten for one input feature (it trusts the stride of an axis of size
    # one), and is a plain triple loop on processors without AVX-512 VNNI.
    if not x.numel() or not out_features or in_features == 1 or portable() or not _int8_chain.available():
        return plain(x, codes, scale, bias, inverse, levels, alpha, activation)
    x = x if x.is_contiguous() else x.contiguous()
    out = x.new_empty((*x.shape[:-1], out_features))
    # The names keep the memory behind the addresses alive.
    column, offset = float_constant(scale), float_zeros(out_features) if bias is None else float_constant(bias)
    factors = column if inverse is None else float_constant(inverse)  # not read where there is no inverse
    weight = codes if codes.stride() == (in_features, 1) else codes.clone(memory_format=torch.contiguous_format)
    operands = (
        x.data_ptr(),
        factors.data_ptr(),
        levels,
        0 if alpha is None else bits_of(alpha),
        weight.data_ptr(),
        column.data_ptr(),
        offset.data_ptr(),
        out.data_ptr(),
    )
    quantise = quantiser(bf16, inverse is not None, alpha is not None).address
    dequantise = dequantiser(bf16, ACTIVATIONS[activation]).address
    n = x.numel() // in_features
    _int8_chain.apply(quantise, dequantise, operands, n, in_features, out_features, x.element_size())
    return out


def bits_of(number: float) -> int:
    return int.from_bytes(struct.pack("=d", number), sys.byteorder, signed=True)


def plain(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inverse: Tensor | None,
    levels: int,
    alpha: float | None,
    activation: str | None,
) -> Tensor:
    """The same integers by plain torch operations: for devices without the kernels, and degenerate operands."""
    _check(x, codes, scale, bias, inverse)
    raw = x.float()
    v = raw if inverse is None else raw * inverse.float()
    peaked = (v if alpha is None else raw).abs()
    peak = peaked.amax(-1, keepdim=True) if x.shape[-1] else v.new_zeros((*x.shape[:-1], 1))
    if alpha is not None:
        peak = torch.where(peak >= TINY, (peak.double() ** alpha).float(), peak)
    finite = peak < torch.inf  # False for NaN too
    used = finite & (peak >= TINY)
    q = torch.where(used, v * torch.where(used, levels / peak, 0.0), 0.0).round().clamp(-levels, levels)
    step = torch.where(finite, torch.where(used, peak / levels, 0.0), torch.nan)
    # Sums of integers are exact below 2^24 in float32 and below 2^53 in float64, in any order.
    wide = torch.float32 if x.shape[-1] * levels * 128 < 2**24 else torch.float64
    y = F.linear(q.to(wide), codes.to(wide)).float() * (step * scale.float())
    y = y if bias is None else y + bias.float()
    return _activate(y, activation).to(x.dtype)


def _check(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, inverse: Tensor | None) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if codes.ndim != 2 or codes.dtype is not torch.int8:
        raise QuernelError(f"codes must be int8 of shape (out, in); got {codes.dtype} of shape {tuple(codes.shape)}")
    out_features, in_features = codes.shape
    check_operands(x, out_features, in_features, scale, bias, inverse)


def check_operands(
    x: Tensor, out_features: int, in_features: int, scale: Tensor, bias: Tensor | None, inverse: Tensor | None
) -> None:
    """Raise unless all but the codes fit a weight of these features."""
    if x.ndim == 0 or x.shape[-1] != in_features or x.dtype not in FLOATS:
        raise QuernelError(
            f"x must be floating of shape (..., {in_features}) to fit a weight of shape {(out_features, in_features)}; "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if in_features > MAX_FEATURES:
        raise QuernelError(
            f"in_features must be at most {MAX_FEATURES}, or int32 sums of products could overflow; "
            f"got {in_features}. Split the layer along its inputs and add the parts"
        )
    for name, vector in (("scale", scale), ("bias", bias), ("inverse", inverse)):
        size = in_features if name == "inverse" else out_features
        if vector is not None and (vector.ndim != 1 or vector.shape[0] != size or vector.dtype not in FLOATS):
            raise QuernelError(
                f"{name} must be floating of shape ({size},) to fit a weight of shape {(out_features, in_features)}; "
                f"got {vector.dtype} of shape {tuple(vector.shape)}"
            )


def float_constant(vector: Tensor) -> Tensor:
    fits = vector.dtype is torch.float32 and vector.is_contiguous()
    return vector if fits else vector.to(torch.float32).contiguous()


@functools.lru_cache(maxsize=64)
def float_zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float32, device="cpu")


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    if activation == "silu":
        return F.silu(y)
    return y if activation is None else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward(g: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return g * (y > 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(g, y)
    form = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(g, y, approximate=form)


class _StraightThrough(torch.autograd.Function):
    """Gradients of the layer as if ``x`` were not rounded."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, codes, scale, bias, inverse, *options = arguments
        # Only an activation needs to know where it was evaluated.
        ctx.save_for_backward(None if options[-1] is None else x, codes, scale, bias, inverse)
        ctx.options, ctx.dtype = options, x.dtype
        return _op(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, codes, scale, bias, inverse = ctx.saved_tensors
        levels, alpha, activation = ctx.options
        g = grads[0].float()
        if activation is not None:
            before = _op(x.float(), codes, scale, bias, inverse, levels, alpha, None)
            g = activate_backward(g, before, activation)
        bias_grad = g.reshape(-1, g.shape[-1]).sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        x_grad = (g * scale) @ codes.float()
        x_grad = x_grad if inverse is None else x_grad * inverse
        return x_grad.to(ctx.dtype), None, None, bias_grad, None, None, None, None


# The low-level interface: an op made by torch.library.custom_op costs 10 us a call here, this one 2.5 us.
_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? inverse, "
    "int levels, float? alpha, str? activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("int8_linear", compute, "CPU")
_library.impl("int8_linear", plain, "CUDA")
_op = torch.ops.quernel.int8_linear.default


@torch.library.register_fake("quernel::int8_linear", lib=_library)
def _fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, inverse: Tensor | None, *_: Any) -> Tensor:
    _check(x, codes, scale, bias, inverse)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _warmup() -> None:
    """Compile the passes of every dtype, scale rule and activation; ``quernel warmup`` calls it."""
    codes, scale = torch.ones(16, 16, dtype=torch.int8), torch.ones(16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, 16, dtype=dtype)
        for inverse in (None, scale):
            for alpha in (None, 1.0):
                compute(x, codes, scale, None, inverse, 127, alpha, None)
        for activation in ACTIVATIONS:
            compute(x, codes, scale, None, None, 127, None, activation)
