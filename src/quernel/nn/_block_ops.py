"""Custom op ``quernel::block_bag``: sums of rows that a ``BlockMap`` reads from one shared array, with gradients.

    out[bag] = sum over the ids i of the bag of  weight_i scale_f row(first_f + id_i),   f = i mod F the field of i

A row look-up is a bag of one id. Nothing but ids is kept for the backward pass; it hashes them again. Sums and
gradients of a bfloat16 or float16 array are in float32, rounded once at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._intrinsics import LANES
from quernel._threads import num_threads, parallel_ranges
from quernel.hashing.block_map import BlockMap
from quernel.hashing.mixers import U64
from quernel.nn import _block_kernels
from quernel.nn._block_plain import (
    Layout,
    Parts,
    bag_plain,
    bags_of,
    check,
    check_grad,
    dots_plain,
    refuse,
    scatter_plain,
    sparse_gradient,
    wide_dtype,
)

# Numbers worth a thread of their own: some tens of microseconds.
_GRAIN = 2**15
# Of a table that is folded into an array: a temporary of this many.
_NUMBERS_AT_ONCE = 2**18


@dataclass(frozen=True, eq=False)
class Field:
    """One vocabulary: rows ``first`` to ``first + limit`` of the virtual table, all times ``scale``."""

    first: int
    limit: int
    padding: int = -1
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class BlockTable:
    """A virtual table as the op takes it: a map in integers, and the fields whose rows it holds."""

    layout: tuple[int, ...]
    fields: tuple[int, ...]
    scales: tuple[float, ...]
    starts: Tensor | None = None
    flips: Tensor | None = None

    @classmethod
    def of(cls, mapped: BlockMap, fields: list[Field]) -> Self:
        """Take the operands of a map."""
        kind, constants, starts = mapped.operands()
        numbers = constants.view(np.int64).tolist()
        layout = Layout(*(kind, *numbers, mapped.size, mapped.dim, mapped.block, int(mapped.signs)))
        flips = mapped.given_signs
        return cls(
            tuple(layout),
            tuple(number for field in fields for number in (field.first, field.limit, field.padding)),
            tuple(field.scale for field in fields),
            torch.from_numpy(starts) if mapped.starts is not None else None,
            None if flips is None else torch.from_numpy(flips),
        )

    def on(self, device: torch.device) -> Self:
        """Return the table with its given starts and signs, if any, on a device."""
        if self.starts is None or device.type == "meta":
            return self
        flips = None if self.flips is None else self.flips.to(device)
        return replace(self, starts=self.starts.to(device), flips=flips)


def max_rows(mapped: BlockMap) -> int:
    """Return how many rows a map can have before positions leave 63 bits, or its given starts end."""
    if mapped.starts is None:
        return (2**63 - 1) // mapped.pitch
    positions = len(mapped.starts) * mapped.block
    given = positions if mapped.given_signs is None else min(positions, mapped.given_signs.size)
    # The last row may be short of the padding that follows it.
    return (given + mapped.pitch - mapped.dim) // mapped.pitch


def block_bag(
    values: Tensor,
    ids: Tensor,
    table: BlockTable,
    *,
    bounds: Tensor | None = None,
    weights: Tensor | None = None,
    mean: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return the sums of bags of rows.

    Parameters
    ----------
    values : Tensor, shape (m,)
        The shared array.
    ids : integer Tensor, shape (bags, L), or (n,) with ``bounds``
    table : BlockTable
    bounds : int64 Tensor, shape (bags + 1,), optional
        Where each bag begins in ``ids``, and where the last one ends.
    weights : Tensor of the shape of ``ids``, optional
    mean : bool, default=False
        Divide by the number of ids that are not padding.
    sparse : bool, default=False
        Whether the gradient of ``values`` is a coalesced sparse tensor.

    Returns
    -------
    out : Tensor, shape (bags, dim)
        In the dtype of ``values``; zero for bags without ids.
    """
    out: Tensor = _bag(
        values, ids, bounds, weights, table.starts, table.flips, table.layout, table.fields, table.scales, mean, sparse
    )
    return out


def scatter_rows(rows: Tensor, ids: Tensor, table: BlockTable) -> Tensor:
    """Return the array that holds in each slot the signed sum of what reads it; rows: (n, dim), ids: (n,) -> (m,)."""
    ids = ids.reshape(-1, 1)
    described = (table.starts, table.flips, table.layout, table.fields, table.scales)
    out: Tensor = _scatter(rows, ids, None, None, *described, False)
    return out


@torch.no_grad()
def scatter_table(table_rows: Tensor, table: BlockTable) -> Tensor:
    """Return ``scatter_rows`` of all rows of a table (n, dim), some at a time: it may be an expanded number; (m,)."""
    total = torch.zeros(Layout(*table.layout).size, dtype=wide_dtype(table_rows.dtype), device=table_rows.device)
    step = max(1, _NUMBERS_AT_ONCE // max(1, table_rows.shape[1]))
    for first in range(0, len(table_rows), step):
        part = table_rows[first : first + step]
        total += scatter_rows(part, torch.arange(first, first + len(part), device=part.device), table)
    return total


def _compute(
    values: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None,
    flips: Tensor | None, layout: list[int], fields: list[int], scales: list[float], mean: bool, sparse: bool,
) -> Tensor:  # fmt: skip
    check(values, ids, bounds, weights, layout)
    bags, per_bag = bags_of(ids, bounds)
    wide = wide_dtype(values.dtype)
    # Rows are written, sums are added to.
    make = torch.empty if per_bag == 1 else torch.zeros
    out = make(bags, Layout(*layout).dim, dtype=wide)
    held = (
        *(_array(values), _array(ids.long().reshape(-1)), _optional(weights, wide), _bounds(bounds, ids)),
        *(per_bag, mean, *_operands(tuple(layout), starts, flips), *_fields(tuple(fields), tuple(scales)), out.numpy()),
    )
    grain = max(1, _GRAIN // max(1, ids.numel() * Layout(*layout).dim // max(1, bags)))
    _run(lambda start, stop: _block_kernels.sum_bags(*held, start, stop), bags, ids, fields, grain=grain)
    return out.to(values.dtype)


def _scatter_compute(
    grad: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None,
    flips: Tensor | None, layout: list[int], fields: list[int], scales: list[float], mean: bool,
) -> Tensor:  # fmt: skip
    bags, per_bag = bags_of(ids, bounds)
    check_grad(grad, bags, layout)
    wide, size = wide_dtype(grad.dtype), Layout(*layout).size
    out = torch.zeros(size, dtype=wide)
    held = (
        *(_array(grad.to(wide)), _array(ids.long().reshape(-1)), _optional(weights, wide), _bounds(bounds, ids)),
        *(per_bag, mean, *_operands(tuple(layout), starts, flips), *_fields(tuple(fields), tuple(scales)), out.numpy()),
    )
    threads = max(1, min(num_threads(), ids.numel() * Layout(*layout).dim // _GRAIN))
    _run(lambda low, high: _block_kernels.scatter_bags(*held, low, high), size, ids, fields, threads=threads)
    return out


def _dots_compute(
    values: Tensor, grad: Tensor, ids: Tensor, bounds: Tensor | None, starts: Tensor | None, flips: Tensor | None,
    layout: list[int], fields: list[int], scales: list[float],
) -> Tensor:  # fmt: skip
    bags, per_bag = bags_of(ids, bounds)
    check_grad(grad, bags, layout)
    wide = wide_dtype(values.dtype)
    out = torch.empty(ids.numel(), dtype=wide)
    held = (
        *(_array(values), _array(ids.long().reshape(-1)), _array(grad.to(wide)), _bounds(bounds, ids), per_bag),
        *(*_operands(tuple(layout), starts, flips), *_fields(tuple(fields), tuple(scales)), out.numpy()),
    )
    _run(lambda start, stop: _block_kernels.dot_rows(*held, start, stop), bags, ids, fields, grain=64)
    return out.reshape(ids.shape)


def _run(kernel: Callable[[int, int], int], n: int, ids: Tensor, fields: list[int], **options: int) -> None:
    """Run a kernel over ranges, and raise over the first id that it cannot take."""
    wrong: list[int] = []

    def work(start: int, stop: int) -> None:
        place = kernel(start, stop)
        if place >= 0:
            wrong.append(place)

    parallel_ranges(work, n, **options)
    if wrong:
        refuse(ids, min(wrong), fields)


def _bounds(bounds: Tensor | None, ids: Tensor) -> NDArray[np.int64]:
    if bounds is None:
        return np.zeros(0, np.int64)
    held: NDArray[np.int64] = _array(bounds.long())
    if held.size < 1 or held[0] != 0 or held[-1] != ids.numel() or (np.diff(held) < 0).any():
        raise QuernelError(
            f"offsets must begin with 0, never decrease and end within the {ids.numel()} ids; "
            f"got {held[:-1][:8].tolist()}{'...' if held.size > 9 else ''}"
        )
    return held


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's memory; bfloat16 enters the kernels as uint16, float16 as int16."""
    held = tensor.detach().contiguous()
    half = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(held.dtype)
    array: NDArray[Any] = (held if half is None else held.view(half)).numpy()
    return array


def _optional(weights: Tensor | None, wide: torch.dtype) -> NDArray[Any]:
    return _array(torch.zeros(0, dtype=wide) if weights is None else weights.reshape(-1).to(wide))


@functools.lru_cache(maxsize=256)
def _sizes(layout: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]:
    """Return the kernels' view of a map: its sizes, the constants of its hash, and the pieces of a row."""
    held = Layout(*layout)
    dim, block, pitch = held.dim, held.block, held.pitch
    whole = pitch % 64 == 0 or 64 % pitch == 0
    words = -(-dim // 64) if whole else (dim + 62) // 64 + 1
    pieces = [
        (owner, inner, owner * block + inner, min(LANES, block - inner, dim - owner * block - inner))
        for owner in range(held.per_row)
        for inner in range(0, min(block, dim - owner * block), LANES)
    ]
    # Blocks that run over rows are cut row by row: the end of one and the beginning of the next.
    straddling = block > dim
    counts = (2, -(-dim // LANES) + 1) if straddling else (held.per_row, len(pieces))
    shape = np.array([dim, block, held.per_row, pitch, held.kind, held.signs, words, *counts])
    numbers = (held.state, held.places, held.a, held.b, held.c, held.prime)
    return shape, np.array(numbers, dtype=np.int64).view(U64), np.array(pieces, dtype=np.int64)


def _operands(layout: tuple[int, ...], starts: Tensor | None, flips: Tensor | None) -> tuple[NDArray[Any], ...]:
    shape, constants, pieces = _sizes(layout)
    given = np.zeros(0, np.int64) if starts is None else starts.numpy()
    return shape, constants, given, np.zeros(0, np.int8) if flips is None else flips.numpy(), pieces


@functools.lru_cache(maxsize=256)
def _fields(fields: tuple[int, ...], scales: tuple[float, ...]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.array(fields, dtype=np.int64).reshape(-1, 3), np.array(scales)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, ids, bounds, weights, starts, flips, *ctx.described, ctx.sparse = inputs
    wants_weights = weights is not None and weights.requires_grad
    ctx.save_for_backward(values if wants_weights else None, ids, bounds, weights, starts, flips)
    ctx.dtype = values.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, ids, bounds, weights, starts, flips = ctx.saved_tensors
    layout, fields, scales, mean = ctx.described
    by_values = by_weights = None
    if ctx.needs_input_grad[0] and ctx.sparse:
        wide = wide_dtype(grad.dtype)
        parts = Parts.of(ids, bounds, weights, starts, flips, layout, fields, scales, mean, wide)
        by_values = sparse_gradient(grad, Layout(*layout).size, parts).to(ctx.dtype)
    elif ctx.needs_input_grad[0]:
        by_values = _scatter(grad, ids, bounds, weights, starts, flips, layout, fields, scales, mean).to(ctx.dtype)
    if values is not None:
        dots = _dots(values, grad, ids, bounds, starts, flips, layout, fields, scales)
        by_weights = dots.to(weights.dtype)
    return by_values, None, None, by_weights, *[None] * 7


_library = torch.library.Library("quernel", "FRAGMENT")
_map = "Tensor? starts, Tensor? flips, int[] layout, int[] fields, float[] scales"
for _schema in (
    f"block_bag(Tensor values, Tensor ids, Tensor? bounds, Tensor? weights, {_map}, bool mean, bool sparse)",
    f"block_bag_scatter(Tensor grad, Tensor ids, Tensor? bounds, Tensor? weights, {_map}, bool mean)",
    f"block_bag_dots(Tensor values, Tensor grad, Tensor ids, Tensor? bounds, {_map})",
):
    _library.define(f"{_schema} -> Tensor", tags=torch.Tag.pt2_compliant_tag)
for _device, _forms in (
    ("CPU", (_compute, _scatter_compute, _dots_compute)),
    ("CUDA", (bag_plain, scatter_plain, dots_plain)),
):
    for _name, _form in zip(("block_bag", "block_bag_scatter", "block_bag_dots"), _forms, strict=True):
        _library.impl(_name, _form, _device)
_bag = torch.ops.quernel.block_bag.default
_scatter = torch.ops.quernel.block_bag_scatter.default
_dots = torch.ops.quernel.block_bag_dots.default


@torch.library.register_fake("quernel::block_bag", lib=_library)
def _bag_fake(
    values: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None,
    flips: Tensor | None, layout: list[int], fields: list[int], scales: list[float], mean: bool, sparse: bool,
) -> Tensor:  # fmt: skip
    check(values, ids, bounds, weights, layout)
    return values.new_empty(bags_of(ids, bounds)[0], Layout(*layout).dim)


@torch.library.register_fake("quernel::block_bag_scatter", lib=_library)
def _scatter_fake(
    grad: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None,
    flips: Tensor | None, layout: list[int], fields: list[int], scales: list[float], mean: bool,
) -> Tensor:  # fmt: skip
    return grad.new_empty(Layout(*layout).size, dtype=wide_dtype(grad.dtype))


@torch.library.register_fake("quernel::block_bag_dots", lib=_library)
def _dots_fake(
    values: Tensor, grad: Tensor, ids: Tensor, bounds: Tensor | None, starts: Tensor | None, flips: Tensor | None,
    layout: list[int], fields: list[int], scales: list[float],
) -> Tensor:  # fmt: skip
    return values.new_empty(ids.shape, dtype=wide_dtype(values.dtype))


torch.library.register_autograd("quernel::block_bag", _backward, setup_context=_setup, lib=_library)


def _warmup() -> None:
    """Compile the kernels for float32 arrays; ``quernel warmup`` calls it."""
    table = BlockTable.of(BlockMap(64, 16, 16), [Field(0, 4)])
    values, weights = torch.ones(64, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    block_bag(values, torch.zeros(2, 2, dtype=torch.long), table, weights=weights).sum().backward()
