"""``split_depthwise``: some channels as they are, each group of the others under a depthwise window of its own.

    y[..., c] = x[..., c]                          for the first C - n g channels
    y[..., c] = bias + sum over the window of x    for n groups of g channels, windows of odd sides, zeros beyond

What InceptionNeXt's token mixer computes (arXiv 2303.16900), in one pass over channels-last images: nothing is cut out
and put together again.  On CPUs with AVX-512; elsewhere a convolution a group and a concatenation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from quernel._errors import QuernelError
from quernel._intrinsics import portable
from quernel.nn import _split_depthwise_kernels as kernels
from quernel.nn._native_ranges import parts_for, run_ranges

# Multiply-adds and copies below which a second thread costs more than it saves.
GRAIN = 2**18


def split_depthwise(x: Tensor, taps: Tensor, bias: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Filter groups of channels by windows of their own and leave the others.

    Parameters
    ----------
    x : Tensor, shape (B, H, W, C)
        Channels last.
    taps : Tensor, shape (T, g)
        The windows one after another, row by row, T taps in all; g channels each.
    bias : Tensor, shape (n * g,)
        Of the groups one after another, the last channels of x.
    sizes : sequence of (int, int)
        Height and width of the n windows, odd.

    Returns
    -------
    y : Tensor, shape (B, H, W, C)

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit.

    Notes
    -----
    The floor is reading x and writing y; T g multiply-adds a pixel beside it.  Second derivatives raise.

    Examples
    --------
    >>> import torch
    >>> x, taps = torch.ones(1, 3, 3, 4), torch.ones(3, 1)
    >>> split_depthwise(x, taps, torch.zeros(1), [(1, 3)])[0, 0, :, 3]
    tensor([2., 3., 2.])
    """
    y: Tensor = _op(x, taps, bias, [side for size in sizes for side in size])
    return y


def _check(x: Tensor, taps: Tensor, bias: Tensor, sizes: Sequence[int]) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if x.ndim != 4 or taps.ndim != 2 or bias.ndim != 1:
        raise QuernelError(
            f"x must have shape (B, H, W, C), taps (T, g) and bias (n g,); got {tuple(x.shape)}, {tuple(taps.shape)} "
            f"and {tuple(bias.shape)}"
        )
    windows, group = len(sizes) // 2, taps.shape[1]
    if any(side < 1 or side % 2 == 0 for side in sizes) or sum(_counts(sizes)) != taps.shape[0]:
        raise QuernelError(f"sizes must be odd and hold the {taps.shape[0]} taps together; got {list(sizes)}")
    if bias.shape[0] != windows * group or windows * group > x.shape[3]:
        raise QuernelError(
            f"bias must hold one value for each of {windows} x {group} channels, at most the {x.shape[3]} of x; got "
            f"{bias.shape[0]}"
        )
    if not x.is_floating_point() or taps.dtype != x.dtype or bias.dtype != x.dtype:
        raise QuernelError(f"x, taps and bias must be of one floating dtype; got {x.dtype}, {taps.dtype}, {bias.dtype}")


def _counts(sizes: Sequence[int]) -> list[int]:
    return [high * wide for high, wide in zip(sizes[::2], sizes[1::2], strict=True)]


def _able(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0 and not portable()


@functools.lru_cache(maxsize=256)
def _table(sizes: tuple[int, ...]) -> Tensor:
    """Return the sizes as the kernels read them."""
    return torch.tensor(sizes, dtype=torch.int64, device="cpu")


def _run(work: int, x: Tensor, taps: Tensor, bias: Tensor | None, y: Tensor, sizes: Sequence[int], room: int) -> Tensor:
    """Run a kernel over the rows of contiguous images; returns what it wrote into the scratch, (parts, room)."""
    batch, height, width, channels = x.shape
    windows, group = len(sizes) // 2, taps.shape[1]
    parts = parts_for(batch * height, x.numel() + batch * height * width * taps.numel(), GRAIN)
    scratch, shape = x.new_zeros(parts, room), _table(tuple(sizes))
    fields = (
        *(x.data_ptr(), taps.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), height, width),
        *(channels, channels - windows * group, group, windows, shape.data_ptr()),
        *(max(sizes[::2], default=1) // 2 + 1, scratch.data_ptr(), room),
    )
    run_ranges(work, fields, batch * height, parts)
    return scratch


def _filter(x: Tensor, taps: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    _check(x, taps, bias, sizes)
    if not _able(x):
        return _plain(x, taps, bias, sizes)
    x, taps = x.contiguous(), taps.contiguous()
    y = torch.empty_like(x)
    _run(kernels.filters(), x, taps, bias.contiguous(), y, sizes, 0)
    return y


def _gradients(
    g: Tensor, x: Tensor, taps: Tensor, sizes: Sequence[int], by_x: bool, by_taps: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by the taps; empty where not wanted."""
    zeros = g.new_zeros(len(sizes) // 2 * taps.shape[1])
    flipped = torch.cat([part.flip(0) for part in taps.split(_counts(sizes))]) if sizes else taps
    of_x = _filter(g, flipped, zeros, sizes) if by_x else g.new_empty(0)
    if not by_taps:
        return of_x, g.new_empty(0)
    if not _able(x):
        return of_x, _plain_correlated(g, x, taps, sizes)
    g, x = g.contiguous(), x.contiguous()
    sums = _run(kernels.correlates(), x, taps, None, g, sizes, taps.numel())
    return of_x, sums.sum(0).view(taps.shape)


def _parts(x: Tensor, taps: Tensor, sizes: Sequence[int]) -> Any:
    """Return the copied channels, the groups and their weights, all channels first; x: (B, H, W, C)."""
    windows, group = len(sizes) // 2, taps.shape[1]
    kept, *groups = x.permute(0, 3, 1, 2).split([x.shape[3] - windows * group, *[group] * windows], dim=1)
    shapes = zip(sizes[::2], sizes[1::2], strict=True)
    parts = taps.split(_counts(sizes)) if sizes else ()
    weights = [part.mT.reshape(group, 1, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return kept, groups, weights


def _plain(x: Tensor, taps: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    _check(x, taps, bias, sizes)
    kept, groups, weights = _parts(x, taps, sizes)
    biases = bias.split(taps.shape[1]) if sizes else ()
    mixed = [
        F.conv2d(part, weight, b, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=len(weight))
        for part, weight, b in zip(groups, weights, biases, strict=True)
    ]
    return torch.cat([kept, *mixed], dim=1).permute(0, 2, 3, 1).contiguous()


def _plain_correlated(g: Tensor, x: Tensor, taps: Tensor, sizes: Sequence[int]) -> Tensor:
    _, grads, weights = _parts(g, taps, sizes)
    _, groups, _ = _parts(x, taps, sizes)
    found = []
    for grad, part, weight in zip(grads, groups, weights, strict=True):
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            grad, part, weight, None, [1, 1], padding, [1, 1], False, [0, 0], len(weight), [False, True, False]
        )
        found.append(of_weight.flatten(1).mT)
    return torch.cat(found).contiguous() if found else taps.new_zeros(taps.shape)


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "split_depthwise(Tensor x, Tensor taps, Tensor bias, int[] sizes) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(
    "split_depthwise_backward(Tensor g, Tensor x, Tensor taps, int[] sizes, bool by_x, bool by_taps)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _device in ("CPU", "CUDA"):
    _library.impl("split_depthwise", _filter, _device)
    _library.impl("split_depthwise_backward", _gradients, _device)
_op = torch.ops.quernel.split_depthwise.default
_backward_op = torch.ops.quernel.split_depthwise_backward.default


@torch.library.register_fake("quernel::split_depthwise", lib=_library)
def _fake(x: Tensor, taps: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    _check(x, taps, bias, sizes)
    return x.new_empty(x.shape)


@torch.library.register_fake("quernel::split_depthwise_backward", lib=_library)
def _fake_gradients(
    g: Tensor, x: Tensor, taps: Tensor, sizes: Sequence[int], by_x: bool, by_taps: bool
) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape if by_x else 0), g.new_empty(taps.shape if by_taps else 0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, taps, _, ctx.sizes = inputs
    ctx.save_for_backward(x, taps)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, taps = ctx.saved_tensors
    by_x, by_taps, by_bias, _ = ctx.needs_input_grad
    of_x, of_taps = _backward_op(g, x, taps, ctx.sizes, by_x, by_taps)
    of_bias = g[..., g.shape[3] - len(ctx.sizes) // 2 * taps.shape[1] :].sum((0, 1, 2)) if by_bias else None
    return of_x if by_x else None, of_taps if by_taps else None, of_bias, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise QuernelError("split_depthwise has no second derivative; use torch's convolutions where one is needed")


torch.library.register_autograd("quernel::split_depthwise", _backward, setup_context=_remember, lib=_library)
torch.library.register_autograd("quernel::split_depthwise_backward", _no_second_derivative, lib=_library)


@register_flop_formula([torch.ops.quernel.split_depthwise_backward])
def _flops_of_gradients(g: Any, x: Any, taps: Any, sizes: Any, by_x: bool, by_taps: bool, **__: Any) -> int:
    return (by_x + by_taps) * _flops(x, taps)


@register_flop_formula([torch.ops.quernel.split_depthwise])
def _flops(x: Any, taps: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0] * x[1] * x[2] * taps[0] * taps[1])


def _warmup() -> None:
    """Compile the kernels; ``quernel warmup`` calls it."""
    x, taps = torch.ones(1, 2, 2, 2), torch.ones(1, 1)
    _filter(x, taps, torch.ones(1), [1, 1]), _gradients(x, x, taps, [1, 1], True, True)
