"""``int4_linear``: a linear layer with 4-bit weights and int8 activations, one integer product a layer.

Few tokens (decoding) go through the fused kernel that reads the packed codes; many (prefill) expand the weight to int8
once a call, in memory that all layers of a thread share, and take torch's int8 product.  Both give the same integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges, workspace
from quernel._validate import check_choice, check_probability
from quernel.nn import _int4_chain, _int4_kernels
from quernel.nn._int4_packing import CHUNK, GROUP_SIZES, ROWS, packed_shape, unpack
from quernel.nn._int8_kernels import ACTIVATIONS, dequantiser, quantiser
from quernel.nn.functional import int8

# Up to here the fused kernel beats expanding and torch's int8 product: 3 times at 4096 x 4096, level at 1024 x 1024.
DECODE_TOKENS = 32
# A thread expands at least this many bytes of codes.
GRAIN = 2**18


def int4_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_scale: Tensor | None = None,
    group_zero: Tensor | None = None,
    table: Tensor | None = None,
    inverse: Tensor | None = None,
    bits: int = 8,
    row: str = "tight",
    alpha: float = 1.0,
    activation: str | None = None,
) -> Tensor:
    """Quantise the rows of ``x``, multiply with 4-bit weights in integers, scale back, add the bias, activate.

    The integer weight is ``group_scale * (code - group_zero)``, or ``table[code]``.

    Parameters
    ----------
    x : Tensor, shape (..., in_features)
        float32 and bfloat16 are read and written as they are; float16 and float64 pass through float32.
    codes : Tensor, shape (ceil(out_features / 4), ceil(in_features / 128), 4, 64), uint8
        Two 4-bit codes a byte, as ``quernel.nn.weights.Int4GroupWeight`` and ``Int4TableWeight`` store them.
    scale : Tensor, shape (out_features,)
        Factor of each output channel.
    bias : Tensor, shape (out_features,), optional
    group_scale, group_zero : Tensor, shape (4 * ceil(out_features / 4), groups), int8 and uint8, optional
        Integer scale in 1..127 and zero point in 0..15 of each group of 32, 64 or 128 inputs; ``groups`` covers whole
        chunks of 128 inputs.  Products must stay in [-127, 127].
    table : Tensor, shape (16,), int8, optional
        Value of each code, in place of the groups; in [-127, 127].
    inverse, bits, row, alpha, activation
        As in ``int8_linear``.

    Returns
    -------
    y : Tensor, shape (..., out_features)
        Dtype of ``x``.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit, or neither or both of groups and table are given.

    Notes
    -----
    The integers are the same on every device, path and thread count.  Gradients are straight-through, to ``x`` and
    ``bias``.  Rows with NaN or infinity come out as NaN.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn.weights import Int4TableWeight
    >>> w = Int4TableWeight.from_codes(torch.tensor([[1, 9]], dtype=torch.uint8), torch.ones(1), list(range(-8, 8)))
    >>> int4_linear(torch.tensor([[1.0, 1.0]]), w.codes, w.scale, table=w.table)
    tensor([[-6.]])
    """
    check_choice("row", row, ("tight", "bound"))
    check_choice("activation", activation, tuple(ACTIVATIONS))
    exponent = check_probability("alpha", alpha) if row == "bound" else None
    weight = (codes, scale, group_scale, group_zero, table)
    return apply_int4_linear(x, *weight, bias, inverse, int8.levels_of(bits), exponent, activation)


def apply_int4_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor | None,
    levels: int,
    alpha: float | None,
    activation: str | None,
) -> Tensor:
    """``int4_linear`` for layers that checked their options when they were built; ``alpha=None`` is "tight"."""
    arguments = (x, codes, scale, group_scale, group_zero, table, bias, inverse, levels, alpha, activation)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _StraightThrough.apply(*arguments)  # type: ignore[no-untyped-call]
    return _op(*arguments)


def expand_int4(
    codes: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Return the int8 weight of shape (out_features, in_features) that packed codes stand for."""
    q = unpack(codes, out_features, in_features)
    if table is not None:
        return table[q.int()]
    if group_scale is None or group_zero is None:
        raise QuernelError("group_scale and group_zero must be given together, or table in their place")
    columns = torch.arange(in_features, device=codes.device) // group_size_of(codes, group_scale)
    scales, zeros = (part[:out_features].index_select(1, columns) for part in (group_scale, group_zero))
    return scales * (q.to(torch.int8) - zeros.to(torch.int8))


def group_size_of(codes: Tensor, group_scale: Tensor) -> int:
    """Return the inputs a group from the shapes of codes and scales."""
    return codes.shape[1] * CHUNK // max(1, group_scale.shape[1])


def _compute(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor | None,
    levels: int,
    alpha: float | None,
    activation: str | None,
) -> Tensor:
    weight = (codes, group_scale, group_zero, table)
    _check(x, scale, *weight, bias, inverse)
    out_features, in_features = scale.shape[0], x.shape[-1]
    n = x.numel() // max(1, in_features)
    if n > DECODE_TOKENS or not x.numel() or not out_features:
        dense = _expanded(*weight, out_features, in_features)
        return int8.compute(x, dense, scale, bias, inverse, levels, alpha, activation)
    bf16 = x.dtype is torch.bfloat16
    if not bf16 and x.dtype is not torch.float32:
        x32 = (x.float(), codes, scale, group_scale, group_zero, table)
        return _compute(*x32, bias, inverse, levels, alpha, activation).to(x.dtype)
    out = x.new_empty((*x.shape[:-1], out_features))
    # The names keep the memory behind the addresses alive.
    x, codes, constants, zeros = (part.contiguous() for part in (x, *_operands(*weight)))
    column = int8.float_constant(scale)
    offset = int8.float_zeros(out_features) if bias is None else int8.float_constant(bias)
    factors = column if inverse is None else int8.float_constant(inverse)  # not read where there is no inverse
    group = 0 if table is not None else group_size_of(codes, constants)
    passes = (
        quantiser(bf16, inverse is not None, alpha is not None).address,
        _int4_kernels.product(group).address,
        dequantiser(bf16, ACTIVATIONS[activation]).address,
    )
    weights = (codes.data_ptr(), constants.data_ptr(), zeros.data_ptr())
    ends = (column.data_ptr(), offset.data_ptr(), out.data_ptr())
    exponent = 0 if alpha is None else int8.bits_of(alpha)
    operands = (x.data_ptr(), factors.data_ptr(), levels, exponent, *weights, *ends)
    _int4_chain.apply(passes, operands, (n, in_features, out_features, x.element_size(), group))
    return out


def _operands(
    codes: Tensor, group_scale: Tensor | None, group_zero: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, constants and zeros of the kernels; a table has no zeros, and names its own memory instead."""
    if table is not None and group_scale is None and group_zero is None:
        return codes, table, table
    if table is None and group_scale is not None and group_zero is not None:
        return codes, group_scale, group_zero
    raise QuernelError("int4_linear takes either group_scale and group_zero, or table; got another combination")


def _expanded(
    codes: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Return the int8 weight in memory that the next layer of this thread overwrites."""
    codes, constants, zeros = (part.contiguous() for part in _operands(codes, group_scale, group_zero, table))
    out = workspace("int4_expanded", out_features * in_features, torch.int8).view(out_features, in_features)
    places = (codes.data_ptr(), constants.data_ptr(), zeros.data_ptr(), out.data_ptr())
    group = 0 if table is not None else group_size_of(codes, constants)

    def work(start: int, stop: int) -> None:
        _int4_kernels.expand(group)(*places, out_features, in_features, start, stop)

    parallel_ranges(work, codes.shape[0], grain=max(1, GRAIN // max(1, codes[0].numel() if len(codes) else 1)))
    return out


def _plain(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor | None,
    levels: int,
    alpha: float | None,
    activation: str | None,
) -> Tensor:
    """The same integers by plain torch operations, for devices without the kernels."""
    _check(x, scale, codes, group_scale, group_zero, table, bias, inverse)
    dense = expand_int4(codes, group_scale, group_zero, table, scale.shape[0], x.shape[-1])
    return int8.plain(x, dense, scale, bias, inverse, levels, alpha, activation)


def _check(
    x: Tensor,
    scale: Tensor,
    codes: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor | None,
) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if x.ndim == 0 or scale.ndim != 1:
        raise QuernelError(f"x needs a feature axis and scale one; got {tuple(x.shape)} and {tuple(scale.shape)}")
    wanted = packed_shape(scale.shape[0], x.shape[-1])
    if codes.shape != wanted or codes.dtype is not torch.uint8:
        raise QuernelError(
            f"codes must be uint8 of shape {wanted} to fit {scale.shape[0]} outputs and {x.shape[-1]} inputs "
            f"(shape of x: {tuple(x.shape)}); got {codes.dtype} of shape {tuple(codes.shape)}"
        )
    int8.check_operands(x, scale.shape[0], x.shape[-1], scale, bias, inverse)
    _, constants, zeros = _operands(codes, group_scale, group_zero, table)
    if table is not None:
        if tuple(table.shape) != (16,) or table.dtype is not torch.int8:
            raise QuernelError(f"table must be int8 of shape (16,); got {table.dtype} of shape {tuple(table.shape)}")
        return
    rows, width = wanted[0] * ROWS, wanted[1] * CHUNK
    # What fits is told in one step: a decoded token waits for it.
    fits = constants.shape in [(rows, width // size) for size in GROUP_SIZES] and zeros.shape == constants.shape
    if fits and constants.dtype is torch.int8 and zeros.dtype is torch.uint8:
        return
    for name, part, dtype in (("group_scale", constants, torch.int8), ("group_zero", zeros, torch.uint8)):
        size = group_size_of(codes, part) if part.ndim == 2 else 0
        if size not in GROUP_SIZES or part.shape != (rows, width // size) or part.dtype is not dtype:
            shapes = " or ".join(str((rows, width // size)) for size in GROUP_SIZES)
            raise QuernelError(
                f"{name} must be {dtype} of shape {shapes} for groups of {GROUP_SIZES} inputs; "
                f"got {part.dtype} of shape {tuple(part.shape)}"
            )
    if constants.shape != zeros.shape:
        raise QuernelError(
            f"group_zero must have the shape of group_scale, {tuple(constants.shape)}; got {tuple(zeros.shape)}"
        )


class _StraightThrough(torch.autograd.Function):
    """Gradients of the layer as if ``x`` were not rounded."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, codes, scale, group_scale, group_zero, table, bias, inverse, *options = arguments
        # Only an activation needs to know where it was evaluated.
        kept = None if options[-1] is None else x
        ctx.save_for_backward(kept, codes, scale, group_scale, group_zero, table, bias, inverse)
        ctx.options, ctx.dtype, ctx.in_features = options, x.dtype, x.shape[-1]
        return _op(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, codes, scale, group_scale, group_zero, table, bias, inverse = ctx.saved_tensors
        levels, alpha, activation = ctx.options
        weight = (codes, group_scale, group_zero, table)
        g = grads[0].float()
        if activation is not None:
            before = _op(x.float(), codes, scale, group_scale, group_zero, table, bias, inverse, levels, alpha, None)
            g = int8.activate_backward(g, before, activation)
        bias_grad = g.reshape(-1, g.shape[-1]).sum(0).to(bias.dtype) if ctx.needs_input_grad[6] else None
        x_grad = (g * scale) @ expand_int4(*weight, scale.shape[0], ctx.in_features).float()
        x_grad = x_grad if inverse is None else x_grad * inverse
        return x_grad.to(ctx.dtype), *[None] * 5, bias_grad, *[None] * 4


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "int4_linear(Tensor x, Tensor codes, Tensor scale, Tensor? group_scale, Tensor? group_zero, Tensor? table, "
    "Tensor? bias, Tensor? inverse, int levels, float? alpha, str? activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("int4_linear", _compute, "CPU")
_library.impl("int4_linear", _plain, "CUDA")
_op = torch.ops.quernel.int4_linear.default


@torch.library.register_fake("quernel::int4_linear", lib=_library)
def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    group_zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor | None,
    *_: Any,
) -> Tensor:
    _check(x, scale, codes, group_scale, group_zero, table, bias, inverse)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _warmup() -> None:
    """Compile the products of every group size and of tables; ``quernel warmup`` calls it."""
    x, scale = torch.ones(1, CHUNK), torch.ones(ROWS)
    codes = torch.zeros(packed_shape(ROWS, CHUNK), dtype=torch.uint8)
    for size in GROUP_SIZES:
        ones = torch.ones(ROWS, CHUNK // size, dtype=torch.int8)
        for rows in (1, DECODE_TOKENS + 1):
            _compute(x.expand(rows, -1), codes, scale, ones, ones.to(torch.uint8), None, None, None, 127, None, None)
    _compute(x, codes, scale, None, None, torch.zeros(16, dtype=torch.int8), None, None, 127, None, None)
