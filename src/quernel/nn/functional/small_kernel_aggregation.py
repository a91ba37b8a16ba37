"""``ska``: a small depthwise filter that differs from place to place, shared by strided groups of channels.

    y[b, c, i, j] = sum_{u, v} x[b, c, i + u - p, j + v - p] w[b, c mod G, u k + v, i, j],   p = k // 2

G weight sets serve C channels: c, c + G, c + 2 G, ... share one (LSNet, arXiv 2503.23135).  The sum over places of g y
is linear in each of g, x and w, so three ops, each the derivative of the others, give derivatives of any order.  CPUs
with AVX-512 take compiled kernels; anything else adds shifted products, one a tap, in two to six times the time.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from quernel._errors import QuernelError
from quernel._intrinsics import LANES, portable
from quernel._validate import check_choice
from quernel.nn import _aggregation_kernels as kernels
from quernel.nn._native_ranges import parts_for, run_ranges

BACKENDS = ("auto", "compiled", "torch", "triton")
# Multiply-adds below which a second thread costs more than it saves.
GRAIN = 2**18
HALVES = (torch.bfloat16, torch.float16)


def ska(x: Tensor, w: Tensor, backend: Literal["auto", "compiled", "torch", "triton"] = "auto") -> Tensor:
    """Filter every place with weights of its own.

    Parameters
    ----------
    x : Tensor, shape (B, C, H, W)
        Contiguous or ``channels_last``; zeros beyond the border.
    w : Tensor, shape (B, G, k * k, H, W)
        Row by row the k x k weights at each place, k odd; G divides C and channel c takes set c mod G.
    backend : {"auto", "compiled", "torch", "triton"}, default="auto"
        "compiled" is for float32 and k of 3 and 5 on CPUs with AVX-512, "triton" for GPUs; "auto" takes what there is.

    Returns
    -------
    y : Tensor, shape (B, C, H, W)
        In the memory format of x.  Half precision is summed in float32.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit, or the backend cannot compute this here.

    Notes
    -----
    C k^2 multiply-adds a place; reads k^2 G / C of an activation for the weights, no unfolded copy.

    References
    ----------
    Wang et al., "LSNet: See Large, Focus Small", arXiv 2503.23135, CVPR 2025.

    Examples
    --------
    >>> import torch
    >>> x, w = torch.randn(1, 4, 5, 5), torch.zeros(1, 2, 9, 5, 5)
    >>> w[:, :, 4] = 1.0  # the centre tap
    >>> torch.equal(ska(x, w), x)
    True
    """
    check_choice("backend", backend, BACKENDS)
    _check(x, w)
    y: Tensor = torch.ops.quernel.ska(x, w, backend)
    return y


def _check(x: Tensor, w: Tensor) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if x.ndim != 4 or w.ndim != 5 or w.shape[0] != x.shape[0] or w.shape[3:] != x.shape[2:]:
        raise QuernelError(
            "x must have shape (B, C, H, W) and w (B, G, k * k, H, W), weights for every place; got "
            f"{tuple(x.shape)} and {tuple(w.shape)}"
        )
    size = _size(w)
    if size * size != w.shape[2] or size % 2 == 0:
        raise QuernelError(f"w must hold k * k weights a place with k odd, such as 9 or 25; got {w.shape[2]}")
    if w.shape[1] == 0 or x.shape[1] % w.shape[1]:
        raise QuernelError(
            f"w must have a number of weight sets that divides the {x.shape[1]} channels of x; got {w.shape[1]}"
        )
    if x.dtype != w.dtype or not x.is_floating_point():
        raise QuernelError(f"x and w must be of one floating dtype; got {x.dtype} and {w.dtype}")


def _size(w: Tensor) -> int:
    return round(w.shape[2] ** 0.5)


def _is_last(x: Tensor) -> bool:
    """Whether an image (or weights seen as one) has its channels last in memory."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _weights_like(x: Tensor, sets: int, taps: int) -> Tensor:
    """Return memory for weights in the format of an image."""
    batch, _, height, width = x.shape
    if _is_last(x):
        return x.new_empty(batch, height, width, sets, taps).permute(0, 3, 4, 1, 2)
    return x.new_empty(batch, sets, taps, height, width)


def _compiled(backend: str, x: Tensor, taps: int) -> bool:
    """Whether the compiled kernels do it; raise where they are asked for and cannot."""
    if backend == "triton":
        raise QuernelError("backend='triton' is for tensors on a GPU; these are on the CPU. Use backend='auto'")
    able = x.dtype is not torch.float64 and taps in [s * s for s in kernels.SIZES] and not portable()
    if backend == "compiled" and not able:
        raise QuernelError(
            f"backend='compiled' needs AVX-512, float32 or half precision and 3x3 or 5x5 weights; got {x.dtype} and "
            f"{taps} weights. Use backend='auto'"
        )
    return able and backend != "torch"


def _run(x: Tensor, w: Tensor, y: Tensor, *, flipped: bool = False, weighs: bool = False) -> None:
    """Run a kernel over float32 images x and y of one memory format; writes y, or w where it weighs."""
    batch, channels, height, width = x.shape
    sets, taps, pixels = w.shape[1], w.shape[2], height * width
    if x.numel() == 0:
        return
    size, last = _size(w), _is_last(x)
    masks = kernels.tap_masks(size, height, width, 1 if last else LANES)
    places = kernels.offsets(size, width, channels, sets, pixels, last, flipped)
    fields = (
        *(x.data_ptr(), 4 * channels * pixels, w.data_ptr(), 4 * sets * taps * pixels),
        *(y.data_ptr(), 4 * channels * pixels, sets, channels // sets, 4 * sets * (1 if last else pixels)),
        *(pixels, size, masks.data_ptr(), places.data_ptr(), places.data_ptr() + 8 * taps),
        kernels.cell(size, last, weighs),
    )
    items = batch * (pixels if last else sets)
    work = kernels.pixels() if last else kernels.planes()
    run_ranges(work, fields, items, parts_for(items, x.numel() * taps, GRAIN))


def _ready(x: Tensor) -> Tensor:
    """Return an image in float32 and one of the two memory formats."""
    x = x.float()
    return x if x.is_contiguous() or _is_last(x) else x.contiguous()


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """Return y in float32 and the memory format of x, images or weights."""
    y = y.float()
    if y.ndim == 5:
        return y.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) if _is_last(x) else y.contiguous()
    return y.contiguous(memory_format=torch.channels_last if _is_last(x) else torch.contiguous_format)


def _by_triton(backend: str, x: Tensor, w: Tensor) -> Any:
    """Return the Triton kernels where they are for these tensors on a GPU, else None; raise where asked for in vain."""
    if backend == "compiled":
        raise QuernelError(f"backend='compiled' is for the CPU; these tensors are on {x.device}. Use backend='auto'")
    if backend == "torch":
        return None
    known = importlib.util.find_spec("triton") is not None
    found = importlib.import_module("quernel.nn._aggregation_triton") if known else None
    if found is None or not found.takes(x, w, size=_size(w)):
        if backend == "triton":
            raise QuernelError(
                f"backend='triton' needs Triton and weights of at most 7x7 in float32 or half precision; got {x.dtype} "
                f"and {w.shape[2]} weights{'' if known else ', without Triton'}. Use backend='auto'"
            )
        return None
    return found


def _filter_on_gpu(x: Tensor, w: Tensor, backend: str, flipped: bool = False) -> Tensor:
    _check(x, w)
    kernels = _by_triton(backend, x, w)
    if kernels is None:
        return (_input_gradient_plain if flipped else _filter_plain)(x, w, backend)
    y = torch.empty_like(x)
    kernels.run(x, w, y, flipped=flipped)
    return y


def _input_gradient_on_gpu(g: Tensor, w: Tensor, backend: str) -> Tensor:
    return _filter_on_gpu(g, w, backend, True)


def _weight_gradient_on_gpu(g: Tensor, x: Tensor, sets: int, taps: int, backend: str) -> Tensor:
    w = _weights_like(x, sets, taps)
    kernels = _by_triton(backend, x, w)
    if kernels is None:
        return _weight_gradient_plain(g, x, sets, taps, backend)
    kernels.run(x, w, g, weighs=True)
    return w


def _filter(x: Tensor, w: Tensor, backend: str) -> Tensor:
    _check(x, w)
    if not _compiled(backend, x, w.shape[2]):
        return _filter_plain(x, w, backend)
    ready = _ready(x)
    y = torch.empty_like(ready)
    _run(ready, _alike(ready, w), y)
    return y.to(x.dtype)


def _input_gradient(g: Tensor, w: Tensor, backend: str) -> Tensor:
    _check(g, w)
    if not _compiled(backend, g, w.shape[2]):
        return _input_gradient_plain(g, w, backend)
    ready = _ready(g)
    y = torch.empty_like(ready)
    _run(ready, _alike(ready, w), y, flipped=True)
    return y.to(g.dtype)


def _weight_gradient(g: Tensor, x: Tensor, sets: int, taps: int, backend: str) -> Tensor:
    if not _compiled(backend, x, taps):
        return _weight_gradient_plain(g, x, sets, taps, backend)
    ready = _ready(x)
    w = _weights_like(ready, sets, taps)
    _run(ready, w, _alike(ready, g), weighs=True)
    return w.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def _shifts(x: Tensor, size: int) -> list[Tensor]:
    """Return the views of a padded image, (..., H + 2 p, W + 2 p), that its taps read."""
    height, width = x.shape[-2] - size + 1, x.shape[-1] - size + 1
    return [x[..., u : u + height, v : v + width] for u in range(size) for v in range(size)]


def _grouped(x: Tensor, sets: int) -> Tensor:  # (B, C, H, W) -> (B, C / G, G, H, W)
    return _wide(x).unflatten(1, (-1, sets))


def _filter_plain(x: Tensor, w: Tensor, backend: str) -> Tensor:
    size, half = _size(w), _size(w) // 2
    padded = F.pad(_grouped(x, w.shape[1]), (half,) * 4)
    weights = _wide(w)[:, None].unbind(3)
    y = torch.zeros_like(_grouped(x, w.shape[1]))
    for shifted, weight in zip(_shifts(padded, size), weights, strict=True):
        y.addcmul_(shifted, weight)
    return torch.empty_like(x).copy_(y.flatten(1, 2))


def _input_gradient_plain(g: Tensor, w: Tensor, backend: str) -> Tensor:
    size, half = _size(w), _size(w) // 2
    grads = _grouped(g, w.shape[1])
    padded = F.pad(torch.zeros_like(grads), (half,) * 4)
    for shifted, weight in zip(_shifts(padded, size), _wide(w)[:, None].unbind(3), strict=True):
        shifted.addcmul_(grads, weight)
    inner = padded[..., half : half + g.shape[2], half : half + g.shape[3]]
    return torch.empty_like(g).copy_(inner.flatten(1, 2))


def _weight_gradient_plain(g: Tensor, x: Tensor, sets: int, taps: int, backend: str) -> Tensor:
    size = round(taps**0.5)
    padded, grads = F.pad(_grouped(x, sets), (size // 2,) * 4), _grouped(g, sets)
    w = _weights_like(x, sets, taps)
    for tap, shifted in enumerate(_shifts(padded, size)):
        w[:, :, tap] = (grads * shifted).sum(1)
    return w


_library = torch.library.Library("quernel", "FRAGMENT")
for _schema in (
    "ska(Tensor x, Tensor w, str backend)",
    "ska_input_gradient(Tensor g, Tensor w, str backend)",
    "ska_weight_gradient(Tensor g, Tensor x, int sets, int taps, str backend)",
):
    _library.define(f"{_schema} -> Tensor", tags=torch.Tag.pt2_compliant_tag)
for _name, _on_cpu, _on_gpu in (
    ("ska", _filter, _filter_on_gpu),
    ("ska_input_gradient", _input_gradient, _input_gradient_on_gpu),
    ("ska_weight_gradient", _weight_gradient, _weight_gradient_on_gpu),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_gpu, "CUDA")


@torch.library.register_fake("quernel::ska", lib=_library)
def _fake(x: Tensor, w: Tensor, backend: str) -> Tensor:
    _check(x, w)
    return torch.empty_like(x)


@torch.library.register_fake("quernel::ska_input_gradient", lib=_library)
def _fake_input_gradient(g: Tensor, w: Tensor, backend: str) -> Tensor:
    return torch.empty_like(g)


@torch.library.register_fake("quernel::ska_weight_gradient", lib=_library)
def _fake_weight_gradient(g: Tensor, x: Tensor, sets: int, taps: int, backend: str) -> Tensor:
    return _weights_like(x, sets, taps)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *ctx.rest = inputs
    ctx.save_for_backward(first, second)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    ops, backend = torch.ops.quernel, ctx.rest[-1]
    of_x = ops.ska_input_gradient(g, w, backend) if ctx.needs_input_grad[0] else None
    of_w = ops.ska_weight_gradient(g, x, w.shape[1], w.shape[2], backend) if ctx.needs_input_grad[1] else None
    return of_x, of_w, None


def _backward_of_input_gradient(ctx: Any, a: Tensor) -> tuple[Any, ...]:
    g, w = ctx.saved_tensors
    ops, backend = torch.ops.quernel, ctx.rest[-1]
    of_g = ops.ska(a, w, backend) if ctx.needs_input_grad[0] else None
    of_w = ops.ska_weight_gradient(g, a, w.shape[1], w.shape[2], backend) if ctx.needs_input_grad[1] else None
    return of_g, of_w, None


def _backward_of_weight_gradient(ctx: Any, b: Tensor) -> tuple[Any, ...]:
    g, x = ctx.saved_tensors
    ops, backend = torch.ops.quernel, ctx.rest[-1]
    of_g = ops.ska(x, b, backend) if ctx.needs_input_grad[0] else None
    of_x = ops.ska_input_gradient(g, b, backend) if ctx.needs_input_grad[1] else None
    return of_g, of_x, None, None, None


for _name, _derivative in (
    ("ska", _backward),
    ("ska_input_gradient", _backward_of_input_gradient),
    ("ska_weight_gradient", _backward_of_weight_gradient),
):
    torch.library.register_autograd(f"quernel::{_name}", _derivative, setup_context=_remember, lib=_library)


@register_flop_formula([torch.ops.quernel.ska, torch.ops.quernel.ska_input_gradient])
def _flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    batch, channels, height, width = x
    return 2 * int(batch * channels * height * width * w[2])


@register_flop_formula([torch.ops.quernel.ska_weight_gradient])
def _flops_of_weights(g: Any, x: Any, sets: int, taps: int, *_: Any, **__: Any) -> int:
    return _flops(x, (0, 0, taps))


def _warmup() -> None:
    """Compile the kernels of 3x3 weights in both memory formats; ``quernel warmup`` calls it."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(1, 2, 2, 2).contiguous(memory_format=layout)
        w = torch.ones(1, 2, 9, 2, 2)
        _filter(x, w, "auto"), _input_gradient(x, w, "auto"), _weight_gradient(x, x, 2, 9, "auto")
