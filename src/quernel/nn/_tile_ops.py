"""Custom ops of a ``TileMap``: products with its virtual matrix, the matrix itself, rows of it, and their gradients.

    tile_linear   y = scale x W^T + bias, keeping x alone for backward
    tile_conv2d   the same for a convolution, W seen as (out, in / groups * kh * kw)
    tile_expand   W without its scale; its gradient is tile_scatter, and the other way round
    tile_rows     rows of W

A map is passed as ``TileMap.operands()`` and, for given ones, starts and signs. CPU tensors take the compiled passes
of ``_tile_panels`` and ``_tile_gradient``; on GPUs the kernels of ``_tile_triton``, where Triton is installed and tiles
have sides of 16 to 128, and torch's operations elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.hashing import TileMap
from quernel.nn import _tile_gradient as gradient
from quernel.nn import _tile_panels as panels
from quernel.nn import _tile_plain as plain
from quernel.nn._tile_panels import Tiles


@dataclass(frozen=True, eq=False)
class TileOperands:
    """A map in the form that ops take: integers, given starts, given signs."""

    operands: tuple[int, ...]
    starts: Tensor | None
    flips: Tensor | None

    @classmethod
    def of(cls, tile_map: TileMap) -> Self:
        """Take the numbers of a map."""
        given = (tile_map.starts, tile_map.given_signs)
        return cls(tile_map.operands(), *(None if held is None else torch.from_numpy(held) for held in given))

    @property
    def arguments(self) -> tuple[list[int], Tensor | None, Tensor | None]:
        """What every op takes last."""
        return list(self.operands), self.starts, self.flips


Operands = Sequence[int]
Given = Tensor | None
Steps = Sequence[int]


def tile_linear(x: Tensor, memory: Tensor, bias: Given, scale: float, tiles: TileOperands) -> Tensor:
    """Return ``scale * x @ W.T + bias`` in the dtype of ``x``; x: (..., in)."""
    rows, columns = tiles.operands[1:3]
    if x.ndim == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise QuernelError(f"x must be floating with {columns} features; got {x.dtype} of shape {tuple(x.shape)}")
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = _linear(x.reshape(-1, columns), memory, bias, scale, *tiles.arguments)
    return y.reshape(*x.shape[:-1], rows)


def tile_conv2d(
    x: Tensor,
    memory: Tensor,
    bias: Given,
    scale: float,
    tiles: TileOperands,
    shape: Steps,
    stride: Steps,
    padding: Steps,
    dilation: Steps,
    groups: int,
) -> Tensor:
    """Convolve ``x`` (N, C, H, W) with W of this shape (out, in / groups, kh, kw)."""
    bias = None if bias is None else bias.to(x.dtype)
    geometry = (list(shape), list(stride), list(padding), list(dilation), groups)
    y: Tensor = _conv2d(x, memory, bias, scale, *geometry, *tiles.arguments)
    return y


def tile_expand(memory: Tensor, tiles: TileOperands) -> Tensor:
    """Return W, (out, in), without its scale."""
    w: Tensor = _expand(memory, *tiles.arguments)
    return w


def tile_scatter(source: Tensor, tiles: TileOperands) -> Tensor:
    """Return for every slot the sum of the signed numbers of ``source`` (out, in) that are kept there, (m,)."""
    total: Tensor = _scatter(source, *tiles.arguments)
    return total


def tile_sums(u: Tensor, v: Tensor, tiles: TileOperands) -> Tensor:
    """Return ``tile_scatter`` of the outer product of u (out,) and v (in,), which is never formed; (m,)."""
    empty = u.new_empty(tiles.operands[0])
    total: Tensor = _linear_backward(u[None], v[None], empty, 1.0, [False, True], *tiles.arguments)[1]
    return total


def tile_rows(memory: Tensor, ids: Tensor, tiles: TileOperands) -> Tensor:
    """Return rows of W without its scale, (*ids.shape, in)."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise QuernelError(f"ids must be integers; got {ids.dtype}. Convert them with .long()")
    rows: Tensor = _rows(memory, ids.reshape(-1).long(), *tiles.arguments)
    return rows.reshape(*ids.shape, tiles.operands[2])


def _held(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors that kernels may read: contiguous, and without a graph on threads that do not know its mode."""
    return tuple(t.detach().contiguous() for t in tensors)


def _linear_cpu(
    x: Tensor, memory: Tensor, bias: Given, scale: float, operands: Operands, starts: Given, flips: Given
) -> Tensor:
    x, memory = _held(x, memory)
    bias = None if bias is None else bias.detach()
    return panels.linear(Tiles.of(operands, starts, flips), x, memory, bias, scale)


def _linear_plain(
    x: Tensor, memory: Tensor, bias: Given, scale: float, operands: Operands, starts: Given, flips: Given
) -> Tensor:
    kernels = plain.fused(operands, starts, flips, x, memory)
    if kernels is not None:
        return kernels.linear(operands, x, memory, bias, scale)
    w = plain.expand(operands, starts, flips, memory).to(x.dtype) * scale
    return torch.nn.functional.linear(x, w, bias)


def _linear_backward_cpu(
    grad: Tensor,
    x: Tensor,
    memory: Tensor,
    scale: float,
    wanted: Sequence[bool],
    operands: Operands,
    starts: Given,
    flips: Given,
) -> tuple[Tensor, Tensor]:
    tiles = Tiles.of(operands, starts, flips)
    grad, x, memory = _held(grad, x, memory)
    dx = panels.input_gradient(tiles, grad, memory, scale) if wanted[0] else x.new_empty(0)
    dm = gradient.memory_gradient(tiles, grad, x, scale).to(memory.dtype) if wanted[1] else memory.new_empty(0)
    return dx, dm


def _linear_backward_plain(
    grad: Tensor,
    x: Tensor,
    memory: Tensor,
    scale: float,
    wanted: Sequence[bool],
    operands: Operands,
    starts: Given,
    flips: Given,
) -> tuple[Tensor, Tensor]:
    dx, dm = x.new_empty(0), memory.new_empty(0)
    kernels = plain.fused(operands, starts, flips, grad, x, memory)
    if kernels is not None:
        dx = kernels.input_gradient(operands, grad, memory, scale) if wanted[0] else dx
        return dx, kernels.memory_gradient(operands, grad, x, scale).to(memory.dtype) if wanted[1] else dm
    if wanted[0]:
        dx = grad @ (plain.expand(operands, starts, flips, memory).to(grad.dtype) * scale)
    if wanted[1]:
        dm = (plain.scatter(operands, starts, flips, grad.mT @ x) * scale).to(memory.dtype)
    return dx, dm


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, memory, bias, ctx.scale, ctx.operands, starts, flips = inputs
    ctx.save_for_backward(x, memory, starts, flips)
    ctx.biased = bias is not None


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, memory, starts, flips = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    dx, dm = _linear_backward(grad, x, memory, ctx.scale, wanted, ctx.operands, starts, flips)
    db = grad.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
    return dx if wanted[0] else None, dm if wanted[1] else None, db, *[None] * 4


def _conv2d_any(
    x: Tensor,
    memory: Tensor,
    bias: Given,
    scale: float,
    shape: Steps,
    stride: Steps,
    padding: Steps,
    dilation: Steps,
    groups: int,
    operands: Operands,
    starts: Given,
    flips: Given,
) -> Tensor:
    w = (_expand(memory, operands, starts, flips).to(x.dtype) * scale).view(*shape)
    return torch.conv2d(x, w, bias, stride, padding, dilation, groups)


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, memory, bias, ctx.scale, *ctx.geometry, ctx.operands, starts, flips = inputs
    ctx.save_for_backward(x, memory, starts, flips)
    ctx.biased = bias is not None


def _conv2d_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, memory, starts, flips = ctx.saved_tensors
    shape, stride, padding, dilation, groups = ctx.geometry
    wanted = [*ctx.needs_input_grad[:2], ctx.biased and ctx.needs_input_grad[2]]
    w = (_expand(memory, ctx.operands, starts, flips).to(x.dtype) * ctx.scale).view(*shape)
    sizes = [shape[0]] if ctx.biased else None
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    dx, dw, db = torch.ops.aten.convolution_backward(grad, x, w, sizes, *geometry, wanted)
    dm = None
    if wanted[1]:
        dm = (_scatter(dw.reshape(shape[0], -1), ctx.operands, starts, flips) * ctx.scale).to(memory.dtype)
    return dx if wanted[0] else None, dm, db if wanted[2] else None, *[None] * 9


def _expand_cpu(memory: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    return panels.expand(Tiles.of(operands, starts, flips), *_held(memory))


def _expand_plain(memory: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    kernels = plain.fused(operands, starts, flips, memory)
    if kernels is not None:
        return kernels.expand(operands, memory)
    return plain.expand(operands, starts, flips, memory)


def _scatter_cpu(source: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    return gradient.scatter(Tiles.of(operands, starts, flips), *_held(source)).to(source.dtype)


def _scatter_plain(source: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    kernels = plain.fused(operands, starts, flips, source)
    if kernels is not None:
        return kernels.scatter(operands, source).to(source.dtype)
    return plain.scatter(operands, starts, flips, source).to(source.dtype)


def _rows_cpu(memory: Tensor, ids: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    _check_ids(ids, operands[1])
    return panels.expand_rows(Tiles.of(operands, starts, flips), *_held(memory, ids))


def _rows_plain(memory: Tensor, ids: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    return plain.expand(operands, starts, flips, memory)[ids]


def _scatter_rows_cpu(source: Tensor, ids: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    _check_ids(ids, operands[1])
    return panels.scatter_rows(Tiles.of(operands, starts, flips), *_held(source, ids)).to(source.dtype)


def _scatter_rows_plain(source: Tensor, ids: Tensor, operands: Operands, starts: Given, flips: Given) -> Tensor:
    w = source.new_zeros(operands[1], operands[2]).index_add_(0, ids, source)
    return plain.scatter(operands, starts, flips, w).to(source.dtype)


def _check_ids(ids: Tensor, rows: int) -> None:
    """Raise unless every id is a row: the kernels read without bounds checks."""
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise QuernelError(f"ids must lie in [0, {rows}); got values in [{int(ids.min())}, {int(ids.max())}]")


def _expand_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.operands, starts, flips = inputs
    ctx.save_for_backward(starts, flips)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, ctx.operands, starts, flips = inputs
    ctx.save_for_backward(ids, starts, flips)


def _expand_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _scatter(grad, ctx.operands, *ctx.saved_tensors), None, None, None


def _scatter_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _expand(grad, ctx.operands, *ctx.saved_tensors), None, None, None


def _rows_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, starts, flips = ctx.saved_tensors
    return _scatter_rows(grad, ids, ctx.operands, starts, flips), *[None] * 4


def _scatter_rows_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, starts, flips = ctx.saved_tensors
    return _rows(grad, ids, ctx.operands, starts, flips), *[None] * 4


_library = torch.library.Library("quernel", "FRAGMENT")
_IN, _MAP = "Tensor x, Tensor memory", "int[] operands, Tensor? starts, Tensor? flips"
_GEOMETRY = "int[] shape, int[] stride, int[] padding, int[] dilation, int groups"
for _signature in (
    f"tile_linear({_IN}, Tensor? bias, float scale, {_MAP}) -> Tensor",
    f"tile_linear_backward(Tensor grad, {_IN}, float scale, bool[] wanted, {_MAP}) -> (Tensor, Tensor)",
    f"tile_conv2d({_IN}, Tensor? bias, float scale, {_GEOMETRY}, {_MAP}) -> Tensor",
    f"tile_expand(Tensor memory, {_MAP}) -> Tensor",
    f"tile_scatter(Tensor source, {_MAP}) -> Tensor",
    f"tile_rows(Tensor memory, Tensor ids, {_MAP}) -> Tensor",
    f"tile_scatter_rows(Tensor source, Tensor ids, {_MAP}) -> Tensor",
):
    _library.define(_signature, tags=torch.Tag.pt2_compliant_tag)
for _name, _compiled, _general in (
    ("tile_linear", _linear_cpu, _linear_plain),
    ("tile_linear_backward", _linear_backward_cpu, _linear_backward_plain),
    ("tile_conv2d", _conv2d_any, _conv2d_any),
    ("tile_expand", _expand_cpu, _expand_plain),
    ("tile_scatter", _scatter_cpu, _scatter_plain),
    ("tile_rows", _rows_cpu, _rows_plain),
    ("tile_scatter_rows", _scatter_rows_cpu, _scatter_rows_plain),
):
    _library.impl(_name, _compiled, "CPU")
    _library.impl(_name, _general, "CUDA")
_linear = torch.ops.quernel.tile_linear.default
_linear_backward = torch.ops.quernel.tile_linear_backward.default
_conv2d = torch.ops.quernel.tile_conv2d.default
_expand = torch.ops.quernel.tile_expand.default
_scatter = torch.ops.quernel.tile_scatter.default
_rows = torch.ops.quernel.tile_rows.default
_scatter_rows = torch.ops.quernel.tile_scatter_rows.default


@torch.library.register_fake("quernel::tile_linear", lib=_library)
def _linear_fake(x: Tensor, memory: Tensor, bias: Given, scale: float, operands: Operands, *given: Given) -> Tensor:
    return x.new_empty(x.shape[0], operands[1])


@torch.library.register_fake("quernel::tile_linear_backward", lib=_library)
def _linear_backward_fake(
    grad: Tensor, x: Tensor, memory: Tensor, scale: float, wanted: Sequence[bool], operands: Operands, *given: Given
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if wanted[0] else x.new_empty(0),
        memory.new_empty(memory.shape if wanted[1] else 0),
    )


@torch.library.register_fake("quernel::tile_conv2d", lib=_library)
def _conv2d_fake(
    x: Tensor, memory: Tensor, bias: Given, scale: float, shape: Steps, stride: Steps, padding: Steps,
    dilation: Steps, groups: int, operands: Operands, *given: Given,
) -> Tensor:  # fmt: skip
    return torch.conv2d(x, x.new_empty(*shape), bias, stride, padding, dilation, groups)


@torch.library.register_fake("quernel::tile_expand", lib=_library)
def _expand_fake(memory: Tensor, operands: Operands, *given: Given) -> Tensor:
    return memory.new_empty(operands[1], operands[2])


@torch.library.register_fake("quernel::tile_scatter", lib=_library)
def _scatter_fake(source: Tensor, operands: Operands, *given: Given) -> Tensor:
    return source.new_empty(operands[0])


@torch.library.register_fake("quernel::tile_rows", lib=_library)
def _rows_fake(memory: Tensor, ids: Tensor, operands: Operands, *given: Given) -> Tensor:
    return memory.new_empty(ids.shape[0], operands[2])


@torch.library.register_fake("quernel::tile_scatter_rows", lib=_library)
def _scatter_rows_fake(source: Tensor, ids: Tensor, operands: Operands, *given: Given) -> Tensor:
    return source.new_empty(operands[0])


for _name, _grad, _setup in (
    ("tile_linear", _linear_grad, _linear_setup),
    ("tile_conv2d", _conv2d_grad, _conv2d_setup),
    ("tile_expand", _expand_grad, _expand_setup),
    ("tile_scatter", _scatter_grad, _expand_setup),
    ("tile_rows", _rows_grad, _rows_setup),
    ("tile_scatter_rows", _scatter_rows_grad, _rows_setup),
):
    torch.library.register_autograd(f"quernel::{_name}", _grad, setup_context=_setup, lib=_library)


def _warmup() -> None:
    """Compile the passes; ``quernel warmup`` calls it."""
    tiles = TileOperands.of(TileMap(300, (17, 17), (16, 16)))
    for dtype in (torch.float32, torch.bfloat16):
        memory, ids = torch.ones(300, dtype=dtype, requires_grad=True), torch.tensor([0, 8])
        for rows in (1, 8):
            tile_linear(
                torch.ones(rows, 17, dtype=dtype, requires_grad=True), memory, None, 1.0, tiles
            ).sum().backward()
        (tile_expand(memory, tiles).sum() + tile_rows(memory, ids, tiles).sum()).backward()
