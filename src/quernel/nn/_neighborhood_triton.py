"""Triton kernels of neighborhood attention for GPUs, over the tiles of the plan that all backends share.

One program takes a tile of queries of one head and walks over its halo in blocks with an online softmax; backward does
so again for the gradients of queries, and with tiles of keys and halos of queries for those of keys and values, so that
nothing is added atomically and results repeat bit for bit.  Sums are in float32.  Importing this file needs Triton: see
``_neighborhood_op.triton_kernels``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quernel.nn._neighborhood_plan import NeighborhoodPlan, Tiles

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Largest head, and the rows of a halo that are read at a time for heads up to 64 numbers and beyond.
_MOST, _BLOCK, _SMALL_BLOCK = 256, 64, 32


def takes(*tensors: Tensor) -> bool:
    """Say whether the kernels are for such tensors, which the interpreter also takes from a CPU."""
    interpreted = not isinstance(_attend_kernel, triton.runtime.JITFunction)
    return all(
        t.dtype in _FLOATS and (t.is_cuda or interpreted) and t.shape[-1] <= _MOST and t.numel() < 2**31
        for t in tensors
    )


@triton.jit
def _rows(
    base: tl.tensor, index: tl.tensor, step: tl.tensor, inside: tl.tensor, SIZE: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """Load rows of SIZE numbers, filled up to WIDE with zeros."""
    d = tl.arange(0, WIDE)
    return tl.load(base + index[:, None] * step + d[None, :], mask=inside[:, None] & (d[None, :] < SIZE), other=0.0)


@triton.jit
def _halo(offsets: tl.tensor, j: tl.tensor, origin: tl.tensor, NEAR: tl.constexpr, inside: tl.tensor) -> tl.tensor:
    """Load rows of a halo: the first NEAR are counted from its origin."""
    return tl.load(offsets + j, mask=inside, other=0) + tl.where(inside & (j < NEAR), origin, 0)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, lanes, origins, kinds, offsets, masks, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, tokens, heads,
    NEAR: tl.constexpr, M: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_E: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of outputs, (B, N, H, E), and of logarithms, (B, N, H)."""
    tile, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    t, j = tl.arange(0, LANES), tl.arange(0, BLOCK)
    rows, everywhere = tl.load(lanes + tile * LANES + t), t >= 0
    origin, kind = tl.load(origins + tile), tl.load(kinds + tile)
    seen_by = masks + (kind * LANES + t[:, None]) * M
    queries = _rows(q + b * qb + h * qh, rows, qt, everywhere, D, WIDE_D)
    keys_at, values_at = k + b * kb + h // SHARE * kh, v + b * vb + h // SHARE * vh
    top, total = tl.full((LANES,), float("-inf"), tl.float32), tl.zeros((LANES,), tl.float32)
    mixed = tl.zeros((LANES, WIDE_E), tl.float32)
    for first in range(0, M, BLOCK):
        inside = first + j < M
        index = _halo(offsets + kind * M, first + j, origin, NEAR, inside)
        seen = tl.load(seen_by + first + j[None, :], mask=inside[None, :], other=0) != 0
        keys = _rows(keys_at, index, kt, inside, D, WIDE_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(top, tl.max(scores, 1))
        # A lane that has seen nothing gets weights of zero and not NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights, share = tl.exp(scores - base[:, None]), tl.exp(top - base)
        values = _rows(values_at, index, vt, inside, E, WIDE_E)
        mixed = mixed * share[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total, top = total * share + tl.sum(weights, 1), larger
    real = total > 0
    place, e = (b * tokens + rows) * heads + h, tl.arange(0, WIDE_E)
    answer = mixed / tl.where(real, total, 1.0)[:, None]
    tl.store(
        out + place[:, None] * E + e[None, :], answer.to(out.dtype.element_ty), mask=real[:, None] & (e[None, :] < E)
    )
    tl.store(lse + place, top + tl.log(tl.where(real, total, 1.0)), mask=real)


@triton.jit
def _query_kernel(  # type: ignore[no-untyped-def]
    q, k, v, grad, dq, lse, delta, lanes, origins, kinds, offsets, masks, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh, tokens, heads,
    NEAR: tl.constexpr, M: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_E: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of queries, (B, N, H, D)."""
    tile, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    t, j = tl.arange(0, LANES), tl.arange(0, BLOCK)
    rows, everywhere = tl.load(lanes + tile * LANES + t), t >= 0
    origin, kind = tl.load(origins + tile), tl.load(kinds + tile)
    seen_by = masks + (kind * LANES + t[:, None]) * M
    queries = _rows(q + b * qb + h * qh, rows, qt, everywhere, D, WIDE_D)
    grads = _rows(grad + b * gb + h * gh, rows, gt, everywhere, E, WIDE_E)
    place, d = (b * tokens + rows) * heads + h, tl.arange(0, WIDE_D)
    top, less = tl.load(lse + place), tl.load(delta + place)
    keys_at, values_at = k + b * kb + h // SHARE * kh, v + b * vb + h // SHARE * vh
    total, real = tl.zeros((LANES, WIDE_D), tl.float32), tl.zeros((LANES,), tl.int32)
    for first in range(0, M, BLOCK):
        inside = first + j < M
        index = _halo(offsets + kind * M, first + j, origin, NEAR, inside)
        seen = tl.load(seen_by + first + j[None, :], mask=inside[None, :], other=0) != 0
        keys, values = _rows(keys_at, index, kt, inside, D, WIDE_D), _rows(values_at, index, vt, inside, E, WIDE_E)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.where(seen, tl.exp(scores - top[:, None]), 0.0)
        dots = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        slopes = weights * (dots - less[:, None])
        total += tl.dot(slopes.to(keys.dtype), keys, input_precision=PRECISION)
        real = tl.maximum(real, tl.max(seen.to(tl.int32), 1))
    there = (real > 0)[:, None] & (d[None, :] < D)
    tl.store(dq + place[:, None] * D + d[None, :], (total * scale).to(dq.dtype.element_ty), mask=there)


@triton.jit
def _key_kernel(  # type: ignore[no-untyped-def]
    q, k, v, grad, dk, dv, lse, delta, lanes, origins, kinds, offsets, masks, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh, tokens, every, groups,
    NEAR: tl.constexpr, M: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_E: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of keys and values, (B, ``every``, G, D) and (B, ``every``, G, E)."""
    tile, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, g = pair // groups, pair % groups
    t, j = tl.arange(0, LANES), tl.arange(0, BLOCK)
    rows, everywhere = tl.load(lanes + tile * LANES + t), t >= 0
    origin, kind = tl.load(origins + tile), tl.load(kinds + tile)
    seen_by = masks + (kind * LANES + t[None, :]) * M
    keys = _rows(k + b * kb + g * kh, rows, kt, everywhere, D, WIDE_D)
    values = _rows(v + b * vb + g * vh, rows, vt, everywhere, E, WIDE_E)
    to_keys, to_values = tl.zeros((LANES, WIDE_D), tl.float32), tl.zeros((LANES, WIDE_E), tl.float32)
    real = tl.zeros((LANES,), tl.int32)
    for r in range(SHARE):
        h = g * SHARE + r
        for first in range(0, M, BLOCK):
            inside = first + j < M
            index = _halo(offsets + kind * M, first + j, origin, NEAR, inside)
            seen = tl.load(seen_by + first + j[:, None], mask=inside[:, None], other=0) != 0  # (BLOCK, LANES)
            queries = _rows(q + b * qb + h * qh, index, qt, inside, D, WIDE_D)
            grads = _rows(grad + b * gb + h * gh, index, gt, inside, E, WIDE_E)
            place = (b * tokens + index) * (groups * SHARE) + h
            top, less = tl.load(lse + place), tl.load(delta + place)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            weights = tl.where(seen, tl.exp(scores - top[:, None]), 0.0)
            dots = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            slopes = weights * (dots - less[:, None])
            to_values += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
            to_keys += tl.dot(tl.trans(slopes.to(queries.dtype)), queries, input_precision=PRECISION)
            real = tl.maximum(real, tl.max(seen.to(tl.int32), 0))
    d, e = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    place, there = (b * every + rows) * groups + g, (real > 0)[:, None]
    tl.store(
        dk + place[:, None] * D + d[None, :], (to_keys * scale).to(dk.dtype.element_ty), mask=there & (d[None, :] < D)
    )
    tl.store(dv + place[:, None] * E + e[None, :], to_values.to(dv.dtype.element_ty), mask=there & (e[None, :] < E))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Return outputs, (B, N, H, E), and the logarithms of their sums of exponentials."""
    q, k, v = _dense(q, k, v)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    tables, rows = _tables(plan.queries, q)
    grid = (len(plan.queries.lanes), len(q) * q.shape[2])
    with torch.cuda.device_of(q):
        _attend_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            *tables,
            scale,
            *_steps(q, k, v),
            q.shape[1],
            q.shape[2],
            *rows,
            *_constants(q, k, v, plan),
        )
    return out, lse


def gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, plan: NeighborhoodPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; delta is the sum of grad * out less the gradient of lse."""
    q, k, v, grad = held = _dense(q, k, v, grad)
    lse, delta = lse.contiguous(), delta.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    batch, tokens, heads, groups = *q.shape[:3], k.shape[2]
    steps, constants = _steps(*held), _constants(q, k, v, plan)
    tables, rows = _tables(plan.queries, q)
    with torch.cuda.device_of(q):
        _query_kernel[len(plan.queries.lanes), batch * heads](
            *held, dq, lse, delta, *tables, scale, *steps, tokens, heads, *rows, *constants
        )
        for tiles in plan.keys:
            tables, rows = _tables(tiles, q)
            _key_kernel[len(tiles.lanes), batch * groups](
                *held, dk, dv, lse, delta, *tables, scale, *steps, tokens, k.shape[1], groups, *rows, *constants
            )
    return dq, dk, dv


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose rows are dense."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _steps(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step for x in tensors for step in x.stride()[:3])


def _tables(tiles: Tiles, like: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Return the tables of tiles on a device; rows of a halo that its origin moves, and all of them."""
    held = tiles.on(like.device)
    names = ("lanes", "origins", "kinds", "offsets")
    return (*(held[name] for name in names), held["masks"].view(torch.uint8)), (tiles.halo - tiles.beyond, tiles.halo)


def _constants(q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan) -> tuple[Any, ...]:
    """Return what the kernels are compiled for: products of matrices take no side below 16."""
    wide = [max(16, triton.next_power_of_2(x.shape[3])) for x in (q, v)]
    block = _BLOCK if max(wide) <= 64 else _SMALL_BLOCK
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    lanes = plan.queries.lanes.shape[1]
    return q.shape[2] // k.shape[2], q.shape[3], v.shape[3], *wide, lanes, block, precision
