"""Triton kernels of causal linear attention inside chunks, for GPUs, forward and backward; a program takes a chunk.

With chunks of C tokens, S and s the sums before each, L_ij = g^(i - j) for j <= i else 0, l_i = g^(i + 1),

    num = (L * q k^T) v + l (q S),        den = sum_j (L * q k^T)_ij + l (q s)

The C x C products stay in registers, forward and backward; what chunks hand to each other is left to torch.
Importing this file needs Triton: see ``functional.feature_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a chunk, and features and values that a program takes at a time, at most.
CHUNK, _WIDEST = 64, 64


@triton.jit
def _falls(gamma: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """Return L, (C, C)."""
    i = tl.arange(0, C)
    steps = i[:, None] - i[None, :]
    return tl.where(steps >= 0, tl.exp2(tl.maximum(steps, 0).to(tl.float32) * tl.log2(gamma)), 0.0)


@triton.jit
def _left(gamma: tl.tensor, C: tl.constexpr) -> tl.tensor:
    """Return l, (C, 1)."""
    return tl.exp2((tl.arange(0, C)[:, None] + 1).to(tl.float32) * tl.log2(gamma))


@triton.jit
def _block(
    x: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """Load some columns of some rows of a dense matrix, zeros beyond its width."""
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=columns[None, :] < width, other=0.0)


@triton.jit
def _rows_of(x: tl.tensor, rows: tl.tensor, columns: tl.tensor, height: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Load a block of a dense matrix, zeros beyond both sides."""
    there = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=there, other=0.0)


@triton.jit
def _forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    values: tl.tensor,
    keys: tl.tensor,
    gammas: tl.tensor,
    num: tl.tensor,
    den: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    features: tl.tensor,
    size: tl.tensor,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write num, (G, C, size), and den, (G, C); q, k: (G, C, features), values: (G, features, size)."""
    g = tl.program_id(0).to(tl.int64)
    gamma = tl.load(gammas + (g // chunks) % heads)
    i, d = tl.arange(0, C), tl.program_id(1) * D + tl.arange(0, D)
    q, k, v = q + g * C * features, k + g * C * features, v + g * C * size
    left = _left(gamma, C)
    inside = tl.zeros((C, C), tl.float32)
    total = tl.zeros((C, D), tl.float32)
    weight = tl.zeros((C,), tl.float32)
    for b in range(BLOCKS):
        f = b * F + tl.arange(0, F)
        asked, key = _block(q, i, f, features), _block(k, i, f, features)
        inside += tl.dot(asked, tl.trans(key), input_precision=PRECISION)
        asked *= left
        held = _rows_of(values + g * features * size, f, d, features, size)
        total += tl.dot(asked, held, input_precision=PRECISION)
        weight += tl.sum(asked * tl.load(keys + g * features + f, mask=f < features, other=0.0)[None, :], axis=1)
    inside *= _falls(gamma, C)
    total += tl.dot(inside, _block(v, i, d, size), input_precision=PRECISION)
    tl.store(num + g * C * size + i[:, None] * size + d[None, :], total, mask=d[None, :] < size)
    if tl.program_id(1) == 0:
        tl.store(den + g * C + i, weight + tl.sum(inside, axis=1))


@triton.jit
def _features_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    values: tl.tensor,
    keys: tl.tensor,
    gammas: tl.tensor,
    dnum: tl.tensor,
    dden: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dvalues: tl.tensor,
    dkeys: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    features: tl.tensor,
    size: tl.tensor,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write the gradients by q, k, values and keys for a block of features."""
    g = tl.program_id(0).to(tl.int64)
    gamma = tl.load(gammas + (g // chunks) % heads)
    i, f = tl.arange(0, C), tl.program_id(1) * F + tl.arange(0, F)
    left = _left(gamma, C)
    asked, key = _block(q + g * C * features, i, f, features), _block(k + g * C * features, i, f, features)
    by_weight = tl.load(dden + g * C + i)[:, None]
    held = tl.load(keys + g * features + f, mask=f < features, other=0.0)[None, :]
    inside = tl.zeros((C, C), tl.float32) + by_weight
    total = tl.zeros((C, F), tl.float32) + by_weight * held
    for b in range(BLOCKS):
        d = b * D + tl.arange(0, D)
        given, value = _block(dnum + g * C * size, i, d, size), _block(v + g * C * size, i, d, size)
        inside += tl.dot(given, tl.trans(value), input_precision=PRECISION)
        sums = _rows_of(values + g * features * size, f, d, features, size)
        total += tl.dot(given, tl.trans(sums), input_precision=PRECISION)
        by_sums = tl.dot(tl.trans(asked * left), given, input_precision=PRECISION)
        there = (f[:, None] < features) & (d[None, :] < size)
        tl.store(dvalues + g * features * size + f[:, None] * size + d[None, :], by_sums, mask=there)
    inside *= _falls(gamma, C)
    by_query = total * left + tl.dot(inside, key, input_precision=PRECISION)
    by_key = tl.dot(tl.trans(inside), asked, input_precision=PRECISION)
    place = g * C * features + i[:, None] * features + f[None, :]
    tl.store(dq + place, by_query, mask=f[None, :] < features)
    tl.store(dk + place, by_key, mask=f[None, :] < features)
    tl.store(dkeys + g * features + f, tl.sum(asked * left * by_weight, axis=0), mask=f < features)


@triton.jit
def _values_kernel(
    q: tl.tensor,
    k: tl.tensor,
    gammas: tl.tensor,
    dnum: tl.tensor,
    dv: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    features: tl.tensor,
    size: tl.tensor,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write the gradient by v for a block of its columns."""
    g = tl.program_id(0).to(tl.int64)
    gamma = tl.load(gammas + (g // chunks) % heads)
    i, d = tl.arange(0, C), tl.program_id(1) * D + tl.arange(0, D)
    inside = tl.zeros((C, C), tl.float32)
    for b in range(BLOCKS):
        f = b * F + tl.arange(0, F)
        asked, key = _block(q + g * C * features, i, f, features), _block(k + g * C * features, i, f, features)
        inside += tl.dot(asked, tl.trans(key), input_precision=PRECISION)
    inside *= _falls(gamma, C)
    given = _block(dnum + g * C * size, i, d, size)
    total = tl.dot(tl.trans(inside), given, input_precision=PRECISION)
    tl.store(dv + g * C * size + i[:, None] * size + d[None, :], total, mask=d[None, :] < size)


def chunk_products(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor, keys: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return num, (B, H, T, C, D), and den, (B, H, T, C, 1), with gradients for all but gamma.

    q, k: (B, H, T, C, F)  v: (B, H, T, C, D)  values: (B, H, T, F, D)  keys: (B, H, T, F, 1)  gamma: (H, 1, 1)
    float32; C a power of two, 16 at least.
    """
    num, den = _Products.apply(q, k, v, values, keys, gamma)  # type: ignore[no-untyped-call]
    return num, den[..., None]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, gamma = given
        q, k, v, values, keys = (t.contiguous() for t in tensors)
        heads = q.shape[1]
        gammas = q.new_ones(heads) if gamma is None else gamma.detach().reshape(-1).contiguous()
        numbers, kinds = _told(q, v)
        num, den = torch.empty_like(v), q.new_empty(q.shape[:-1])
        if num.numel():
            grid = (q.shape[:3].numel(), triton.cdiv(v.shape[-1], kinds["D"]))
            with torch.cuda.device_of(q):
                blocks = triton.cdiv(q.shape[-1], kinds["F"])
                _forward_kernel[grid](q, k, v, values, keys, gammas, num, den, *numbers, **kinds, BLOCKS=blocks)
        ctx.save_for_backward(q, k, v, values, keys, gammas)
        return num, den

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, values, keys, gammas = ctx.saved_tensors
        dnum, dden = (g.contiguous() for g in grads)
        numbers, kinds = _told(q, v)
        dq, dk, dv, dvalues, dkeys = (torch.empty_like(t) for t in (q, k, v, values, keys))
        if v.numel():
            groups, by_features = q.shape[:3].numel(), triton.cdiv(q.shape[-1], kinds["F"])
            by_values = triton.cdiv(v.shape[-1], kinds["D"])
            with torch.cuda.device_of(q):
                held = (q, k, v, values, keys, gammas, dnum, dden, dq, dk, dvalues, dkeys)
                _features_kernel[groups, by_features](*held, *numbers, **kinds, BLOCKS=by_values)
                _values_kernel[groups, by_values](q, k, gammas, dnum, dv, *numbers, **kinds, BLOCKS=by_features)
        return dq, dk, dv, dvalues, dkeys, None


def _told(q: Tensor, v: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the sizes, and what kernels are compiled for."""
    _, heads, chunks, tokens, features = q.shape
    size = v.shape[-1]
    blocks = {name: min(_WIDEST, max(16, triton.next_power_of_2(n))) for name, n in (("F", features), ("D", size))}
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return (chunks, heads, features, size), {"PRECISION": precision, "C": tokens, **blocks}
